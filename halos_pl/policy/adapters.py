"""peft adapters: which layers a new one is put on, models that are themselves adapters, several adapters as one."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from halos_pl.cache import cache_root
from halos_pl.policy.source import ADAPTER_CONFIG, source_of
from halos_pl.policy.spec import LoRASpec, ModelError, ModelSpec, reason

#: Before the names of the base model's modules in an adapter's file.
_BELOW = "base_model.model."
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk or on the hub.

    Attributes:
        spec: what it is loaded from.
        config: peft's, as its ``adapter_config.json`` says.
    """

    spec: ModelSpec
    config: PeftConfig


def chain(spec: ModelSpec) -> tuple[ModelSpec, list[Adapter]]:
    """The whole model that ``spec`` goes back to, and the adapters that are put on it one after the other.

    Raises:
        ModelError: where an adapter does not say what it is an adapter of, or what it says is not there.
    """
    adapters: list[Adapter] = []
    seen = set()
    while (config := _config_of(spec)) is not None:
        seen.add(_place(spec))
        base = str(config.base_model_name_or_path or "")
        following = replace(spec, path=base, revision=config.revision, gguf_file=None)
        adapters.insert(0, Adapter(spec, config))
        if not base or _place(following) in seen:
            raise ModelError(
                f"{spec.path} is an adapter, but {ADAPTER_CONFIG} names {repr(base) if base else 'nothing'} as its base"
                " model; write the name or the absolute path of that model into base_model_name_or_path there"
            )
        try:
            source_of(following, weights=False)
        except ModelError as error:
            raise lost(spec, base, error) from error
        spec = following
    return spec, adapters


def lost(spec: ModelSpec, base: str, why: Exception) -> ModelError:
    """What is wrong with an adapter whose base cannot be loaded."""
    cleared = Path(base).is_relative_to(cache_root())
    start = "Load the GGUF model that it was converted from, to convert it again; or if" if cleared else "If"
    return ModelError(
        f"{spec.path} is an adapter of {base}, which cannot be loaded: {why}. {start} it has moved, write its"
        f" place into base_model_name_or_path in {Path(spec.path) / ADAPTER_CONFIG}"
    )


def _place(spec: ModelSpec) -> str:
    return str(Path(spec.path).resolve()) if Path(spec.path).is_dir() else spec.path


def _config_of(spec: ModelSpec) -> Any:
    """The configuration of the adapter that ``spec`` names; None for a whole model."""
    source = source_of(spec, weights=False)
    folder = Path(source)
    # A folder may hold a whole model and an adapter of it: then its own weights are the base.
    if folder.is_dir() and (folder / "config.json").is_file() and _has_weights(folder):
        if (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(
                f"{spec.path} holds a whole model and an adapter, and loaders differ in what they make of that; move"
                " one of them into a folder of its own"
            )
        return None
    try:
        path = find_adapter_config_file(source, revision=None if folder.is_dir() else spec.revision)
        if path is None:
            return None
        config: Any = PeftConfig.from_pretrained(str(Path(path).parent))
    except Exception as error:  # whatever a broken file leads to
        if not folder.exists() and isinstance(error, HFValidationError):
            raise ModelError(
                f"{spec.path}: there is no such folder, and no hub model can have that name; name a folder by its"
                " absolute path, or a model by OWNER/NAME"
            ) from error
        raise ModelError(f"{spec.path}: its {ADAPTER_CONFIG} cannot be read ({reason(error)})") from error
    if folder.is_dir() and not any((folder / name).is_file() for name in _WEIGHTS):
        raise ModelError(f"{spec.path} holds {ADAPTER_CONFIG}, but none of {', '.join(_WEIGHTS)}; is it complete?")
    return config


def _has_weights(folder: Path) -> bool:
    return any(True for pattern in ("model*.safetensors*", "pytorch_model*") for _ in folder.glob(pattern))


def with_tokenizer(spec: ModelSpec) -> ModelSpec:
    """What to load the tokenizer from: an adapter's folder may have none, its base then has."""
    base, adapters = chain(spec)
    for adapter in reversed(adapters):
        folder = Path(source_of(adapter.spec, weights=False))
        if not folder.is_dir():
            found = find_file(adapter.spec, "tokenizer_config.json")
        else:
            found = any(True for pattern in _TOKENIZER for _ in folder.glob(pattern))
        if found:
            return adapter.spec
    return base


def find_file(spec: ModelSpec, name: str) -> bool:
    """Whether a repository of the hub has a file."""
    from transformers.utils.hub import cached_file

    options: Any = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    return cached_file(spec.path, name, revision=spec.revision, **options) is not None


def weights_of(adapter: Adapter) -> dict[str, Tensor]:
    """The weights in an adapter's file, by the names that peft gives them there; no pickle is executed."""
    source = source_of(adapter.spec)
    options: Any = {} if Path(source).is_dir() else {"revision": adapter.spec.revision}
    return load_peft_weights(source, device="cpu", **options)


def merge(model: Any, adapter: Adapter) -> Any:
    """The model with the weights of an adapter merged into its own.

    Raises:
        ModelError: where that is not possible, or its file does not hold what it should.
    """
    path, config = adapter.spec.path, adapter.config
    base = config.base_model_name_or_path
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ModelError(
            f"{path} is an adapter of the kind {PeftType(config.peft_type).value}, which adds to the prompt and not to"
            " the weights: it cannot be merged into the model, to train that further"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ModelError(f"{path} is an adapter for the task {config.task_type}, not for a causal language model")
    try:
        weights = weights_of(adapter)
        _resize(model, weights, path)
        config.base_model_name_or_path = None  # peft warns where it is not the name that the model goes by
        # Initial values are drawn, and then replaced.
        with torch.random.fork_rng(devices=[]):
            found: Any = get_peft_model(model, config)
        result: Any = set_peft_model_state_dict(found, weights)
        own = (f".{found.base_model.prefix}", ".modules_to_save.")
        missing = sorted(name for name in result.missing_keys if any(part in name for part in own))
        unexpected = sorted(name for name in result.unexpected_keys if not _is_twice(weights, name))
        if missing or unexpected:
            what = [("lacks", missing), ("holds, for no layer of the model,", unexpected)]
            raise ModelError("; ".join(f"it {verb} {names[0]}, {len(names)} in all" for verb, names in what if names))
        if tied := tied_target(found):
            raise ModelError(
                f"it has weights of its own for {tied}, which is tied to the model's other end, so that it"
                " cannot be merged; untie them first"
            )
        merged = found.merge_and_unload()
    except Exception as error:  # peft and torch raise what they like for a file that does not fit
        raise ModelError(f"{path}, an adapter of {base}, cannot be used: {reason(error)}") from error
    return merged.requires_grad_(True)  # peft has frozen them


def _is_twice(weights: dict[str, Tensor], name: str) -> bool:
    """Whether peft has saved a module by two names, as it does with one that was resized and trained as a whole."""
    shorter = name.replace(".modules_to_save.", ".")
    return shorter != name and name in weights and shorter in weights and torch.equal(weights[name], weights[shorter])


def _resize(model: Any, weights: dict[str, Tensor], path: str) -> None:
    """Gives the model as many rows of its vocabulary as the adapter was trained with.

    Raises:
        ModelError: where the adapter was trained with others, but does not hold them.
    """
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {id(module): name for name, module in model.named_modules()}
    rows: dict[str, int] = {}
    whole: dict[str, bool] = {}
    for end, module in ends.items():
        if module is None:
            continue
        place = f"{_BELOW}{names[id(module)]}."
        kept = (f"{place}weight", f"{place}base_layer.weight", f"{place}modules_to_save.weight")
        whole[end] = any(name in weights for name in kept)
        found = [weights[name].shape[0] for name in kept if name in weights]
        found += [weights[name].shape[1] for name in (f"{place}lora_embedding_A",) if name in weights]
        found += [weights[name].shape[0] for name in (f"{place}lora_B.weight",) if name in weights]
        rows.update((end, n) for n in found if n != module.weight.shape[0])
    if not rows:
        return
    tied = len(whole) == 2 and ends["embedding"].weight is ends["head"].weight
    most = max(rows.values())
    if len(set(rows.values())) > 1 or not (any(whole.values()) if tied else all(whole.values())):
        raise ModelError(
            f"it was trained with a vocabulary of {most} tokens, its base has"
            f" {ends['embedding'].weight.shape[0]}, and it does not hold both the embedding and the head of that"
            " size; save the base with its resized embedding, and name that as base_model_name_or_path"
        )
    model.resize_token_embeddings(most, mean_resizing=False)


def tied_target(model: Any) -> str | None:
    """What of embedding and head an adapter has been put on, where both are one matrix."""
    base = model.get_base_model()
    ends = {"the embedding": base.get_input_embeddings(), "the head": base.get_output_embeddings()}
    # An adapter wraps a layer and calls it its base layer.
    inner = [getattr(end, "base_layer", end) for end in ends.values() if end is not None]
    if len(inner) < 2 or inner[0].weight is not inner[1].weight:
        return None
    return next((name for name, end in ends.items() if hasattr(end, "base_layer")), None)


def with_lora(model: Any, lora: LoRASpec) -> Any:
    """A peft model with a new adapter around ``model``.

    Raises:
        ModelError: where a name among its targets is no layer's.
    """
    _check_targets(model, lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            found = get_peft_model(model, config)
    except ValueError as error:
        if part := re.match(r"Target module (\w+)", str(error)):  # followed by all that is in it
            raise ModelError(
                f"model.policy.lora.target_modules: {lora.target_modules!r} means a {part[1]} too, on which no adapter"
                f" can be put; name layers: {', '.join(_layers(model))}"
            ) from error
        raise ModelError(f"model.policy.lora: {reason(error)}") from error
    if tied := tied_target(found):
        raise ModelError(
            f"model.policy.lora.target_modules: {tied} is tied to the model's other end, so that what"
            " is trained of one could not be merged without changing the other; leave it out"
        )
    return found


def _layers(model: nn.Module) -> list[str]:
    """The last parts of the names of all layers whose weight is a matrix."""
    matrices = {name.rpartition(".weight")[0] for name, p in model.named_parameters() if p.ndim == 2}
    return sorted({name.rpartition(".")[2] for name in matrices if ".lora_" not in name})


def _check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """peft refuses only targets of which none is a layer's name."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):  # all-linear, or a regular expression
        try:
            wrong = [] if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise ModelError(
                f"model.policy.lora.target_modules: {targets!r} is no regular expression ({error}); give a list of"
                " names of layers, or all-linear"
            ) from error
    else:
        wrong = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if wrong:
        layers = _layers(model)
        known = [*layers, "all-linear"] if isinstance(targets, str) else layers
        near = {close for t in wrong for close in difflib.get_close_matches(t, known)}
        raise ModelError(
            f"model.policy.lora.target_modules: no layer of the model is called {', '.join(map(repr, wrong))};"
            f" there is {', '.join(sorted(near) or known)}"
        )


# -- several adapters as one ----------------------------------------------------------------------------

Weights = dict[str, Tensor]


def combine(model: Any, adapters: list[tuple[Any, Weights]], policy: Any) -> Any:
    """One adapter on ``model`` that is the sum of several LoRA adapters, put on it one after the other.

    W + s1 B1 A1 + s2 B2 A2 is W + [s1 B1, s2 B2] [A1; A2]. A layer with a lower rank than the highest gets zeros, so
    that one rank and one scale hold for all layers.

    Args:
        model: the model below all of them.
        adapters: peft's configuration and weights of each; the last one was trained.
        policy: what was trained, a peft model: the model below it has the earlier adapters merged in.

    Returns:
        a peft model, with the weights of ``policy`` to within rounding.

    Raises:
        ModelError: where the sum is not what was trained, because one is no plain LoRA adapter.
    """
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for config, weights in adapters:
        for name, (a, b) in _factors(config, weights).items():
            factors.setdefault(name, []).append((a, b))
    stacked = {
        name: (torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], dim=1)) for name, own in factors.items()
    }
    rank = max(a.shape[0] for a, _ in stacked.values())
    weights = {}
    for name, (a, b) in stacked.items():
        embedding = isinstance(model.get_submodule(name), nn.Embedding)
        keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        spare = rank - a.shape[0]
        weights[f"{_BELOW}{name}.{keys[0]}"] = nn.functional.pad(a, (0, 0, 0, spare))
        weights[f"{_BELOW}{name}.{keys[1]}"] = nn.functional.pad(b, (0, spare))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_short(model, set(stacked)), task_type="CAUSAL_LM", inference_mode=True
    )
    made: Any = get_peft_model(model, config)
    try:
        result: Any = set_peft_model_state_dict(made, weights)
    except RuntimeError as error:  # sizes
        raise ModelError("one of them was put on layers of another size, as after a resized vocabulary") from error
    if result.unexpected_keys:
        raise ModelError(f"the adapters do not fit the model: {result.unexpected_keys[0]}")
    _check_sum(made, policy)
    return made


def _factors(config: Any, weights: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer, the scale multiplied into B.

    Raises:
        ModelError: where there is more than these.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        if key.endswith(".base_layer.weight"):
            continue  # peft copies an adapted embedding or head into the file; the sum is compared with what it holds
        found = re.fullmatch(re.escape(_BELOW) + r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
        if config.peft_type != PeftType.LORA or found is None:
            raise ModelError(f"one of the kind {PeftType(config.peft_type).value} holds {key.removeprefix(_BELOW)}")
        parts.setdefault(found[1], {})[found[2]] = value.float()
    factors = {}
    for name, own in parts.items():
        rank = own["A"].shape[0]
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        factors[name] = (own["A"], own["B"] * (alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    return factors


def _short(model: nn.Module, names: set[str]) -> list[str]:
    """The last parts of ``names`` where these say the same, for a config that people read."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == names else names)


@torch.no_grad()
def _check_sum(made: Any, policy: Any) -> None:
    """Compares the weights of two peft models with their adapters, and so finds whatever else an adapter does."""

    def weight(model: Any, name: str) -> Tensor:
        place, _, what = name.rpartition(".")
        layer = model.get_base_model().get_submodule(place)
        value: Tensor = getattr(getattr(layer, "base_layer", layer), what).float()
        adapted = isinstance(layer, LoraLayer) and what == "weight"
        return value + layer.get_delta_weight("default").float() if adapted else value

    rounding = max(5e-6, 4 * torch.finfo(next(policy.parameters()).dtype).eps)
    for name, _ in policy.get_base_model().named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        theirs, ours = weight(policy, name), weight(made, name)
        if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > rounding * float(theirs.abs().max()):
            raise ModelError(f"one of them changes {name} in another way than by a low-rank sum")
