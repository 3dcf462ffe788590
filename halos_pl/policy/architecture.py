"""What is peculiar to a family of models: attributes that differ between those of transformers are read only here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Coefficients of losses that a config may ask for beside the one that is trained.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "z_loss_coefficient")
#: Factors and caps that some models apply to their head's logits.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def base_model(model: nn.Module) -> Any:
    """The model of transformers, below a peft model where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def text_config(model: nn.Module) -> Any:
    """The config of the part that reads and writes text."""
    config = base_model(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The layers of a causal language model and its head; under an adapter, with it."""
    base = base_model(model)
    head = base.get_output_embeddings()
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base.base_model if decoder is None or decoder is head else decoder, head  # some call their head so


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of the model of transformers takes an argument."""
    forward: Any = base_model(model).forward  # a peft model takes anything and passes it on
    return argument in inspect.signature(forward).parameters


def logit_change(model: nn.Module) -> str | None:
    """The setting by which a model changes its head's logits, such as a soft cap; None where it does not."""
    config = text_config(model)
    return next((name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)), None)


def hidden_limit(model: nn.Module, windows: set[int | None]) -> str | None:
    """What limits a model's attention by its mask alone, so that an attention function does not hear of it.

    Args:
        model: a causal language model.
        windows: the sliding windows that its layers passed to their attention.
    """
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or []
    if getattr(config, "attention_chunk_size", None) is not None or "chunked_attention" in kinds:
        return "its attention goes by chunks"
    window = getattr(config, "sliding_window", None)
    used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return f"its sliding window of {window} is in its mask only" if window and used and window not in windows else None


class Positions(NamedTuple):
    """How many positions a model has.

    Attributes:
        most: positions that it was trained with; None without a limit.
        hard: it cannot compute more than these.
        alike: tokens of a batch's longest row up to which its rows do not depend on each other; None where they never
            do.
    """

    most: int | None
    hard: bool
    alike: int | None


def positions(model: nn.Module) -> Positions:
    """The positions of a causal language model."""
    config = text_config(model)
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *(own for own in rotary.values() if isinstance(own, dict))]  # of all layers, or by their kind
    long = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    alike = None
    if long:
        alike = long[0].get("original_max_position_embeddings") or config.original_max_position_embeddings
    dynamic = any(kind.get("rope_type") == "dynamic" for kind in kinds)
    most = getattr(config, "max_position_embeddings", None)
    return Positions(most or None, not rotary, most if dynamic else alike)


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids a model has an embedding for."""
    return int(base_model(model).get_input_embeddings().weight.shape[0])


def rotary_frequencies(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The frequencies of rotary positions, which no checkpoint holds: (module, name of the buffer, values).

    transformers keeps them in float32 whatever the model's dtype; rounded, they would be those of another model.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            values = module._buffers.get(name)
            if name.endswith("inv_freq") and values is not None and values.dtype == torch.float32:
                yield module, name, values


def layer_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of each layer that hold no attention."""
    layers = [layer for part in base_model(model).modules() if isinstance(part, nn.ModuleList) for layer in part]
    for part in (part for layer in layers for part in layer.children()):
        # transformers numbers its attention modules, so that they find their part of a cache.
        if not any(hasattr(module, "layer_idx") for module in part.modules()):
            yield part


def auxiliary_losses(model: nn.Module) -> dict[str, Any]:
    """The settings by which a config asks for further losses, such as the load balancing of experts.

    (Fedus et al. 2022, "Switch Transformers", eq. 4.)
    """
    config = text_config(model)
    coefficients = {name: getattr(config, name) for name in _COEFFICIENTS if getattr(config, name, None)}
    if getattr(config, "output_router_logits", False):
        return {"output_router_logits": True, **coefficients} if coefficients else {}
    return {name: value for name, value in coefficients.items() if name.startswith("z_")}  # added in any case


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts a router chooses for each token; None for a model that returns no logits of a router."""
    count = getattr(base_model(model), "num_experts_per_tok", None)  # transformers computes its own such loss with it
    return int(count) if count and accepts(model, "output_router_logits") else None


def _is_noise(name: str) -> bool:
    return any(word in name for word in ("dropout", "layerdrop", "jitter")) or name.endswith(("pdrop", "_drop"))


def switch_noise_off(model: nn.Module) -> dict[str, float]:
    """Sets dropout and the jitter of experts' routers to 0: of modules, and what attention code reads off the config.

    The reference has none, so a policy with noise would differ from it before its first step.

    Returns:
        what the config said, which belongs in an exported model.
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
