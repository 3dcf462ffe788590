"""Casts of frozen weights that are kept: under autocast on a CPU, torch would repeat them in each pass.

Autocast caches the casts of trained weights only. With an adapter on a small model, those of the frozen weights take up
to a third of a step. On a GPU they cost little, and memory is scarcer.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

#: Number of elements by which a weight that was changed behind torch's back is recognised.
_PROBED = 16


class _Kept(NamedTuple):
    """A cast, and the state of the weight that it was made from."""

    version: int
    place: int
    probe: Tensor
    half: Tensor


_kept = WeakTensorKeyDictionary()


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)``, kept for the next call if the weight is frozen and on a CPU.

    A weight that has changed since is cast again. Changes through ``weight.data``, which torch does not count (as in
    merging an adapter), are recognised by a sample of its elements.
    """
    frozen = not weight.requires_grad and type(weight) in (Tensor, nn.Parameter) and not weight.is_inference()
    if weight.dtype == dtype or not frozen or weight.device.type != "cpu":
        return weight.to(dtype)
    with torch.inference_mode(False), torch.no_grad():  # so that any later pass can use it
        values = weight.detach()
        probe = values.flatten()[:: max(1, values.numel() // _PROBED)]
        kept: _Kept | None = _kept.get(weight)
        state = (weight._version, weight.data_ptr())
        if kept is None or state != kept[:2] or kept.half.dtype != dtype or not torch.equal(probe, kept.probe):
            kept = _kept[weight] = _Kept(*state, probe.clone(), values.to(dtype))
    return kept.half


def cast_once(model: nn.Module) -> None:
    """Lets the linear layers of a model keep the casts of their frozen weights; their outputs stay the same."""
    for layer in model.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """The forward pass of ``nn.Linear``."""
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        # Autocast itself keeps the casts of trained weights, and leaves float64 as it is.
        weight = cast(weight, dtype) if _casts(weight) else weight
        bias = cast(bias, dtype) if bias is not None and _casts(bias) else bias
    return F.linear(x, weight, bias)


def _casts(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and not weight.requires_grad
