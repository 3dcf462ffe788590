"""The help of a Trainer's command is kept, as making it takes loading Lightning and all that it imports."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from halos_pl.cache import HELP, cache_root

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("jsonargparse", "lightning", "torch", "torchmetrics", "transformers", "peft")


def show_help(words: list[str], command: Callable[[list[str]], object]) -> None:
    """Prints what ``command(words)`` prints, as it was kept if nothing has changed since: code, versions, width.

    Raises:
        SystemExit: as the command does.
    """
    kept = None
    with contextlib.suppress(OSError):
        kept = cache_root() / HELP / f"{_digest(words)}.txt"
        print(kept.read_text(encoding="utf-8"), end="")
        raise SystemExit(0)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            command(words)
        except SystemExit as end:
            if end.code:
                raise
    print(text.getvalue(), end="")
    if kept is not None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(text.getvalue(), encoding="utf-8")
    raise SystemExit(0)


def _digest(words: list[str]) -> str:
    """Of all that the text depends on."""
    code = [path for folder in (_PACKAGE, _PACKAGE.with_name("value_functions")) for path in folder.rglob("*.py")]
    files = sorted((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in code)
    versions = [sys.version, *((name, version(name)) for name in _LIBRARIES)]
    facts = [words, sys.argv[0], shutil.get_terminal_size().columns, versions, files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
