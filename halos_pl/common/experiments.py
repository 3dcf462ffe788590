"""The folder of shipped configs, ``experiments/``, and its files by their bare names.

In a checkout or an editable install it lies beside the package, in a wheel it is ``halos_pl/experiments``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = _PACKAGE / "experiments"

#: The folder. A checkout's is asked for second: what lies beside an installed package belongs to others.
EXPERIMENTS = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent / "experiments"
#: The settings that every fit starts from.
BASE = EXPERIMENTS / "base.yaml"
#: A row for each shipped objective: formula, needs, verdicts. ``halos check --all --write`` writes it.
OBJECTIVES_TABLE = EXPERIMENTS / "objectives.json"
_SUFFIXES = (".yaml", ".yml")


class PresetError(ValueError):
    """A name stands for no config, or for two."""


def objectives() -> dict[str, Path]:
    """The shipped objectives, by name."""
    return {path.stem: path for path in sorted((EXPERIMENTS / "objectives").glob("*.yaml"))}


def presets() -> dict[str, Path]:
    """All shipped configs by their path below ``experiments/``, without the ending: ``base``, ``data/shp`` ..."""
    files = sorted(EXPERIMENTS.rglob("*.yaml"))
    names = {path.relative_to(EXPERIMENTS).with_suffix("").as_posix(): path for path in files}
    return {name: path for name, path in names.items() if "/results/" not in name}


def is_shipped(path: str | Path) -> bool:
    """Whether a file is one of ``experiments/``."""
    return EXPERIMENTS in Path(path).resolve().parents


def config_file(name: str, shipped: dict[str, Path], option: str) -> Path:
    """The file that an option's value stands for.

    Args:
        name: a file, or the bare name of a shipped config. A bare name also finds ``NAME.yaml`` in the working folder.
        shipped: the configs that ship, by name.
        option: that takes the value, for the error.

    Raises:
        PresetError: where the name is both or neither.
    """
    path = Path(name)
    own = [path] if path.is_file() or path.is_fifo() or path.is_char_device() else []
    if name and path.suffix not in _SUFFIXES:
        own += [file for file in (path.with_name(f"{path.name}{ending}") for ending in _SUFFIXES) if file.is_file()]
    candidates = [*own, *([shipped[name]] if name in shipped else [])]
    if len(candidates) > 1:
        raise PresetError(
            f"{option} {name} is ambiguous: it is {' and '.join(map(str, candidates))}; give the path of the one you"
            f" mean (./{own[0]})"
        )
    if candidates:
        return candidates[0]
    if path.is_dir():
        raise PresetError(f"{option} {name} is a folder; name a file in it")
    raise PresetError(f"{option} {name}: no such file (relative to {Path.cwd()}){hint(path, shipped)}")


def hint(path: str | Path, shipped: Collection[str]) -> str:
    """Which shipped config was probably meant by a file that is not there, as a clause for an error; may be empty."""
    path = Path(path)
    parts = path.parts[path.parts.index("experiments") + 1 :] if "experiments" in path.parts else path.parts
    bare = Path(*parts).with_suffix("").as_posix() if parts else ""
    exact = [name for name in shipped if bare in (name, f"objectives/{name}")]
    if exact:
        return f"; a config of that name is shipped with halos_pl: say {exact[0]}"
    near = _near(bare, shipped)
    return f"; did you mean {near}?" if near else ""


def _near(name: str, candidates: Iterable[str]) -> str:
    by_end = {candidate.rpartition("/")[2]: candidate for candidate in candidates}
    found = difflib.get_close_matches(name.rpartition("/")[2], by_end, n=1, cutoff=0.6)
    return by_end[found[0]] if found else ""
