"""peft adapters: adding a new one, and merging a stored one into its base."""

from __future__ import annotations

import difflib
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from halos_pl.cache import cache_root
from halos_pl.policy.architecture import is_adapted, is_copied, without_adapter
from halos_pl.policy.quantized_weights import dequantized, has_quantized_weights
from halos_pl.policy.sharding import whole_shapes
from halos_pl.policy.source import ADAPTER_CONFIG, source_of
from halos_pl.policy.spec import LoRASpec, ModelError, ModelSpec, reason

#: Prefix of the base model's module names in an adapter's file.
BELOW = "base_model.model."
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Adapter:
    """A stored adapter.

    Attributes:
        spec: its folder or hub name.
        config: peft's configuration, from ``adapter_config.json``.
    """

    spec: ModelSpec
    config: PeftConfig


def chain(spec: ModelSpec) -> tuple[ModelSpec, list[Adapter]]:
    """The base model of ``spec``, and the adapters on top of it, from the base up.

    Raises:
        ModelError: the base of an adapter is not named, or does not exist.
    """
    adapters: list[Adapter] = []
    seen = set()  # an adapter might name itself
    while (config := _config_of(spec)) is not None:
        seen.add(_place(spec))
        base = str(config.base_model_name_or_path or "")
        adapters.insert(0, Adapter(spec, config))
        below = replace(spec, path=base, revision=config.revision, gguf_file=None) if base else None
        if below is None or _place(below) in seen:
            raise ModelError(
                f"{spec.path} is an adapter, but its {ADAPTER_CONFIG} names {repr(base) if base else 'no model'} as its"
                " base; set base_model_name_or_path there to the name or the absolute path of that model"
            )
        try:
            source_of(below, weights=False)
        except ModelError as error:
            raise lost(spec, base, error) from error
        spec = below
    return spec, adapters


def lost(spec: ModelSpec, base: str, why: Exception) -> ModelError:
    """The error for an adapter whose base cannot be loaded."""
    in_cache = Path(base).is_relative_to(cache_root())
    start = "Load the GGUF model that it was converted from, to convert it again; or if" if in_cache else "If"
    return ModelError(
        f"{spec.path} is an adapter of {base}, which cannot be loaded: {why}. {start} it has moved, set"
        f" base_model_name_or_path in {Path(spec.path) / ADAPTER_CONFIG} to its new path"
    )


def _place(spec: ModelSpec) -> str:
    return str(Path(spec.path).resolve()) if Path(spec.path).is_dir() else spec.path


def _config_of(spec: ModelSpec) -> Any:
    """The configuration of an adapter; None for a whole model."""
    source = source_of(spec, weights=False)
    folder = Path(source)
    # The weights in a folder with both may be the adapter's base, or have the adapter merged in.
    if folder.is_dir() and (folder / "config.json").is_file() and _has_weights(folder):
        if (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{spec.path} contains both a whole model and an adapter, which loaders treat differently; move one of"
                " them to another folder"
            )
        return None
    try:
        path = find_adapter_config_file(source, revision=None if folder.is_dir() else spec.revision)
        if path is None:
            return None
        config: Any = PeftConfig.from_pretrained(str(Path(path).parent))
    except Exception as error:  # a broken file can raise anything
        if not folder.exists() and isinstance(error, HFValidationError):
            raise ModelError(
                f"{spec.path}: there is no such folder, and it cannot be a name on the hub; give the absolute path of"
                " a folder, or OWNER/NAME"
            ) from error
        raise ModelError(f"{spec.path}: its {ADAPTER_CONFIG} cannot be read ({reason(error)})") from error
    if folder.is_dir() and not any((folder / name).is_file() for name in _WEIGHTS):
        raise ModelError(f"{spec.path} contains {ADAPTER_CONFIG}, but none of {', '.join(_WEIGHTS)}; is it complete?")
    return config


def _has_weights(folder: Path) -> bool:
    return any(True for pattern in ("model*.safetensors*", "pytorch_model*") for _ in folder.glob(pattern))


def with_tokenizer(spec: ModelSpec) -> ModelSpec:
    """The model or adapter to load the tokenizer from: the last adapter that has one, or the base."""
    base, adapters = chain(spec)
    for adapter in reversed(adapters):
        folder = Path(source_of(adapter.spec, weights=False))
        if not folder.is_dir():
            has_tokenizer = find_file(adapter.spec, "tokenizer_config.json")
        else:
            has_tokenizer = any(True for pattern in _TOKENIZER for _ in folder.glob(pattern))
        if has_tokenizer:
            return adapter.spec
    return base


def find_file(spec: ModelSpec, name: str) -> bool:
    """Whether a repository on the hub has a file."""
    from transformers.utils.hub import cached_file

    options: Any = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    return cached_file(spec.path, name, revision=spec.revision, **options) is not None


def weights_of(adapter: Adapter) -> dict[str, Tensor]:
    """The weights in an adapter's file, by their names there. Executes no pickle."""
    source = source_of(adapter.spec)
    options: Any = {} if Path(source).is_dir() else {"revision": adapter.spec.revision}
    return load_peft_weights(source, device="cpu", **options)


def merge(model: Any, adapter: Adapter) -> Any:
    """The model with an adapter merged into its weights.

    Raises:
        ModelError: the adapter cannot be merged, or its file does not match its configuration.
    """
    path, config = adapter.spec.path, adapter.config
    base = config.base_model_name_or_path
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ModelError(
            f"{path} is an adapter of type {PeftType(config.peft_type).value}, which changes the prompt instead of the"
            " weights, so it cannot be merged into the model for further training"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ModelError(f"{path} is an adapter for the task {config.task_type}, not for a causal language model")
    try:
        weights = weights_of(adapter)
        _resize(model, weights, path)
        config.base_model_name_or_path = None  # peft warns if it differs from the model's name
        # peft draws initial values, which are then replaced.
        with torch.random.fork_rng(devices=[]):
            adapted: Any = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(adapted, weights)
        parts = (f".{adapted.base_model.prefix}", ".modules_to_save.")
        missing = sorted(name for name in result.missing_keys if any(part in name for part in parts))
        unexpected = sorted(name for name in result.unexpected_keys if not _is_twice(weights, name))
        if missing or unexpected:
            faults = [f"it lacks {missing[0]} ({len(missing)} in all)"] if missing else []
            if unexpected:
                faults.append(f"no layer of the model matches {unexpected[0]} ({len(unexpected)} in all)")
            raise ModelError("; ".join(faults))
        if tied := tied_target(adapted):
            raise ModelError(
                f"it has separate weights for {tied}, but the model's embedding and head are tied, so it cannot be"
                " merged; untie them first"
            )
        merged = adapted.merge_and_unload()
    except Exception as error:  # peft and torch raise various errors for a file that does not fit
        raise ModelError(f"{path}, an adapter of {base}, cannot be used: {reason(error)}") from error
    return merged.requires_grad_(True)  # peft froze its weights


def _is_twice(weights: dict[str, Tensor], name: str) -> bool:
    """Whether peft saved a module under two names: one that was both resized and fully trained."""
    shorter = name.replace(".modules_to_save.", ".")
    return shorter != name and name in weights and shorter in weights and torch.equal(weights[name], weights[shorter])


def _resize(model: Any, weights: dict[str, Tensor], path: str) -> None:
    """Resizes the model's vocabulary to the size that the adapter was trained with.

    Raises:
        ModelError: the sizes differ, but the adapter does not contain the resized embedding and head.
    """
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {id(module): name for name, module in model.named_modules()}
    rows, whole = dict[str, int](), dict[str, bool]()
    for end, module in ends.items():
        if module is None:
            continue
        place = f"{BELOW}{names[id(module)]}."
        saved = (f"{place}weight", f"{place}base_layer.weight", f"{place}modules_to_save.weight")
        whole[end] = any(name in weights for name in saved)
        sizes = [weights[name].shape[0] for name in saved if name in weights]
        sizes += [weights[name].shape[1] for name in (f"{place}lora_embedding_A",) if name in weights]
        sizes += [weights[name].shape[0] for name in (f"{place}lora_B.weight",) if name in weights]
        rows.update((end, n) for n in sizes if n != module.weight.shape[0])
    if not rows:
        return
    tied, most = len(whole) == 2 and ends["embedding"].weight is ends["head"].weight, max(rows.values())
    if len(set(rows.values())) > 1 or not (any(whole.values()) if tied else all(whole.values())):
        raise ModelError(
            f"it was trained with a vocabulary of {most} tokens, its base has"
            f" {ends['embedding'].weight.shape[0]}, and it does not contain both the embedding and the head of that"
            " size; save the base with its resized embedding, and set base_model_name_or_path to that"
        )
    model.resize_token_embeddings(most, mean_resizing=False)


def tied_target(model: Any) -> str | None:
    """The one of embedding and head that has an adapter or a trained copy, if the two are tied; otherwise None."""
    base = model.get_base_model()
    ends = {"the embedding": base.get_input_embeddings(), "the head": base.get_output_embeddings()}
    inner = [getattr(without_adapter(end), "original_module", without_adapter(end)) for end in ends.values() if end]
    if len(inner) < 2 or inner[0].weight is not inner[1].weight:
        return None
    return next((name for name, end in ends.items() if is_adapted(end) or is_copied(end)), None)


def with_lora(model: Any, lora: LoRASpec) -> Any:
    """Adds a new adapter to ``model``.

    Raises:
        ModelError: a target module is not a layer of the model, or a module cannot be trained whole.
    """
    _check_targets(model, lora.target_modules)
    saved = _modules_to_save(model, lora.modules_to_save or [])
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), whole_shapes(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings|fan_in_fan_out")  # refused; corrected
            torch.manual_seed(torch.initial_seed())
            adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        if part := re.match(r"Target module (\w+)", str(error)):  # the message continues with the whole module
            raise ModelError(
                f"model.policy.lora.target_modules: {lora.target_modules!r} includes a {part[1]}, which cannot have an"
                f" adapter; name layers: {', '.join(_layers(model))}"
            ) from error
        raise ModelError(f"model.policy.lora: {reason(error)}") from error
    if tied := tied_target(adapted):
        key = "modules_to_save" if saved else "target_modules"
        raise ModelError(
            f"model.policy.lora.{key}: the model's embedding and head are tied, so merging an adapter of"
            f" {tied} would change the other as well; leave out {tied}"
        )
    _check_overlap(adapted)
    if lora.use_dora:
        _exact_lengths(adapted)
    return adapted


def check_sharding(spec: ModelSpec, *, half: bool) -> None:
    """Refuses adapters and quantized bases that cannot be sharded over ranks.

    Args:
        spec: specification of the policy.
        half: whether weights are gathered in bfloat16.

    Raises:
        ModelError: naming the setting and the way out.
    """
    for name in ("use_dora", "modules_to_save"):
        if spec.lora is not None and getattr(spec.lora, name):
            raise ModelError(
                f"model.policy.lora.{name} needs the whole weights of a layer, which fsdp2 spreads over the ranks;"
                " leave it out, or choose trainer.strategy ddp"
            )
    if (quantize := spec.quantize) is None:
        return
    if (quantize.method, quantize.bits) != ("bitsandbytes", 4):
        raise ModelError(
            f"model.policy.quantize: weights with {quantize.bits} bits of {quantize.method} cannot be sharded by fsdp2;"
            " choose method bitsandbytes with 4 bits, or trainer.strategy ddp"
        )
    if quantize.storage_dtype != spec.dtype:
        raise ModelError(
            f"model.policy.quantize.storage_dtype is {quantize.storage_dtype or 'uint8'}, but fsdp2 shards only weights"
            f" of one dtype; set it to that of the other weights, {spec.dtype}"
        )
    if half:
        raise ModelError(
            "model.policy.quantize: with trainer.precision bf16-mixed, fsdp2 casts weights to bfloat16, but the"
            " quantized ones are codes; choose trainer.precision 32-true, and model.policy.dtype and"
            " model.policy.quantize.storage_dtype bfloat16"
        )


def _modules_to_save(model: nn.Module, names: list[str]) -> list[str]:
    """The full names of the modules to train whole; peft would match any module whose name ends like one of ``names``.

    Raises:
        ModelError: there is no such module, or it has quantized weights, which cannot be trained.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    saved = []
    for name in names:
        matches = [place for place in modules if place == name or place.endswith(f".{name}")]
        if not matches:
            parts = sorted(part for part in {place.rpartition(".")[2] for place in modules} if not part.isdigit())
            near = difflib.get_close_matches(name, parts) or parts
            raise ModelError(
                f"model.policy.lora.modules_to_save: the model has no module named {name!r}; choose from"
                f" {', '.join(near)}"
            )
        for place in matches:
            if has_quantized_weights(modules[place]):
                raise ModelError(
                    f"model.policy.lora.modules_to_save: {place} has quantized weights, which cannot be trained; leave"
                    " it out, and adapt its layers with target_modules"
                )
            if not any(True for _ in modules[place].parameters()):
                raise ModelError(f"model.policy.lora.modules_to_save: {place} has no weights; leave it out")
        saved += matches
    return list(dict.fromkeys(saved))


def _check_overlap(adapted: Any) -> None:
    """Refuses to train a module whole inside another one, where peft would copy it twice.

    Raises:
        ModelError: naming the module.
    """
    for name, module in adapted.get_base_model().named_modules():
        inside = [part for part in module.modules() if part is not module] if is_copied(module) else []
        if any(isinstance(part, LoraLayer) or is_copied(part) for part in inside):
            raise ModelError(f"model.policy.lora.modules_to_save: {name} contains others of the list; leave them out")


@torch.no_grad()
def _exact_lengths(adapted: Any) -> None:
    """Computes DoRA's lengths of the weight vectors in the dtype in which the forward pass computes them.

    peft computes the initial ones in the dtype of the weights. In half precision the two differ, so the adapter would
    change the model before its first step.
    """
    layers: list[Any] = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding):  # its lengths are computed in the dtype of the weights
            continue
        for name, length in layer.lora_magnitude_vector.items():
            values = dequantized(base) if has_quantized_weights(base) else base.weight
            values = values.to(layer.lora_A[name].weight.dtype)
            length.weight.data = length.get_weight_norm(values, values.new_zeros(()), layer.scaling[name])


def _layers(model: nn.Module) -> list[str]:
    """The last parts of the names of all layers with a weight matrix."""
    matrices = {name.rpartition(".weight")[0] for name, p in model.named_parameters() if p.ndim == 2}
    return sorted({name.rpartition(".")[2] for name in matrices if ".lora_" not in name})


def _check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Refuses targets that are not layers; peft does so only if none of them is."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):  # all-linear, or a regular expression
        try:
            wrong = [] if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise ModelError(
                f"model.policy.lora.target_modules: {targets!r} is not a regular expression ({error}); give a list of"
                " layer names, or all-linear"
            ) from error
    else:
        wrong = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if wrong:
        layers = _layers(model)
        choices = [*layers, "all-linear"] if isinstance(targets, str) else layers
        near = {close for t in wrong for close in difflib.get_close_matches(t, choices)}
        raise ModelError(
            f"model.policy.lora.target_modules: the model has no layer named {', '.join(map(repr, wrong))};"
            f" choose from {', '.join(sorted(near) or choices)}"
        )
