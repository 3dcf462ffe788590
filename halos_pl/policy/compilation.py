"""Compiles the layers of a model with ``torch.compile``."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from halos_pl.policy.architecture import attention_function, blocks, experts_per_token, layer_parts


def compiles_whole(model: nn.Module, device: str) -> bool:
    """Whether whole layers are compiled.

    On a CPU, attention sees other lengths in each step and is not worth compiling around. In a mixture of experts,
    transformers replaces methods of the layers to read the router's logits.

    Args:
        model: Causal language model.
        device: Type of its device.
    """
    return device == "cuda" and experts_per_token(model) is None


def compile_layers(model: nn.Module, *, whole: bool, backend: str = "inductor") -> None:
    """Compiles the layers of a model on their first call, for any number of tokens.

    Args:
        model: Causal language model; layers that are compiled already are compiled anew.
        whole: Whether to compile whole layers, around their attention function; otherwise, their parts without
            attention.
        backend: Backend of ``torch.compile``.
    """
    layers, parts = blocks(model), layer_parts(model)
    for part in (*layers, *parts):
        part._compiled_call_impl = None
    if whole:
        _keep_out(attention_function(model))
    for part in layers if whole else parts:
        part.compile(dynamic=True, backend=backend)


def _keep_out(attention: str) -> None:
    """Keeps an attention function out of compiled graphs: it is a kernel, and its lengths change in each step."""
    function = ALL_ATTENTION_FUNCTIONS.get(attention)
    if function is not None and not getattr(function, "_torchdynamo_disable", False):
        ALL_ATTENTION_FUNCTIONS.register(attention, torch.compiler.disable(function))
