"""Differences between models: only this file reads or sets attributes that not all transformers or peft models have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.pytorch_utils import Conv1D

#: Config keys with the coefficients of auxiliary losses.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "z_loss_coefficient")
#: Config keys of factors and caps that some models apply to their logits.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def base_model(model: nn.Module) -> Any:
    """The transformers model, unwrapped from its peft model, if any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def text_config(model: nn.Module) -> Any:
    """The config of the language model, also in a multimodal model."""
    config = base_model(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The layers and the head of a causal language model, including their adapters."""
    base = base_model(model)
    head = _active(base.get_output_embeddings())
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base.base_model if decoder is None or decoder is head else decoder, head  # some call their head decoder


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward method of the transformers model takes an argument."""
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
        alike: Number of tokens up to which the longest row of a batch does not affect the others; None if it never
            does.
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


def _layers(model: nn.Module) -> list[nn.Module]:
    """All entries of a model's module lists: its layers, and the experts within them."""
    return [layer for part in base_model(model).modules() if isinstance(part, nn.ModuleList) for layer in part]


def _has_attention(part: nn.Module) -> bool:
    """Whether a part contains attention: transformers numbers it, so that each layer finds its part of the cache."""
    return any(hasattr(module, "layer_idx") for module in part.modules())


def layer_parts(model: nn.Module) -> list[nn.Module]:
    """The parts of each layer that contain no attention."""
    return [part for layer in _layers(model) for part in layer.children() if not _has_attention(part)]


def block_names(model: nn.Module) -> list[str]:
    """The names of a model's blocks (its layers), which run one after the other.

    They are the items of the module lists whose classes transformers never splits over devices. If it names none, they
    are the items of the longest module list.
    """
    base = base_model(model)
    classes = set(getattr(base, "_no_split_modules", None) or ())
    lists = {name: part for name, part in base.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    blocks = [name for name, part in lists.items() if {type(block).__name__ for block in part} & classes]
    outer = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    chosen = outer or sorted(lists, key=lambda name: -len(lists[name]))[:1]
    return [f"{name}.{number}" for name in chosen for number in range(len(lists[name]))]


def blocks(model: nn.Module) -> list[nn.Module]:
    """A model's blocks, from attention to feed-forward part (see :func:`block_names`)."""
    base = base_model(model)
    return [base.get_submodule(name) for name in block_names(model)]


def auxiliary_losses(model: nn.Module) -> dict[str, Any]:
    """The settings by which a config enables auxiliary losses, such as the load balancing of experts.

    (Fedus et al. 2022, "Switch Transformers", eq. 4.)
    """
    config = text_config(model)
    coefficients = {name: getattr(config, name) for name in _COEFFICIENTS if getattr(config, name, None)}
    if getattr(config, "output_router_logits", False):
        return {"output_router_logits": True, **coefficients} if coefficients else {}
    return {name: value for name, value in coefficients.items() if name.startswith("z_")}  # added in any case


def experts_per_token(model: nn.Module) -> int | None:
    """Number of experts that a router chooses for each token; None for a model that returns no router logits."""
    count = getattr(base_model(model), "num_experts_per_tok", None)  # as in transformers' own load-balancing loss
    return int(count) if count and accepts(model, "output_router_logits") else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, and restores its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# -- layers ---------------------------------------------------------------------------------------------


def has_adapter(model: nn.Module) -> bool:
    """Whether a model is a peft model."""
    return hasattr(model, "peft_config")


def adapter_off(model: nn.Module) -> Callable[[], AbstractContextManager[None]] | None:
    """A context in which the adapter of a peft model has no effect; None if the model has no adapter."""
    return getattr(model, "disable_adapter", None)


def is_adapted(layer: Any) -> bool:
    """Whether a peft adapter wraps a layer."""
    return hasattr(layer, "base_layer")


def without_adapter(layer: nn.Module) -> Any:
    """The layer that a peft adapter wraps; a plain layer itself."""
    return getattr(layer, "base_layer", layer)


def is_adapter_weight(name: str) -> bool:
    """Whether a peft model has added the parameter with this name to its base, or trains it in place of one there."""
    return ".lora_" in name or ".modules_to_save." in name


def name_in_base(name: str) -> str:
    """The name of a peft model's parameter in the model without the adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def is_copied(module: nn.Module) -> bool:
    """Whether a peft model trains a copy of a module, one of its ``modules_to_save``."""
    return hasattr(module, "original_module")


def _active(module: Any) -> Any:
    """The module that computes: a trained copy, or the original while the adapter is off; a plain module itself."""
    if module is None or not is_copied(module):
        return module
    name = next((name for name in module.active_adapters if name in module.modules_to_save), None)
    return module.original_module if module.disable_adapters or name is None else module.modules_to_save[name]


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """A model's linear layers, with those of its adapter, without the head.

    Raises:
        TypeError: for a mixture of experts, as each token goes through only a few of them.
    """
    decoder, _ = decoder_and_head(model)
    if any(p.dim() == 3 and "expert" in name for name, p in decoder.named_parameters()):
        raise TypeError("each token goes through only a few of the model's experts")
    originals = {id(part) for m in decoder.modules() if is_copied(m) for part in m.original_module.modules()}
    return [m for m in decoder.modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in originals]


def attention_width(model: nn.Module) -> int:
    """Layers * heads * width of a head."""
    config = text_config(model)
    heads: int = config.num_attention_heads
    return config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)  # type: ignore[no-any-return]


# -- attention ------------------------------------------------------------------------------------------


def attention_function(model: nn.Module) -> str:
    """The name of a model's attention function, such as ``sdpa``."""
    return base_model(model).config._attn_implementation  # type: ignore[no-any-return]


@contextmanager
def use_attention(model: nn.Module, name: str | None) -> Iterator[None]:
    """Switches a model to the attention function ``name`` (None: no change) and back at the end."""
    config = base_model(model).config
    before = config._attn_implementation
    config._attn_implementation = name or before
    try:
        yield
    finally:
        config._attn_implementation = before


# -- noise ----------------------------------------------------------------------------------------------


def _is_noise(name: str) -> bool:
    return any(word in name for word in ("dropout", "layerdrop", "jitter")) or name.endswith(("pdrop", "_drop"))


def noise_settings(config: Any) -> dict[str, float]:
    """The probabilities of dropout and the jitter of experts' routers in a config, by name."""
    return {name: value for name, value in vars(config).items() if isinstance(value, float) and _is_noise(name)}


def set_noise(model: nn.Module, settings: dict[str, float]) -> None:
    """Writes :func:`noise_settings` into a model's config, for the folder that it is saved to."""
    for name, value in settings.items():
        setattr(base_model(model).config, name, value)


def switch_noise_off(model: nn.Module) -> None:
    """Sets dropout and the jitter of experts' routers to 0, in modules and in the config, which attention code reads.

    The reference has none, so a policy with noise would differ from it before its first step.
    """
    set_noise(model, dict.fromkeys(noise_settings(base_model(model).config), 0.0))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and _is_noise(name):
                setattr(module, name, 0.0)


# -- precision ------------------------------------------------------------------------------------------


def dtype_of_config(config: Any) -> str | None:
    """The dtype that a config names, such as ``bfloat16``; None if it names none."""
    dtype = getattr(config, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def quantisation(model: nn.Module) -> str | None:
    """The name of the method by which a model's weights are quantised; None if they are not.

    transformers dequantises some formats, and then removes the quantisation from the config.
    """
    return quantisation_of_config(model.config)


def quantisation_of_config(config: Any) -> str | None:
    """The name of the method by which a config says that the weights are quantised; None if it names none."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method or "unknown method"))


def keeps_quantised(model: nn.Module) -> bool:
    """Whether a model computes with quantised weights, so that an adapter can be trained on top of them."""
    return bool(getattr(model, "is_quantized", False))


def forget_quantisation(model: Any) -> None:
    """Marks a model with dequantised float32 weights as a plain one; otherwise it could not be saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config.dtype = torch.float32


# -- generation -----------------------------------------------------------------------------------------


def eos_setting(model: nn.Module) -> Any:
    """The ``eos_token_id`` of a model's generation settings: an id, a list of ids, None, or whatever its file has."""
    return getattr(getattr(base_model(model), "generation_config", None), "eos_token_id", None)


def eos_ids(model: nn.Module) -> list[int]:
    """The ids at which a model's own generation settings stop."""
    ids = eos_setting(model)
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def add_eos_ids(model: nn.Module, ids: Sequence[int]) -> list[int]:
    """Adds ids at which a model's own generation settings stop; returns those that were missing."""
    present = eos_ids(model)
    missing = [token for token in ids if token not in present]
    if missing:
        base_model(model).generation_config.eos_token_id = [*present, *missing]
    return missing


@contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """Sets a model's own generation settings aside.

    transformers takes top_k, repetition_penalty and the like from them unless the caller sets them. The samples would
    then not follow the model's distribution, as KL estimates assume.
    """
    # Under an adapter generate() copies the outer settings to the inner model, so the inner ones matter.
    inner = base_model(model)
    settings = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = settings


def empty_cache(model: nn.Module) -> DynamicCache | None:
    """A cache of keys and values whose rows can be repeated; None for a model that needs another kind of cache."""
    if not base_model(model)._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=text_config(model))
    copied = all(
        isinstance(x, DynamicLayer) and not isinstance(x, LinearAttentionCacheLayerMixin) for x in cache.layers
    )
    return cache if copied and cache.layers else None


# -- name -----------------------------------------------------------------------------------------------


def set_name(model: Any, name: str) -> None:
    """Sets the name or path that a model goes by in messages and in the config of an adapter."""
    model.name_or_path = model.config._name_or_path = name
