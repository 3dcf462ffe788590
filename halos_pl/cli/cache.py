"""``halos cache``: what is kept for later runs, how large it is, and its removal."""

from __future__ import annotations

import shutil
import sqlite3
import time
from contextlib import closing
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
    "answers": "sampled answers of models that were evaluated",
    "reference": f"reference log-probs (at most {LARGEST / 1e9:.1f} GB)",
}


def _count(kind: str, own: list[Entry]) -> int:
    if kind != "reference" or not own:
        return len(own)
    try:
        with closing(sqlite3.connect(f"file:{own[0].path.as_posix()}?mode=ro", uri=True)) as db:  # this is no use of it
            return int(db.execute("SELECT count(*) FROM logps").fetchone()[0])
    except sqlite3.Error:  # damaged, or being written
        return 0


def _ago(when: float) -> str:
    hours = max(0.0, time.time() - when) / 3600
    return f"{hours / 24:.0f} days ago" if hours >= 48 else f"{hours:.0f} hours ago" if hours >= 1 else "just now"


def info() -> None:
    """What the cache holds, how large it is, how large it may become, and when it was last used."""
    found, most = entries(), limit()
    table = Table(title=escape(plain(cache_root())))
    for column in ("kind", "what", "entries", "MB", "used first", "used last"):
        table.add_column(column, justify="right" if column in ("entries", "MB") else "left")
    for kind, what in _KINDS.items():
        own = [entry for entry in found if entry.kind == kind]
        used = [_ago(own[0].used), _ago(own[-1].used)] if own else ["", ""]
        size = sum(entry.size for entry in own) / 1e6
        table.add_row(kind, what, f"{_count(kind, own):,}", f"{size:,.1f}", *used)
    size, console = sum(entry.size for entry in found), Console()
    console.print(table)
    console.print(
        f"{size_text(size)} of {size_text(most)} (HALOS_CACHE_LIMIT: {limit_setting()}). When something is added beyond"
        " the limit, what was used longest ago is removed; what a running command uses stays.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def clear(*, kind: Literal["all", "data", "models", "answers", "reference"] = "all") -> None:
    """Removes what the cache holds, but for what a running command uses; it is recomputed when it is needed.

    Args:
        kind: what to remove.
    """
    root = cache_root()
    homes: dict[str, Path] = {"data": root / "data", "models": root, "answers": root / ANSWERS}
    homes["reference"] = (root / REFERENCE).parent
    if kind == "all":
        for name in (HELP, "locks"):  # the latter of earlier versions
            shutil.rmtree(root / name, ignore_errors=True)
    for name in _KINDS if kind == "all" else (kind,):
        own = [entry for entry in entries() if entry.kind == name]
        gone = [entry for entry in own if remove(entry)]
        kept = f"; {len(own) - len(gone)} of {len(own)} entries are in use and stay" if len(gone) < len(own) else ""
        if not kept and not in_use(homes[name]):
            for left in root.glob("gguf-*.lock") if name == "models" else (homes[name],):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        said = f"{name}: {sum(entry.size for entry in gone) / 1e6:,.1f} MB removed{kept}"
        Console().print(said, highlight=False)
