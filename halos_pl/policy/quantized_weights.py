"""Quantized weights as plain tensors: which layers have them, what they consist of, and their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halos_pl.policy.sharding import whole


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the layers whose matrix bitsandbytes or torchao has quantized, with their names."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if bits_of(module) or type(weight).__module__.startswith("torchao"):
            yield name, module


def bits_of(layer: nn.Module) -> int:
    """The bits of a weight in a layer of bitsandbytes, whose parameter FSDP replaces by a plain one; otherwise 0."""
    kinds = [kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("bitsandbytes.")]
    return 4 if "Linear4bit" in kinds else 8 if "Linear8bitLt" in kinds else 0


def has_quantized_weights(module: nn.Module) -> bool:
    """Whether a module or one inside it has quantized weights."""
    return any(True for _ in quantized_layers(module))


def plain_parts(layer: Any) -> dict[str, Tensor]:
    """The tensors that a layer's quantized matrix consists of, such as codes and scales, by name.

    A collective operation for a sharded layer.
    """
    weight = layer.weight
    if bits_of(layer) == 4:
        scales = _state(layer).as_dict(packed=True)
        return {"": whole(weight.data), **{f".{name}": value for name, value in scales.items()}}
    if bits_of(layer) == 8:
        return {"": weight.data, ".SCB": _scales(layer)}
    return dict(flattened(weight, ""))


def _state(layer: Any) -> Any:
    """The scales and sizes of a 4-bit layer of bitsandbytes, which FSDP drops from its parameter."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def flattened(tensor: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the plain tensors that a tensor of torchao consists of, with their names; a plain tensor itself."""
    if not type(tensor).__module__.startswith("torchao"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from flattened(getattr(tensor, part), f"{name}.{part}")


def _scales(layer: Any) -> Tensor:
    """The scales of an 8-bit layer of bitsandbytes, which move from the weight to the layer's state when it is used."""
    scales: Tensor = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return scales


def dequantized(layer: Any) -> Tensor:
    """The values of a layer's quantized matrix, [out, in]."""
    weight = layer.weight
    if bits_of(layer) == 4:
        from bitsandbytes.functional import dequantize_4bit

        values: Tensor = dequantize_4bit(whole(weight.data), _state(layer))
    elif bits_of(layer) == 8:
        values = weight.data.float() * (_scales(layer).float() / 127).unsqueeze(1)
    else:
        values = weight.dequantize()
    return values


def matrix_size(layer: Any) -> int:
    """Number of weights of a linear layer's matrix; a quantized one is stored in fewer numbers."""
    if isinstance(layer, Conv1D):
        return layer.weight.numel()
    return int(layer.in_features * layer.out_features)


def bytes_of(layer: Any) -> int:
    """Memory of a layer's quantized matrix, with its scales."""
    return sum(part.numel() * part.element_size() for part in plain_parts(layer).values())


@torch.no_grad()
def all_finite(layer: Any) -> bool:
    """Whether the values of a layer's quantized matrix are finite."""
    return bool(dequantized(layer).isfinite().all())
