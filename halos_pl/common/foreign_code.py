"""Finds code that a run's ``config.yaml`` makes Python execute: classes of other packages, a model's own code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from halos_pl.common.messages import plain
from halos_pl.common.yaml_files import YAMLFileError, read_yaml

#: Packages whose classes are not reported.
KNOWN = ("halos_pl", "value_functions", "torch", "lightning", "pytorch_lightning", "transformers", "peft")


def model_of_config(path: Path) -> dict[str, Any]:
    """The ``model:`` part of a run's config; code of other packages in it is reported on stderr.

    Raises:
        OSError: if the file cannot be read.
        YAMLFileError: if it is not the config of a run.
    """
    model = read_yaml(path)[0].get("model")
    if not isinstance(model, dict):
        raise YAMLFileError(f"{path} has no model: key; it is not the config of a run")
    if names := sorted(set(foreign(model))):
        _warn(str(path), ", ".join(names))
    return model


def foreign(config: Any) -> Iterator[str]:
    """Classes of a config outside the ``KNOWN`` packages, and models whose own code is executed."""
    if isinstance(config, dict):
        name = config.get("class_path")
        if isinstance(name, str) and "." in name and name.partition(".")[0] not in KNOWN:
            yield name
        if config.get("trust_remote_code"):
            yield f"the code of the model {config.get('path')}"
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from foreign(value)


@cache  # a report reads each config more than once
def _warn(path: str, names: str) -> None:
    print(f"halos: {plain(path)} names code of other packages, which is executed: {plain(names)}", file=sys.stderr)
