"""The folder of shipped configs, ``experiments/``, and its files by their bare names.

In a checkout or an editable install it is beside the package; in a wheel it is ``halos_pl/experiments``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "experiments"

#: The folder. The one inside the package comes first: beside an installed package, it would be someone else's.
EXPERIMENTS = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent / "experiments"
#: Settings that every fit starts from.
BASE = EXPERIMENTS / "base.yaml"
#: One row per shipped objective: formula, needs, verdicts. Written by ``halos check --all --write``.
OBJECTIVES_TABLE = EXPERIMENTS / "objectives.json"
_SUFFIXES = (".yaml", ".yml")


class PresetError(ValueError):
    """A name that matches no config, or two."""


def objectives() -> dict[str, Path]:
    """The shipped objectives, by name."""
    return {path.stem: path for path in sorted((EXPERIMENTS / "objectives").glob("*.yaml"))}


def presets() -> dict[str, Path]:
    """All shipped configs, by path below ``experiments/`` without suffix: ``base``, ``data/shp`` ..."""
    files = sorted(EXPERIMENTS.rglob("*.yaml"))
    names = {path.relative_to(EXPERIMENTS).with_suffix("").as_posix(): path for path in files}
    return {name: path for name, path in names.items() if "/results/" not in name}


def is_shipped(path: str | Path) -> bool:
    """Whether a file is in ``experiments/``."""
    return EXPERIMENTS in Path(path).resolve().parents


def shipped_name(path: str) -> str:
    """The name of a shipped config, which any folder and machine knows; another path as it is."""
    return next((name for name, file in presets().items() if file.resolve() == Path(path).resolve()), path)


def config_file(name: str, shipped: dict[str, Path], option: str) -> Path:
    """The config file with this path or name.

    Args:
        name: path, or bare name of a shipped config. A bare name also finds ``NAME.yaml`` in the working folder.
        shipped: shipped configs by name.
        option: option with this value, for the error.

    Raises:
        PresetError: if the name is both a file and a shipped config, or neither.
    """
    if not name:
        raise PresetError(f"{option} has no value; give the path or name of a config")
    path = Path(name)
    files = [path] if path.is_file() or path.is_fifo() or path.is_char_device() else []
    if path.suffix not in _SUFFIXES:
        files += [file for file in (path.with_name(f"{path.name}{ending}") for ending in _SUFFIXES) if file.is_file()]
    candidates = [*files, *([shipped[name]] if name in shipped else [])]
    if len(candidates) > 1:
        raise PresetError(
            f"{option} {name} is ambiguous: it is {' and '.join(map(str, candidates))}; give the path of the one you"
            f" mean (./{files[0]})"
        )
    if candidates:
        return candidates[0]
    if path.is_dir():
        raise PresetError(f"{option} {name} is a folder; name a file in it")
    raise PresetError(f"{option} {name}: no such file (relative to {Path.cwd()}){hint(path, shipped)}")


def hint(path: str | Path, shipped: Collection[str]) -> str:
    """A clause for an error about a missing file, with the shipped config that was probably meant; may be empty."""
    path = Path(path)
    parts = path.parts[path.parts.index("experiments") + 1 :] if "experiments" in path.parts else path.parts
    bare = Path(*parts).with_suffix("").as_posix() if parts else ""
    exact = [name for name in shipped if bare in (name, f"objectives/{name}")]
    if exact:
        return f"; a config of that name is shipped with halos_pl: use {exact[0]}"
    near = _near(bare, shipped)
    return f"; did you mean {near}?" if near else ""


def _near(name: str, candidates: Iterable[str]) -> str:
    by_end = {candidate.rpartition("/")[2]: candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.rpartition("/")[2].lower(), by_end, n=1, cutoff=0.6)
    return by_end[matches[0]] if matches else ""


def shipped_paths(value: Any) -> Any:
    """Replaces ``experiments/...`` with the full path of the shipped file, unless the working folder has that file.

    Args:
        value: plain data. ``experiments/rule.py:function`` is such a path as well.
    """
    if isinstance(value, dict):
        return {key: shipped_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shipped_paths(part) for part in value]
    if not isinstance(value, str) or not value.startswith(f"{EXPERIMENTS.name}/"):
        return value
    file, colon, function = value.partition(":")
    shipped = EXPERIMENTS.parent / file
    return f"{shipped}{colon}{function}" if shipped.is_file() and not Path(file).exists() else value
