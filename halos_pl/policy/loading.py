"""Loads models from a hub name, a local folder or a GGUF file, without dropout, with or without LoRA."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from jinja2 import TemplateSyntaxError
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halos_pl.policy import adapters, quantization, shared
from halos_pl.policy.architecture import (
    base_model,
    dtype_of_config,
    noise_settings,
    quantisation_of_config,
    set_name,
    switch_noise_off,
)
from halos_pl.policy.intact import check_loaded, untrainable
from halos_pl.policy.scalar_head import empty_classifier
from halos_pl.policy.sharding import Sharding, equalize, shard
from halos_pl.policy.source import is_gguf, source_of
from halos_pl.policy.spec import LoRASpec, ModelError, ModelSpec, QuantizeSpec, reason

__all__ = [
    "LoRASpec",
    "ModelError",
    "ModelSpec",
    "QuantizeSpec",
    "check_files",
    "check_reward_model",
    "load_model",
    "load_pretrained",
    "load_tokenizer",
    "stored_config",
    "stored_dtype",
    "stored_noise",
    "stored_quantisation",
]


def load_pretrained(loader: Any, spec: ModelSpec, *, weights: bool, **options: Any) -> Any:
    """The result of a loader's ``from_pretrained`` for ``spec``.

    Args:
        loader: class of transformers or peft.
        spec: what to load, and from where.
        weights: whether the weights will be read.
        options: further arguments of the loader.

    Raises:
        ModelError: it cannot be loaded; says why and what to do in one line.
    """
    source = source_of(spec, weights=weights)
    try:
        return loader.from_pretrained(
            source, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code, **options
        )
    except Exception as error:  # a foreign or broken file can raise anything: UnpicklingError, KeyError, RuntimeError
        if "couldn't connect" in str(error) and not Path(source).is_dir():
            offline = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
            raise ModelError(
                f"{spec.path} could not be loaded: it is not a local folder, not in the cache, and {offline}; check the"
                " name and the connection, or name a local folder"
            ) from error
        if "trust_remote_code" in str(error):
            hint = "set model.policy.trust_remote_code to true if you trust that code"
        elif "attention implementation" in str(error) or "FlashAttention" in str(error):
            hint = "set model.policy.attn_implementation to eager"
        elif Path(source).is_dir():
            hint = "check that the folder is complete and its files are intact"
        else:
            hint = "it is not a local folder either; check the name and the connection, or name a local folder"
        raise ModelError(f"{spec.path} could not be loaded: {reason(error)}; {hint}") from error


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; for an adapter without a tokenizer, that of its base. Loads no weights.

    Raises:
        ModelError: it cannot be loaded.
    """
    holder = adapters.with_tokenizer(spec)
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, holder, weights=False)
    template = Path(spec.path) / "chat_template.jinja"
    if holder is not spec and template.is_file():  # the adapter's own, with the tokenizer of its base
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    _check_template(tokenizer, spec)
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_empty(spec: ModelSpec) -> PreTrainedModel | None:
    """The model of ``spec`` without its weights, on the meta device; None if it is an adapter to be merged.

    Raises:
        ModelError: it cannot be loaded.
    """
    if spec.lora is not None or adapters.chain(spec)[1]:
        return None
    model: PreTrainedModel = load_pretrained(
        AutoModelForCausalLM,
        spec,
        weights=True,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=spec.attn_implementation,
        device_map="meta",
    )
    return model


def _check_template(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> None:
    """Refuses a chat template that is not valid Jinja; otherwise the error would name a row of the data."""
    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{spec.path}: its chat template is not valid Jinja (line {error.lineno}: {error.message}); fix it, or"
            " download it again"
        ) from error
    except Exception:  # it refuses this message, but may accept those of the data
        return


def load_model(spec: ModelSpec, sharding: Sharding | None = None) -> PreTrainedModel:
    """The causal language model of ``spec``; with ``spec.lora``, a peft model around it.

    It is loaded straight onto torch's default device: within a fit, that of the Trainer.

    An adapter in ``spec.path`` is merged into its base; with ``spec.quantize``, the base is quantized. The result
    depends on ``spec`` and, for a new adapter, on torch's initial seed, but not on how many random numbers have been
    drawn since.

    Args:
        spec: the model.
        sharding: how to shard it over the ranks; each rank then reads its slice of the files. None: each rank loads
            all of it. A new adapter is not sharded.

    Raises:
        ModelError: it cannot be loaded, or its files and its configuration do not match.
    """
    if sharding is not None and sharding.stored_half:  # FSDP cannot cast a model that it has sharded
        spec = replace(spec, dtype="bfloat16")
    root, chain = adapters.chain(spec)
    _check_quantize(spec, root)
    if sharding is not None:
        adapters.check_sharding(spec, half=sharding.half)
    if sharding is not None and chain:
        rank_zero_info(
            f"halos: {spec.path} is an adapter, so each rank loads the whole of {root.path} to merge it before it is"
            " sharded; merge it into a folder of its own to avoid that"
        )
    try:
        model = _load(root, None if chain else sharding)
    except ModelError as error:
        raise (adapters.lost(chain[0].spec, root.path, error) if chain else error) from error
    for adapter in chain:
        # A new adapter would replace this one; without a new one, there would be nothing to train.
        model = adapters.merge(model, adapter)
        rank_zero_info(f"halos: {adapter.spec.path} is an adapter of {root.path} and is merged into it")
    if chain:
        set_name(model, spec.path)
    if not spec.dropout:
        switch_noise_off(model)
    if sharding is not None and spec.quantize is None:
        shard(model, sharding)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted: PreTrainedModel = model if spec.lora is None else adapters.with_lora(model, spec.lora)
    if sharding is not None and spec.quantize is not None:  # peft needs the attributes of quantized weights
        shard(base_model(adapted), sharding, ignored=[p for p in adapted.parameters() if p.requires_grad])
    if sharding is not None:
        equalize(adapted.parameters())
    return adapted


def load_reference(spec: ModelSpec, sharding: Sharding | None = None) -> PreTrainedModel:
    """A model that is not trained, sharded like the policy.

    Where the policy's weights are gathered in bfloat16, these are stored in it: the same numbers in half the memory.

    Raises:
        ModelError: as in :func:`load_model`.
    """
    if sharding is not None and sharding.half:
        spec = replace(spec, dtype="bfloat16")
    return load_model(spec, None if sharding is not None and sharding.whole_reference else sharding)


def check_files(spec: ModelSpec) -> None:
    """Refuses a model, or an adapter or a quantization of it, by the model's configuration. Reads no weights.

    Raises:
        ModelError: as in :func:`load_model`, for a target module that does not exist, for example.
    """
    if spec.lora is None:
        if method := stored_quantisation(spec):
            raise untrainable(spec, method)
        return
    root, _ = adapters.chain(spec)
    _check_quantize(spec, root)
    try:
        model = _empty(root)
    except ModelError:
        raise
    except Exception:  # some models cannot be built on the meta device
        return
    if spec.quantize is not None:
        quantization.check_layers(model, spec)
        quantization.check_groups(model, spec.quantize)
    adapters.with_lora(model, spec.lora)


def check_reward_model(spec: ModelSpec) -> None:
    """Refuses a model that transformers could not load as a reward model after training. Reads no weights.

    Raises:
        ModelError: naming the reason and the way out.
    """
    config = stored_config(spec)
    if any(str(name).endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ()):
        raise ModelError(
            f"{spec.path} is a reward model already, whose head a run would replace; start from a causal language model"
        )
    empty_classifier(config, spec.path)


def _empty(spec: ModelSpec) -> Any:
    """The model on the meta device, without weights."""
    config = load_pretrained(AutoConfig, spec, weights=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)


def _check_quantize(spec: ModelSpec, root: ModelSpec) -> None:
    """Refuses to quantize a model that is already quantized, or has an adapter. Reads no weights.

    Args:
        spec: specification of the model.
        root: specification of the model below the adapters in ``spec.path``.

    Raises:
        ModelError: naming the reason and the way out.
    """
    if spec.quantize is None:
        return
    quantization.check_package(spec.quantize)
    if root is not spec:
        raise ModelError(
            f"model.policy.quantize: {spec.path} is an adapter of {root.path}, and merging it into quantized weights"
            f" would round it away; run halos export {spec.path} FOLDER, and set model.policy.path to FOLDER"
        )
    if is_gguf(spec):
        raise ModelError(
            f"model.policy.quantize: {spec.path} is a GGUF model, whose weights are already quantized; use the original"
            " model"
        )
    if method := stored_quantisation(spec):
        raise ModelError(
            f"model.policy.quantize: {spec.path} is already quantized ({method}); use the original model, or remove"
            " model.policy.quantize to train an adapter on it"
        )


def stored_dtype(spec: ModelSpec) -> str | None:
    """The dtype in the config of a model, or of an adapter's base; None if it has none."""
    return dtype_of_config(stored_config(spec))


def stored_noise(spec: ModelSpec) -> dict[str, float]:
    """The dropout settings in the config of a model, or of an adapter's base; :func:`load_model` sets them to 0."""
    return noise_settings(stored_config(spec))


def stored_quantisation(spec: ModelSpec) -> str | None:
    """The method by which a model, or an adapter's base, is stored quantized; None if it is not, or is a GGUF file."""
    if is_gguf(spec):  # its conversion takes a while
        return None
    root, _ = adapters.chain(spec)
    return None if is_gguf(root) else quantisation_of_config(load_pretrained(AutoConfig, root, weights=False))


def stored_config(spec: ModelSpec) -> Any:
    """The config of a model, or of an adapter's base. Loads no weights."""
    root, _ = adapters.chain(spec)
    return load_pretrained(AutoConfig, root, weights=False)


def _load(spec: ModelSpec, sharding: Sharding | None) -> Any:
    """The model in a folder or on the hub, checked against its files."""
    model = None if sharding is not None else shared.take(spec)
    return load_base(spec, sharding) if model is None else model


def load_base(spec: ModelSpec, sharding: Sharding | None = None) -> Any:
    """The model in a folder or on the hub, read from its files and checked against them.

    Raises:
        ModelError: as in :func:`load_model`.
    """
    spread: dict[str, Any] = {}
    if spec.quantize is not None:  # sharded afterwards, when it is small
        spread = quantization.loading_options(spec)
    elif sharding is not None and sharding.by_loader:
        spread = {"distributed_config": sharding.distributed_config(_empty(spec))}
        # It warns of rules for other architectures.
        logging.getLogger("transformers.distributed.mixin").setLevel(logging.ERROR)
    model, info = load_pretrained(
        AutoModelForCausalLM,
        spec,
        weights=True,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=spec.attn_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_loaded names them
        **spread,
    )
    check_loaded(model, info, spec, Path(source_of(spec, weights=False)))
    quantization.prepare(model, spec)
    return model
