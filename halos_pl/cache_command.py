"""``halos cache``: what is kept for later runs, how large it is, and its removal."""

from __future__ import annotations

import shutil
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halos_pl.cache import cache_root
from halos_pl.messages import plain
from halos_pl.policy.store import FILE, LARGEST, ReferenceStore

_KINDS = {
    "data": ("data", "checked and tokenised sources of feedback"),
    "models": ("gguf-*", "converted GGUF models"),
    "reference": (str(FILE.parent), f"reference log-probs (at most {LARGEST / 1e9:.1f} GB)"),
}


def _places(kind: str) -> list[Path]:
    return sorted(cache_root().glob(_KINDS[kind][0]))


def _size(path: Path) -> int:
    size = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(FileNotFoundError):  # a journal, gone when a run has written
            size += 0 if file.is_dir() else file.stat().st_size
    return size


def _entries(kind: str) -> int:
    if kind != "reference":
        inside = _places(kind) if kind == "models" else [p for home in _places(kind) for p in home.iterdir()]
        return sum(path.is_dir() for path in inside)
    if not (cache_root() / FILE).is_file():
        return 0
    with closing(ReferenceStore()) as store:
        return len(store)


def info() -> None:
    """What the cache holds, and how large it is."""
    table = Table(title=escape(plain(cache_root())))
    for column in ("kind", "what", "entries", "MB"):
        table.add_column(column, justify="right" if column in ("entries", "MB") else "left")
    for kind, (_, what) in _KINDS.items():
        table.add_row(kind, what, f"{_entries(kind):,}", f"{sum(map(_size, _places(kind))) / 1e6:,.1f}")
    Console().print(table)


def clear(*, kind: Literal["all", "data", "models", "reference"] = "all") -> None:
    """Removes what the cache holds; it is made again when it is needed. Not while a run is using it.

    Args:
        kind: what to remove.
    """
    if kind == "all":
        shutil.rmtree(cache_root() / "locks", ignore_errors=True)  # of earlier versions
    for name in _KINDS if kind == "all" else (kind,):
        places = _places(name)
        size = sum(map(_size, places))
        for path in places:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        Console().print(f"{name}: {size / 1e6:,.1f} MB removed", highlight=False)
