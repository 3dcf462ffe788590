"""Differences between model families: only this file reads attributes that vary between models of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Config keys with the coefficients of auxiliary losses.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "z_loss_coefficient")
#: Config keys of factors and caps that some models apply to their logits.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def base_model(model: nn.Module) -> Any:
    """The model of transformers, unwrapped from its peft model if any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def text_config(model: nn.Module) -> Any:
    """The config of the language model, also in a multimodal model."""
    config = base_model(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The layers and the head of a causal language model, including their adapters."""
    base = base_model(model)
    head = base.get_output_embeddings()
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base.base_model if decoder is None or decoder is head else decoder, head  # some call their head decoder


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward method of the model of transformers takes an argument."""
    forward: Any = base_model(model).forward  # a peft model takes anything and passes it on
    return argument in inspect.signature(forward).parameters


def logit_change(model: nn.Module) -> str | None:
    """The setting by which a model changes its logits, such as a soft cap; None for unchanged logits."""
    config = text_config(model)
    return next((name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)), None)


def hidden_limit(model: nn.Module, windows: set[int | None]) -> str | None:
    """A limit of a model's attention that only its mask expresses, so that an attention function cannot know it.

    Args:
        model: Causal language model.
        windows: Sliding windows that its layers passed to their attention.
    """
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or []
    if getattr(config, "attention_chunk_size", None) is not None or "chunked_attention" in kinds:
        return "its attention is chunked"
    window = getattr(config, "sliding_window", None)
    used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    hidden = window and used and window not in windows
    return f"only its mask expresses the sliding window of {window}" if hidden else None


class Positions(NamedTuple):
    """The positions of a model.

    Attributes:
        most: Number of positions the model was trained with; None without a limit.
        hard: Whether the model cannot compute more than these.
        alike: Length in tokens of a batch's longest row up to which its rows are independent of each other; None if
            they always are.
    """

    most: int | None
    hard: bool
    alike: int | None


def positions(model: nn.Module) -> Positions:
    """The positions of a causal language model."""
    config = text_config(model)
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *(kind for kind in rotary.values() if isinstance(kind, dict))]  # for all layers, or by kind
    long = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    alike = None
    if long:
        alike = long[0].get("original_max_position_embeddings") or config.original_max_position_embeddings
    dynamic = any(kind.get("rope_type") == "dynamic" for kind in kinds)
    most = getattr(config, "max_position_embeddings", None)
    return Positions(most or None, not rotary, most if dynamic else alike)


def vocabulary_size(model: nn.Module) -> int:
    """Number of token ids with an embedding."""
    return int(base_model(model).get_input_embeddings().weight.shape[0])


def rotary_frequencies(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yields the rotary frequencies, which no checkpoint contains: (module, name of the buffer, values).

    transformers keeps them in float32 whatever the model's dtype; rounding them would change the model.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            values = module._buffers.get(name)
            if name.endswith("inv_freq") and values is not None and values.dtype == torch.float32:
                yield module, name, values


def layer_parts(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the parts of each layer without attention."""
    layers = [layer for part in base_model(model).modules() if isinstance(part, nn.ModuleList) for layer in part]
    for part in (part for layer in layers for part in layer.children()):
        # transformers numbers its attention modules, so that each finds its part of the cache.
        if not any(hasattr(module, "layer_idx") for module in part.modules()):
            yield part


def auxiliary_losses(model: nn.Module) -> dict[str, Any]:
    """The settings by which a config enables auxiliary losses, such as the load balancing of experts.

    (Fedus et al. 2022, "Switch Transformers", eq. 4.)
    """
    config = text_config(model)
    coefficients = {name: getattr(config, name) for name in _COEFFICIENTS if getattr(config, name, None)}
    if getattr(config, "output_router_logits", False):
        return {"output_router_logits": True, **coefficients} if coefficients else {}
    return {name: value for name, value in coefficients.items() if name.startswith("z_")}  # these are always added


def experts_per_token(model: nn.Module) -> int | None:
    """Number of experts that a router chooses for each token; None for a model that returns no router logits."""
    count = getattr(base_model(model), "num_experts_per_tok", None)  # as in transformers' own load-balancing loss
    return int(count) if count and accepts(model, "output_router_logits") else None


def _is_noise(name: str) -> bool:
    return any(word in name for word in ("dropout", "layerdrop", "jitter")) or name.endswith(("pdrop", "_drop"))


def switch_noise_off(model: nn.Module) -> dict[str, float]:
    """Sets dropout and router jitter to 0, in the modules and in the config, which attention code reads.

    The reference has no noise, so a noisy policy would differ from it before the first step.

    Returns:
        The previous values in the config, which belong in an exported model.
    """
    config: Any = model.config
    before = {name: value for name, value in vars(config).items() if isinstance(value, float) and _is_noise(name)}
    for name in before:
        setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and _is_noise(name):
                setattr(module, name, 0.0)
    return before
