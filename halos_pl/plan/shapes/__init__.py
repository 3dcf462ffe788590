"""Configs of models by name, folder or file; the YAML files in this folder make the models of the paper work offline.

Each file has the hub names of a model, its source, the published number of parameters and the keys of its
``config.json`` that determine shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from halos_pl.common.type_words import near
from halos_pl.common.yaml_files import read_yaml
from halos_pl.plan.error import PlanError
from halos_pl.policy.adapters import chain
from halos_pl.policy.source import config_place
from halos_pl.policy.spec import ModelError, ModelSpec, reason

_KEYS = {"names", "source", "parameters", "config"}


@dataclass(frozen=True)
class Shape:
    """The architecture of a model.

    Attributes:
        config: Config of transformers.
        source: Origin of the facts.
        parameters: Published number of parameters; None if unknown.
    """

    config: Any
    source: str
    parameters: int | None = None


def shipped() -> dict[str, Path]:
    """The files in this folder, by the hub names of their models."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return {name: path for path in files for name in read_yaml(path)[0]["names"]}


def read_shape(path: str | Path) -> Shape:
    """The shape in a YAML file: ``config``, and optionally ``names``, ``source`` and ``parameters``.

    Raises:
        PlanError: if it cannot be read or is not a shape, naming file and key.
        YAMLFileError: if it is not YAML.
    """
    try:
        content, lines = read_yaml(path)
    except OSError as error:
        raise PlanError(
            f"{path}: the shape cannot be read ({error.strerror}); name a YAML file with the keys of the model's"
            " config.json under config"
        ) from error
    if unknown := sorted(content.keys() - _KEYS):
        place = f"{path}:{lines.get((unknown[0],), 1)}"
        raise PlanError(f"{place}: a shape has no key {unknown[0]}; it has {', '.join(sorted(_KEYS))}")
    settings = content.get("config")
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise PlanError(f"{path}: config must be a mapping with model_type and the other keys of config.json")
    kind = settings["model_type"]
    if kind not in CONFIG_MAPPING:
        line = lines.get(("config", "model_type"), 1)
        guess = near(kind, CONFIG_MAPPING)
        raise PlanError(
            f"{path}:{line}: transformers {transformers.__version__} has no model_type {kind}; "
            + (f"did you mean {guess}?" if guess else "copy that of the model's config.json")
        )
    try:
        config = AutoConfig.for_model(**settings)
    except Exception as error:  # each architecture checks its settings in its own way
        raise PlanError(f"{path}: config: {reason(error)}") from error
    parameters = content.get("parameters")
    if parameters is not None and not isinstance(parameters, int):
        raise PlanError(f"{path}:{lines[('parameters',)]}: parameters is {parameters!r}; it must be a whole number")
    return Shape(config, " ".join(str(content.get("source") or path).split()), parameters)


def shape_of(spec: ModelSpec) -> Shape:
    """The shape of a model by its ``config.json``, or by a file of this folder. Reads no weights.

    Raises:
        ModelError: if there is no such model, or it is neither in the cache nor reachable.
    """
    files = shipped()
    if spec.path not in files:
        spec, _ = chain(spec)  # the base of an adapter
    if spec.path in files and not Path(spec.path).is_dir():
        shape = read_shape(files[spec.path])
        return Shape(shape.config, f"{files[spec.path].name}: {shape.source}", shape.parameters)
    place, gguf_file = config_place(spec)
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code, "revision": spec.revision or "main"}
    try:
        if gguf_file is not None:
            return Shape(AutoConfig.from_pretrained(place, gguf_file=gguf_file, **options), f"{place}/{gguf_file}")
        return Shape(AutoConfig.from_pretrained(place, **options), f"config.json of {spec.path}")
    except Exception as error:  # a foreign or broken file can raise anything
        raise ModelError(
            f"{spec.path}: its config.json is neither in a local folder nor in the cache, and the hub cannot be reached"
            f" ({reason(error)}); give a local folder, or the model's shape with --shape FILE (shipped:"
            f" {', '.join(files)})"
            if not Path(place).is_dir()
            else f"{spec.path}: its config.json cannot be read ({reason(error)})"
        ) from error
