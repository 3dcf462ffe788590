"""Hashes of a model with its adapter, and of its tokenizer."""

from __future__ import annotations

import hashlib
import json
from itertools import chain

from torch import nn
from transformers import PreTrainedTokenizerBase

from halos_pl.data.cache_key import tokenizer_state
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


def identity(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of a model, and of its tokenizer with the chat template, by name."""
    state = json.dumps(tokenizer_state(tokenizer), default=str)
    return {"model": model_fingerprint(model), "tokenizer": hashlib.sha256(state.encode()).hexdigest()[:32]}
