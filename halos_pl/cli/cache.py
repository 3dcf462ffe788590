"""``halos cache``: shows the content and size of the cache, and empties it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halos_pl.cache import (
    ANSWERS,
    HELP,
    LARGEST,
    REFERENCE,
    Entry,
    cache_root,
    entries,
    in_use,
    limit,
    limit_setting,
    remove,
    size_text,
)
from halos_pl.common.messages import plain

_KINDS = {
    "data": "checked and tokenised sources of feedback",
    "models": "converted GGUF models",
    "answers": "sampled answers of evaluated models",
    "reference": f"reference log-probs (at most {LARGEST / 1e9:.1f} GB)",
}


def _count(kind: str, stored: list[Entry]) -> int:
    if kind != "reference":
        return len(stored)
    from halos_pl.policy.segments import Segments  # here, as numpy takes a while to import

    folder = cache_root() / REFERENCE
    return len(Segments(folder, read_only=True)) if folder.is_dir() else 0


def _ago(when: float) -> str:
    hours = max(0.0, time.time() - when) / 3600
    return f"{hours / 24:.0f} days ago" if hours >= 48 else f"{hours:.0f} hours ago" if hours >= 1 else "just now"


def info() -> None:
    """Show the content, size and size limit of the cache, and when it was last used."""
    stored, most = entries(), limit()
    table = Table(title=escape(plain(cache_root())))
    for column in ("kind", "content", "entries", "MB", "least recent use", "latest use"):
        table.add_column(column, justify="right" if column in ("entries", "MB") else "left")
    for kind, what in _KINDS.items():
        alike = [entry for entry in stored if entry.kind == kind]
        used = [_ago(alike[0].used), _ago(alike[-1].used)] if alike else ["", ""]
        size = sum(entry.size for entry in alike) / 1e6
        table.add_row(kind, what, f"{_count(kind, alike):,}", f"{size:,.1f}", *used)
    size, console = sum(entry.size for entry in stored), Console()
    console.print(table)
    console.print(
        f"{size_text(size)} of {size_text(most)} (HALOS_CACHE_LIMIT: {limit_setting()}). Beyond the limit, the least"
        " recently used entries are removed, except those that a running command uses.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def clear(*, kind: Literal["all", "data", "models", "answers", "reference"] = "all") -> None:
    """Empty the cache, except for entries that a running command uses; they are recomputed when needed.

    Args:
        kind: kind of entries to remove.
    """
    root = cache_root()
    homes: dict[str, Path] = {"data": root / "data", "models": root, "answers": root / ANSWERS}
    homes["reference"] = (root / REFERENCE).parent
    if kind == "all":
        for name in (HELP, "locks"):  # earlier versions wrote locks
            shutil.rmtree(root / name, ignore_errors=True)
    for name in _KINDS if kind == "all" else (kind,):
        stored = [entry for entry in entries() if entry.kind == name]
        gone = [entry for entry in stored if remove(entry)]
        left = len(stored) - len(gone)
        kept = f"; {left} of {len(stored)} entries are in use and stay" if left else ""
        if not kept and not in_use(homes[name]):
            for path in root.glob("gguf-*.lock") if name == "models" else (homes[name],):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        size = sum(entry.size for entry in gone) / 1e6
        Console().print(f"{name}: {size:,.1f} MB removed{kept}", highlight=False)
