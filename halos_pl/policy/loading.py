"""Loading policies: a hub name, a local folder or a GGUF file; dropout off; LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from jinja2 import TemplateSyntaxError
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halos_pl.policy import adapters
from halos_pl.policy.architecture import switch_noise_off
from halos_pl.policy.intact import check_loaded
from halos_pl.policy.source import source_of
from halos_pl.policy.spec import LoRASpec, ModelError, ModelSpec, reason

__all__ = [
    "LoRASpec",
    "ModelError",
    "ModelSpec",
    "check_lora",
    "load_model",
    "load_tokenizer",
    "stored_dtype",
]


def _loaded(loader: Any, spec: ModelSpec, *, weights: bool, **options: Any) -> Any:
    source = source_of(spec, weights=weights)
    try:
        return loader.from_pretrained(
            source, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code, **options
        )
    except Exception as error:  # a foreign or broken file leads to whatever: UnpicklingError, KeyError, RuntimeError
        if "couldn't connect" in str(error) and not Path(source).is_dir():
            offline = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached"
            raise ModelError(
                f"{spec.path} could not be loaded: it is no folder here, not in the cache, and {offline}; check the"
                " name and the connection, or name a local folder"
            ) from error
        if "trust_remote_code" in str(error):
            hint = "say trust_remote_code: true (model.policy) if you trust that code"
        elif "attention implementation" in str(error) or "FlashAttention" in str(error):
            hint = "say attn_implementation: eager (model.policy)"
        elif Path(source).is_dir():
            hint = "check that the folder is complete and its files undamaged"
        else:
            hint = "it is no folder here either; check the name and the connection, or name a local folder"
        raise ModelError(f"{spec.path} could not be loaded: {reason(error)}; {hint}") from error


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model; an adapter without one has that of its base.

    Raises:
        ModelError: where there is none.
    """
    holder = adapters.with_tokenizer(spec)
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, holder, weights=False)
    template = Path(spec.path) / "chat_template.jinja"
    if holder is not spec and template.is_file():  # an adapter's, beside the tokenizer of its base
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    _check_template(tokenizer, spec)
    if tokenizer.pad_token_id is None:
        # Padding is masked wherever it occurs, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> None:
    """Refuses a chat template that is not valid Jinja, before every row of the data is blamed for it."""
    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{spec.path}: its chat template is not valid Jinja (line {error.lineno}: {error.message}); mend it, or"
            " get it again"
        ) from error
    except Exception:  # it refuses these messages; those of the data are another matter
        return


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """The causal language model of ``spec``, on the CPU; a peft model around it under LoRA.

    A model that is itself an adapter is merged into its base. The result depends on ``spec`` and, for a new adapter, on
    the seed last given to torch, not on how many random numbers have been drawn since.

    Raises:
        ModelError: where it cannot be loaded, or its files and its configuration do not match.
    """
    root, chain = adapters.chain(spec)
    try:
        model = _whole(root)
    except ModelError as error:
        raise (adapters.lost(chain[0].spec, root.path, error) if chain else error) from error
    for adapter in chain:
        # A new adapter would take the place of the one that is there, and without one nothing would be left to train.
        model = adapters.merge(model, adapter)
        rank_zero_info(f"halos: {adapter.spec.path} is an adapter of {root.path}; it is merged into its weights")
    if chain:
        model.name_or_path = model.config._name_or_path = spec.path
    model.noise_of_config = {} if spec.dropout else switch_noise_off(model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    whole: PreTrainedModel = model if spec.lora is None else adapters.with_lora(model, spec.lora)
    return whole


def check_lora(spec: ModelSpec) -> None:
    """Refuses an adapter that could not be put on a model, by the model's configuration: no weights are read.

    Raises:
        ModelError: as :func:`load_model` would, for a name among its targets that is no layer's, say.
    """
    if spec.lora is None:
        return
    root, _ = adapters.chain(spec)
    config = _loaded(AutoConfig, root, weights=False)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=root.trust_remote_code)
    except Exception:  # a model that is made on a real device only
        return
    adapters.with_lora(model, spec.lora)


def stored_dtype(spec: ModelSpec) -> str | None:
    """The dtype that the config of a model, or of an adapter's base, names; None where it names none."""
    root, _ = adapters.chain(spec)
    found = getattr(_loaded(AutoConfig, root, weights=False), "dtype", None)
    return None if found is None else str(found).removeprefix("torch.")


def _whole(spec: ModelSpec) -> Any:
    """The model of a folder or hub name with all weights in it."""
    model, info = _loaded(
        AutoModelForCausalLM,
        spec,
        weights=True,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=spec.attn_implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named below
    )
    check_loaded(model, info, spec, Path(source_of(spec, weights=False)))
    return model
