"""Quantizes the base model of an adapter while it is loaded, and tests that its layers train right."""

from __future__ import annotations

import importlib.util
import logging
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from halos_pl.policy.quantized_weights import bits_of, bytes_of, dequantized, matrix_size, quantized_layers
from halos_pl.policy.spec import ModelError, ModelSpec, QuantizeSpec

#: Largest relative difference between a layer and the product with its dequantized matrix. 8-bit layers of bitsandbytes
#: also round their inputs, to 1%.
_ROUNDING = 0.05
#: Largest relative difference between passes of one layer in training and in evaluation.
_REPEATED = 1e-3


def check_package(quantize: QuantizeSpec) -> None:
    """Refuses a quantization whose library is not installed.

    Raises:
        ModelError: naming the extra that installs it.
    """
    if importlib.util.find_spec(quantize.method) is None:
        raise ModelError(
            f"model.policy.quantize.method is {quantize.method}, which is not installed; run pip install"
            f" 'halos_pl[{quantize.method}]'"
        )


def loading_options(spec: ModelSpec) -> dict[str, Any]:
    """The arguments by which ``from_pretrained`` quantizes a model; none for a model that is not quantized.

    Raises:
        ModelError: the library is not installed.
    """
    quantize = spec.quantize
    if quantize is None:
        return {}
    check_package(quantize)
    # On the CPU, so that all machines and ranks get the same numbers.
    return {"quantization_config": _config(quantize, spec.dtype), "device_map": {"": "cpu"}}


def _config(quantize: QuantizeSpec, dtype: str) -> Any:
    """transformers' configuration of a quantization."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantize.method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        if quantize.bits == 8:
            return TorchAoConfig(Int8WeightOnlyConfig(version=2))
        groups = PerGroup(quantize.group_size or 32)
        return TorchAoConfig(
            IntxWeightOnlyConfig(
                weight_dtype=torch.int4,  # type: ignore[attr-defined]
                granularity=groups,
            )
        )
    if quantize.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantize.outlier_threshold or 0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize.quant_type or "nf4",
        bnb_4bit_use_double_quant=quantize.double_quant is not False,
        bnb_4bit_compute_dtype=getattr(torch, quantize.compute_dtype or dtype),
        bnb_4bit_quant_storage=getattr(torch, quantize.storage_dtype or "uint8"),
    )


def check_layers(model: nn.Module, spec: ModelSpec) -> None:
    """Refuses a model without a layer that the library quantizes: torchao leaves out those of GPT-2.

    Args:
        model: model whose weights need not be loaded.
        spec: its specification.

    Raises:
        ModelError: naming the other method.
    """
    matrices = _matrices(model)
    if spec.quantize and spec.quantize.method == "torchao" and not any(isinstance(m, nn.Linear) for m in matrices):
        raise _unquantized(spec, len(matrices))


def _matrices(model: nn.Module) -> list[nn.Module]:
    """The layers of a model with a matrix, except its head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def _unquantized(spec: ModelSpec, number: int) -> ModelError:
    """The error about a model of whose matrices none is quantized."""
    assert spec.quantize is not None
    return ModelError(
        f"model.policy.quantize: {spec.quantize.method} quantizes none of the {number} matrices of {spec.path}; use"
        " the other method, or remove model.policy.quantize"
    )


def check_groups(model: nn.Module, quantize: QuantizeSpec) -> None:
    """Refuses a group size that does not divide the inputs of each layer.

    Args:
        model: model whose weights need not be loaded.
        quantize: quantization.

    Raises:
        ModelError: naming a layer and its number of inputs.
    """
    if (quantize.method, quantize.bits) != ("torchao", 4):
        return
    size, head = quantize.group_size or 32, model.get_output_embeddings()  # type: ignore[operator]
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and layer.in_features % size:
            raise ModelError(
                f"model.policy.quantize.group_size is {size}, which does not divide the {layer.in_features} inputs of"
                f" {name}; choose a divisor"
            )


def prepare(model: nn.Module, spec: ModelSpec) -> None:
    """Makes quantized layers compute the same in training and in evaluation, and reports how much was quantized.

    Raises:
        ModelError: no layer was quantized, or the layers have wrong gradients.
    """
    layers = dict(quantized_layers(model))
    for layer in layers.values():
        _use_one_kernel(layer)
        if not bits_of(layer) and isinstance(layer, nn.Linear):  # torchao's
            layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
        if hasattr(layer, "quant_state") or hasattr(layer, "state"):  # bitsandbytes'
            layer.register_state_dict_post_hook(_drop_scales)
    if spec.quantize is None:
        return
    plain = [m for m in _matrices(model) if not any(m is layer for layer in layers.values())]
    if not layers:
        raise _unquantized(spec, len(plain))
    check_gradients(model)
    weights = sum(map(matrix_size, layers.values()))
    stored = sum(map(bytes_of, layers.values()))
    rest = f"; {len(plain)} other matrices of its layers are not quantized" if plain else ""
    rank_zero_info(
        f"halos: {spec.quantize.method} has quantized {len(layers)} matrices of {spec.path} with {weights / 1e6:,.1f}"
        f" million weights to {8 * stored / weights:.1f} bits each, scales included{rest}"
    )


class _Product(torch.autograd.Function):
    """A layer's output, whose backward pass dequantizes the matrix anew.

    torchao's own keeps the dequantized matrix of each layer for the backward pass, as much as the unquantized base.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ dequantized(ctx.layer).to(gradient.dtype), None


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Product.apply(x, layer)  # type: ignore[no-any-return, no-untyped-call]
    return functional.linear(x, layer.weight, layer.bias)


def _use_one_kernel(layer: Any) -> None:
    """Switches off what bitsandbytes does on a CPU only in evaluation, as the reference is computed in that mode.

    On a CPU with AVX512-BF16, a 4-bit layer reorders its weights in evaluation, and its next gradients are computed
    from the wrong ones. An 8-bit layer rounds its inputs to 8 bits only in evaluation.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
    if bits_of(layer) == 8:
        layer.register_forward_pre_hook(_as_in_training)
        # It warns in each pass that float32 inputs are rounded to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _as_in_training(layer: nn.Module, _: Any) -> None:
    layer.training = True


def _drop_scales(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Keeps the scales of bitsandbytes out of checkpoints: as all frozen weights, they come from the model's files."""
    for name in [
        key for key in state if key.startswith((f"{prefix}weight.", f"{prefix}SCB", f"{prefix}weight_format"))
    ]:
        del state[name]


def check_gradients(model: nn.Module) -> None:
    """Refuses a model whose quantized layers compute wrong gradients, or others after a pass in evaluation.

    Tests one layer of each kind, on the device that it is on.

    Raises:
        ModelError: naming the layer and the size of the difference.
    """
    kinds: set[Any] = set()
    for name, layer in quantized_layers(model):
        kind = (type(layer), type(layer.weight))
        if kind not in kinds:
            kinds.add(kind)
            if why := _layer_fault(layer):
                raise ModelError(
                    f"the quantized layer {name} ({type(layer).__module__}.{type(layer).__name__}) computes wrong"
                    f" numbers on this {layer.weight.device.type}: {why}. Use another model.policy.quantize.method or"
                    " version of its library"
                )


def _layer_fault(layer: Any) -> str | None:
    """What is wrong with a layer's outputs or gradients; None if they agree with its dequantized matrix."""
    training = layer.training
    matrix = dequantized(layer).float()
    dtype = next(
        (p.dtype for p in [layer.weight, layer.bias] if p is not None and p.is_floating_point()), torch.float32
    )
    if bits_of(layer) == 4:
        dtype = layer.compute_dtype or torch.float32
    draw = torch.Generator().manual_seed(0)
    # Created on the CPU, even while Lightning creates tensors on a GPU by default.
    x, slope = (
        torch.randn(3, n, generator=draw, device="cpu").to(matrix.device, dtype) for n in (matrix.shape[1], len(matrix))
    )
    bias = 0.0 if layer.bias is None else layer.bias.detach().float()

    def pass_with_gradient() -> tuple[Tensor, Tensor]:
        inputs = x.detach().requires_grad_()
        with torch.enable_grad():
            outputs = layer.train()(inputs)
            return outputs.detach(), torch.autograd.grad(outputs, inputs, slope)[0]

    try:
        with torch.autocast(matrix.device.type, enabled=False):
            before = pass_with_gradient()
            with torch.no_grad():
                evaluated = layer.eval()(x)
            after = pass_with_gradient()
    finally:
        layer.train(training)
    right = (x.float() @ matrix.t() + bias, slope.float() @ matrix)
    differences = {
        "its outputs differ by {} from those of its dequantized matrix": (before[0], right[0], _ROUNDING),
        "its gradients differ by {} from those of its dequantized matrix": (before[1], right[1], _ROUNDING),
        "its outputs in evaluation differ by {} from those in training": (evaluated, before[0], _REPEATED),
        "after a pass in evaluation, its outputs differ by {}": (after[0], before[0], _REPEATED),
        "after a pass in evaluation, its gradients differ by {}": (after[1], before[1], _REPEATED),
    }
    for what, (value, expected, most) in differences.items():
        off = float((value.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
        if not off <= most:
            return what.format(f"{off:.1%}")
    return None
