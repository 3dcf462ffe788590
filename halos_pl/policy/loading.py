"""Loading policies: a hub name, a local folder or a GGUF file; dropout off; LoRA."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halos_pl.cache import cache_root

#: Written last into a converted folder: the length of each of its files.
_COMPLETE = "complete.json"


class ModelError(ValueError):
    """A model that cannot be loaded, or not be used as asked."""


@dataclass
class LoRASpec:
    """A low-rank adapter (peft): only it is trained.

    Attributes:
        r: rank.
        alpha: scale; the adapter's output is multiplied with alpha / r.
        dropout: probability of dropout before the adapter, in training.
        target_modules: names of the layers that get one, or ``all-linear``.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class ModelSpec:
    """Which model, and how it is loaded.

    Attributes:
        path: a hub name, a local folder, or ``package:NAME`` for a folder that an installed Python package
            ships.
        gguf_file: a GGUF file in that folder. It may be left out where the folder holds exactly one and no
            ``config.json``.
        revision: branch, tag or commit of a hub name.
        dtype: of the weights. Log-probs and losses are computed in float32 whatever it is.
        attn_implementation: as transformers takes it.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time.
        compile: put the normalisation and feed-forward parts of each layer through ``torch.compile``: one compilation
            at the start, which takes half a minute and a C++ compiler (on a GPU Triton). Worth trying on a GPU; on a
            CPU it was measured not to pay.
        dropout: keep the model's dropout. Off, every dropout probability is set to 0 (GPT-2 ships with 0.1),
            so that rewards start at exactly 0.
        lora: train an adapter instead of the whole model.
        trust_remote_code: run code that the model's repository ships.
    """

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    dropout: bool = False
    lora: LoRASpec | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
        if self.compile and not any(map(shutil.which, compilers)):
            raise ModelError(
                f"model.policy.compile is true, but torch.compile needs a C++ compiler, and none of"
                f" {', '.join(compilers)} is here; install one, or say compile: false"
            )


def _folder_of_package(name: str) -> Path:
    # Found, not imported: the package may be a plug-in of a program that is not installed.
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a parent package is missing, or this is no name of a package
        found = None
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"model.policy.path: no package {name!r} is installed here; pip install it, or name a folder")
    return Path(found.submodule_search_locations[0])


def _resolve(spec: ModelSpec) -> tuple[str, str | None]:
    """The name or folder to load from, and the GGUF file in it, None for the usual format."""
    path = spec.path
    if path.startswith("package:"):
        path = str(_folder_of_package(path.removeprefix("package:")))
    folder = Path(path)
    if not folder.is_dir():
        if spec.gguf_file is None and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
            raise ModelError(
                f"model.policy.path: {path} is no folder here, and no name on the hub (those are OWNER/NAME)"
            )
        return path, spec.gguf_file
    files = sorted(p.name for p in folder.glob("*.gguf"))
    if spec.gguf_file is not None:
        if spec.gguf_file not in files:
            raise ModelError(f"{folder} holds no {spec.gguf_file}; its GGUF files: {', '.join(files) or 'none'}")
        return path, spec.gguf_file
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return path, None
    if len(files) != 1:
        if (folder / "checkpoints").is_dir():
            raise ModelError(f"{folder} is the folder of a run, not of a model: say halos export {folder} FOLDER first")
        raise ModelError(
            f"{folder} holds neither config.json nor exactly one GGUF file (found: {', '.join(files) or 'none'});"
            " name another folder, or say which with gguf_file"
        )
    return path, files[0]


@cache
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != _COMPLETE}


def _intact(folder: Path) -> bool:
    """Whether every file that was written is there, in its length."""
    try:
        return bool(json.loads((folder / _COMPLETE).read_text(encoding="utf-8")) == _sizes(folder))
    except (OSError, ValueError):
        return False


def _converted(folder: Path, gguf_file: str) -> Path:
    """The Hugging Face folder with a GGUF file's dequantised weights, made on first use and then kept.

    Kept by content below ``$HALOS_CACHE`` (default ``~/.cache/halos_pl``): reading it takes a second where
    dequantising takes a quarter of a minute. It appears under its name only when it is complete; one that
    lacks a file or part of one is made anew.
    """
    target = cache_root() / f"gguf-{_digest(folder / gguf_file)[:32]}"
    if _intact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process converts, those beside it wait; none takes away a folder that another has just made.
    with FileLock(target.with_suffix(".lock")):
        if _intact(target):
            return target
        shutil.rmtree(target, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            _convert(folder, gguf_file, beside)
            (beside / _COMPLETE).write_text(json.dumps(_sizes(beside)), encoding="utf-8")
            os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return target


def _convert(folder: Path, gguf_file: str, to: Path) -> None:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    except Exception as error:  # the reader lets through whatever a broken file leads to: struct.error, KeyError ...
        raise ModelError(
            f"{folder / gguf_file} cannot be read as a GGUF model ({type(error).__name__}: {error});"
            " get it again, or choose an architecture that transformers reads from GGUF"
        ) from error
    # The weights are plain float32 now; the marks of quantisation would keep them from being saved.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config.dtype = torch.float32
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def _source(spec: ModelSpec) -> str:
    path, gguf_file = _resolve(spec)
    if gguf_file is None:
        return path
    if not Path(path).is_dir():
        raise ModelError(f"{path}: a GGUF file is read from a local folder; download {gguf_file} first")
    return str(_converted(Path(path), gguf_file))


def _loaded(loader: Any, spec: ModelSpec, **options: Any) -> Any:
    source = _source(spec)
    try:
        return loader.from_pretrained(
            source, revision=spec.revision or "main", trust_remote_code=spec.trust_remote_code, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = (
            "check that the folder is complete"
            if Path(source).is_dir()
            else "it is no folder here either; check the name and the connection, or name a local folder"
        )
        raise ModelError(f"{spec.path} could not be loaded: {first}; {hint}") from error


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model.

    Raises:
        ModelError: where there is none.
    """
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, spec)
    if tokenizer.pad_token_id is None:
        # Padding is masked wherever it occurs, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """The causal language model of ``spec``, on the CPU; a peft model around it under LoRA.

    The result depends on ``spec`` and, for a new adapter, on the seed last given to torch, not on how many
    random numbers have been drawn since.

    Raises:
        ModelError: where it cannot be loaded, or some of its weights are not in the files.
    """
    model: Any
    model, info = _loaded(
        AutoModelForCausalLM,
        spec,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=spec.attn_implementation,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        # transformers only warns, and leaves random numbers in their place.
        raise ModelError(
            f"{spec.path} lacks {len(info['missing_keys'])} weights of a {type(model).__name__}"
            f" ({', '.join(sorted(info['missing_keys'])[:3])}, ...); is it a causal language model, and complete?"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        model = _merged(model, spec)
    before = getattr(model, "noise_of_config", {})  # of the model below an adapter that was merged
    model.noise_of_config = {} if spec.dropout else _switch_noise_off(model) | before
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.lora is not None:
        config = LoraConfig(
            r=spec.lora.r,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=spec.lora.target_modules,
            task_type="CAUSAL_LM",
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch.initial_seed())
                model = get_peft_model(model, config, revision=spec.revision)
        except ValueError as error:
            raise ModelError(f"model.policy.lora: {error}") from error
        if tied := _tied_target(model):
            raise ModelError(
                f"model.policy.lora.target_modules: {tied} has the same weights as the model's other end, so that what"
                " is trained of one could not be merged without changing the other; leave it out"
            )
    return model


def _merged(model: Any, spec: ModelSpec) -> Any:
    """The plain model that a folder of an adapter stands for.

    A new adapter would take the place of the one that is there, and without one nothing would be left to train.
    """
    name = next(iter(model.peft_config.values())).base_model_name_or_path
    base = load_model(replace(spec, path=name, revision=None, gguf_file=None, lora=None))
    found: Any = PeftModel.from_pretrained(base, _source(spec), revision=spec.revision or "main")  # type: ignore[arg-type]
    if tied := _tied_target(found):
        raise ModelError(
            f"{spec.path} is an adapter of {name} with weights of its own for {tied}, which has the same weights as the"
            " model's other end, so that it cannot be merged; untie them first, or use another adapter"
        )
    rank_zero_info(f"halos: {spec.path} is an adapter of {name}; it is merged into its weights")
    merged = found.merge_and_unload().requires_grad_(True)  # peft has frozen them
    merged.name_or_path = merged.config._name_or_path = spec.path  # what a further adapter names as its base
    return merged


def _tied_target(model: Any) -> str | None:
    """What of embedding and head an adapter has been put on, where both are one matrix."""
    base = base_model(model)
    ends = {"the embedding": base.get_input_embeddings(), "the head": base.get_output_embeddings()}
    # An adapter wraps a layer and calls it its base layer.
    inner = [getattr(end, "base_layer", end) for end in ends.values() if end is not None]
    if len(inner) < 2 or inner[0].weight is not inner[1].weight:
        return None
    return next((name for name, end in ends.items() if hasattr(end, "base_layer")), None)


def check_length(model: nn.Module, longest: int) -> None:
    """Says where rows are longer than a model has positions.

    Args:
        model: the policy.
        longest: tokens of the longest row, prompt and completion.

    Raises:
        ModelError: where positions have weights, so that there are none for such a row; and where rotary ones change
            with the longest row of a batch, so that the log-probs of a row would depend on what is beside it. Of other
            rotary ones, which can be computed for any place, only a warning is given.
    """
    config = base_model(model).config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    given = getattr(config, "rope_parameters", None) or {}
    ropes = [given, *(own for own in given.values() if isinstance(own, dict))]  # of all layers, or by their kind
    for rope in ropes:
        if rope.get("rope_type") == "longrope":
            start = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
            if longest > start:
                raise ModelError(
                    f"the data have rows of {longest} tokens; beyond {start} this model computes all rows of a batch"
                    f" in another way, so that they would depend on each other: set data.max_length to {start} or less"
                )
    if not most or longest <= most:
        return
    said = f"the data have rows of {longest} tokens, and the model {most} positions"
    mend = f"set data.max_length to {most} or less"
    if not given or any(rope.get("rope_type") == "dynamic" for rope in ropes):
        raise ModelError(f"{said}: {mend}")
    rank_zero_warn(f"halos: {said}: what it does beyond them it has not been trained to; {mend}")


def base_model(model: nn.Module) -> Any:
    """The model of transformers, below a peft model where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def compile_layers(model: nn.Module) -> None:
    """Has the parts of each layer that hold no attention compiled when they are first called.

    Attention is left out: it goes over trees of other lengths in every step, and would be compiled anew each time.
    """
    base = base_model(model)
    layers = [layer for part in base.modules() if isinstance(part, nn.ModuleList) for layer in part]
    for part in (part for layer in layers for part in layer.children()):
        # transformers numbers its attention modules, so that they find their part of a cache.
        if part._compiled_call_impl is None and not any(hasattr(module, "layer_idx") for module in part.modules()):
            part.compile(dynamic=True)


def _is_noise(name: str) -> bool:
    return any(word in name for word in ("dropout", "layerdrop", "jitter")) or name.endswith(("pdrop", "_drop"))


def _switch_noise_off(model: nn.Module) -> dict[str, float]:
    """Sets dropout and the jitter of experts' routers to 0: of modules, and what attention code reads off the config.

    The reference has none, so that a policy with it would differ from it before its first step.

    Returns:
        what the config said, which belongs into what is exported.
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


def frequencies(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The frequencies of rotary positions, which no checkpoint holds: (module, name of the buffer, values).

    transformers keeps them in float32 whatever the model's dtype; rounded, they would be those of another model.
    """
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            values = module._buffers.get(name)
            if name.endswith("inv_freq") and values is not None and values.dtype == torch.float32:
                yield module, name, values
