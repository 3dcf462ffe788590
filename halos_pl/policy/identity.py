"""A hash of a model with its adapter."""

from __future__ import annotations

from itertools import chain

from torch import nn

from halos_pl.policy.architecture import base_model, has_adapter
from halos_pl.policy.quantized_weights import plain_parts, quantized_layers
from halos_pl.policy.reference import weights_fingerprint
from halos_pl.policy.store import fingerprint


def model_fingerprint(model: nn.Module) -> str:
    """The :func:`halos_pl.policy.store.fingerprint` of a model with its adapter, if any."""
    if not has_adapter(model):
        return weights_fingerprint(model)
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(model)}
    tensors = (
        (f"{name}{part}", value)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        for part, value in (plain_parts(layers[name]) if name in layers else {"": tensor}).items()
    )
    return fingerprint(tensors, base_model(model).config.to_dict())
