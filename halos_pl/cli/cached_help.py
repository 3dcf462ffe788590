"""Caches the help of a Trainer command, since rendering it imports Lightning."""

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
    """Prints the output of ``command(words)``, from the cache if code, versions and width are unchanged.

    Raises:
        SystemExit: as the command does.
    """
    cached, text = None, ""
    with contextlib.suppress(OSError):
        cached = cache_root() / HELP / f"{_digest(words)}.txt"
        text = cached.read_text(encoding="utf-8")
    if text:
        print(text, end="")
        raise SystemExit(0)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            command(words)
        except SystemExit as end:
            if end.code:
                raise
    print(output.getvalue(), end="")
    if cached is not None:
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            cached.write_text(output.getvalue(), encoding="utf-8")
    raise SystemExit(0)


def _digest(words: list[str]) -> str:
    """Digest of everything that the text depends on."""
    code = [path for folder in (_PACKAGE, _PACKAGE.with_name("value_functions")) for path in folder.rglob("*.py")]
    files = sorted((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in code)
    versions = [sys.version, *((name, version(name)) for name in _LIBRARIES)]
    facts = [words, shutil.get_terminal_size().columns, versions, files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
