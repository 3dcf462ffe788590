"""The settings that a checkpoint was trained with, and which of them a resumed run may change.

They are stored in the checkpoint itself, since a config.yaml beside it may have been edited. A setting that differs is
either refused, with both values, or takes effect and is reported.
"""

from __future__ import annotations

import dataclasses
import inspect
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
import yaml
from torch import Tensor, nn

from halos_pl.policy.architecture import is_adapter_weight
from halos_pl.policy.quantized_weights import plain_parts, quantized_layers
from halos_pl.policy.sharding import whole
from halos_pl.training.optim import Change

Settings = dict[str, Any]
"""Values of plain types by dotted key; the value of a class is its name, and its arguments are keys below."""

#: Settings that a resumed run cannot change: it would train with another loss, or another model.
FIXED = (
    "model.policy",
    "model.reference_model",
    "model.reward",
    "model.reference_point",
    "model.value_function",
    "model.feedback",
    "model.reflect_undesirable",
    "model.loss_offset",
    "model.extra_terms",
    "trainer.precision",
    "seed_everything",  # the random state comes from the checkpoint, so another seed would have no effect
)
#: Those among them that change results at most by rounding. The weights behind a path are compared separately.
FREE = tuple(
    f"model.policy.{name}"
    for name in (
        "path",
        "revision",
        "gguf_file",
        "trust_remote_code",
        "attn_implementation",
        "gradient_checkpointing",
        "compile",
        "liger",
    )
)
#: Settings that an evaluation cannot change, as it would measure another model. Others only change how it measures.
MODEL = ("model.policy.lora", "model.policy.quantize", "model.policy.dropout")
#: Paths of files, which do not count as settings of a run.
PLACES = ("run_dir", "ckpt_path", "weights_only", "config", "trainer.default_root_dir", "data.cache_dir")
#: Settings that do not affect a run's results: two runs that differ only in these have the same weights.
ASIDE = (
    "checkpoint",
    "progress",
    "data.num_workers",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.profiler",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
)
#: Settings that are read from the Trainer, since not every run has a config.
TRAINER = (
    "precision",
    "max_steps",
    "max_epochs",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
)
_OF_MODULES = {*vars(nn.Module()), "needs"}


def described(value: Any) -> Any:
    """``value`` in plain types; an object as ``{class_path, init_args}``.

    The arguments of an object are its attributes that are named like its constructor's parameters; all of its
    attributes if one of these is missing. A learned parameter is described by its shape.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum | Path | torch.dtype | timedelta):
        return str(getattr(value, "value", value))
    for plain in (int, float, str):
        if isinstance(value, plain):  # also a subclass, which torch.load would refuse
            return plain(value)
    if isinstance(value, Tensor):
        return list(value.shape) if value.requires_grad or value.numel() > 64 else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, Sequence | set | nn.ModuleList):
        return [described(part) for part in value]
    if inspect.isroutine(value) or isinstance(value, type):
        return _name(value)
    if dataclasses.is_dataclass(value):
        arguments = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        arguments = _arguments(value)
    return {"class_path": _name(type(value)), "init_args": {k: described(v) for k, v in arguments.items()}}


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__name__)}"


def _arguments(value: Any) -> dict[str, Any]:
    try:
        taken = list(inspect.signature(type(value)).parameters.values())
    except ValueError:  # a type that is not written in Python has no signature
        taken = []
    named = [p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    attributes = dict(vars(value)) if hasattr(value, "__dict__") else {}
    if isinstance(value, nn.Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            attributes |= attributes.get(kind, {})
    if all(name in attributes for name in named):
        return {name: attributes[name] for name in named}
    return {
        k: v for k, v in attributes.items() if (k not in _OF_MODULES and not callable(v)) or isinstance(v, nn.Module)
    }


def flat(value: Any, key: str = "") -> Settings:
    """Flattens a tree of settings to dotted keys."""

    def entries(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and "class_path" in value:
            yield key, value["class_path"]
            arguments = value.get("init_args") or {}
            for name, part in arguments.items() if isinstance(arguments, Mapping) else ():
                yield from entries(part, f"{key}.{name}")
        elif isinstance(value, Mapping):
            if key:
                yield key, "given"
            for name, part in value.items():
                yield from entries(part, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
            yield key, [part.get("class_path", "given") if isinstance(part, Mapping) else "list" for part in value]
            for number, part in enumerate(value):
                yield from entries(part, f"{key}.{number}")
        else:
            yield key, value or None if isinstance(value, list | str) else value

    return dict(entries(value, key))


def of_trainer(trainer: Any) -> Settings:
    """The settings of a Trainer that affect a run's results."""
    return {f"trainer.{name}": described(getattr(trainer, name, None)) for name in TRAINER}


def environment(trainer: Any) -> Settings:
    """The hardware and versions that a run uses, which may change its results by rounding."""
    device = trainer.strategy.root_device
    return {
        "ranks": trainer.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }


def differing(saved: Settings, now: Settings) -> list[Change]:
    """The settings that are in both and differ, without the arguments of a replaced class."""
    differences: list[Change] = []
    for key in sorted(saved.keys() & now.keys()):
        if saved[key] != now[key] and not any(key.startswith(f"{change.key}.") for change in differences):
            differences.append(Change(key, saved[key], now[key]))
    return differences


def _below(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def aside(config: Settings, *, wanted: bool) -> Settings:
    """The settings of a config that do not affect its run's results (``wanted``), or those that do."""
    return {k: v for k, v in config.items() if not _below(k, PLACES) and _below(k, ASIDE) is wanted}


def changes(saved: Mapping[str, Any], module: Settings, config: Settings | None) -> list[Change]:
    """The changes that a run makes to the settings in its checkpoint.

    Args:
        saved: ``settings`` of the checkpoint.
        module: settings read from module and Trainer.
        config: settings of the config, which add arguments that objects do not keep; None without a config.
    """
    changed = differing(saved.get("module") or {}, module)
    compared = saved.get("module", {}).keys() & module.keys()
    for change in differing(saved.get("config") or {}, config or {}):
        if change.key not in compared and not _below(change.key, [change.key for change in changed]):
            changed.append(change)
    return changed


def refused(changed: Sequence[Change], *, fitting: bool) -> list[Change]:
    """The changes that a run cannot make: a resumed fit if ``fitting``, otherwise an evaluation."""
    if not fitting:
        return [change for change in changed if _below(change.key, MODEL)]
    return [change for change in changed if _below(change.key, FIXED) and not _below(change.key, FREE)]


def of_file(path: Path) -> Settings:
    """The settings in a run's config.yaml; empty if it cannot be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flat(described(content)) if isinstance(content, dict) else {}


def weights_sample(model: nn.Module) -> Tensor:
    """About 1024 evenly spread weights, without an adapter's: float32, on the CPU."""
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(model)}
    weights = [
        part.detach()
        for name, p in model.named_parameters()
        if not is_adapter_weight(name)
        for part in (plain_parts(layers[name]).values() if name in layers else [p])
    ]
    each = max(1, 1024 // max(1, len(weights)))
    samples = (whole(w).flatten()[:: max(1, w.numel() // each)][:each] for w in weights)
    return torch.cat([sample.float().cpu() for sample in samples])


def same_weights(one: Tensor, other: Tensor) -> bool:
    """Whether two samples come from the same weights, up to the rounding of an adapter merged on another machine."""
    if one.shape != other.shape:
        return False
    return float((~torch.isclose(one, other, rtol=1e-5, atol=1e-8)).float().mean()) < 0.05
