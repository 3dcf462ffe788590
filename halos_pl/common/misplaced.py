"""Identifies a file or folder that was passed to the wrong option or command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halos_pl.common.yaml_files import Lines, YAMLFileError, read_yaml

_DATA = (".jsonl", ".json", ".csv", ".parquet", ".arrow")


def misplaced(path: Any) -> str:
    """A clause such as ``rows.jsonl is a data file, which ... take``; empty if the file is not recognised."""
    place = Path(str(path))
    try:
        what = _of_folder(place) if place.is_dir() else _of_file(place) if place.is_file() else ""
    except OSError:  # such as a name that is too long
        return ""
    return f"{place.name} is {what}" if what else ""


def read_config(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """As :func:`halos_pl.common.yaml_files.read_yaml`; the error about a data file names the commands that take it.

    Raises:
        OSError: if the file cannot be read.
        YAMLFileError: if it cannot be used.
    """
    try:
        return read_yaml(path)
    except YAMLFileError as error:
        if _is_data(Path(path)):
            raise YAMLFileError(f"{error}; {misplaced(path)}") from error
        raise


def _is_data(file: Path) -> bool:
    return file.name.removesuffix(".gz").removesuffix(".zst").endswith(_DATA)


def _of_folder(folder: Path) -> str:
    if (folder / "study.yaml").is_file():
        return "the folder of a study, which halos ablate report takes"
    if (folder / "config.yaml").is_file():
        return "the folder of a run, which halos evaluate and halos export take; halos test takes its config.yaml"
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "a model, which halos evaluate and halos fit --model.policy.path take"
    return "a folder"


def _of_file(file: Path) -> str:
    if _is_data(file):
        return "a data file, which halos fit --data.train and halos data inspect take"
    if file.suffix not in (".yaml", ".yml"):
        return ""
    try:
        content = read_yaml(file)[0]
    except YAMLFileError:
        return ""
    if {"arms", "axes", "seeds"} & content.keys():
        return "a study, which halos ablate takes"
    return "a config, which halos fit --config and halos check take"
