"""The code that a run's ``config.yaml`` makes Python import: classes by their dotted names, a model's own code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from halos_pl.common.messages import plain
from halos_pl.common.yaml_files import YAMLFileError, read_yaml

# Their classes are a run's usual parts.
KNOWN = ("halos_pl", "value_functions", "torch", "lightning", "pytorch_lightning", "transformers", "peft")


def model_of_config(path: Path) -> dict[str, Any]:
    """The ``model:`` part of a run's config; reports on stderr the code of other packages that it names.

    Raises:
        OSError: where the file cannot be read.
        YAMLFileError: where it is no run's config.
    """
    model = read_yaml(path)[0].get("model")
    if not isinstance(model, dict):
        raise YAMLFileError(f"{path} has no model: part; it is not the config of a run")
    if found := sorted(set(foreign(model))):
        _say(str(path), ", ".join(found))
    return model


def foreign(config: Any) -> Iterator[str]:
    """The classes of a config that are not of ``KNOWN`` packages, and a model whose own code is executed."""
    if isinstance(config, dict):
        name = config.get("class_path")
        if isinstance(name, str) and "." in name and name.partition(".")[0] not in KNOWN:
            yield name
        if config.get("trust_remote_code"):
            yield f"the code of the model {config.get('path')}"
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from foreign(value)


@cache  # a report reads the config of each run more than once
def _say(path: str, names: str) -> None:
    print(f"halos: {plain(path)} names code of other packages, which is executed: {plain(names)}", file=sys.stderr)
