"""Files that other users and programs are meant to read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def share(folder: Path) -> None:
    """Gives a folder and all that is in it the modes that the umask asks for.

    safetensors and ``tempfile`` create files that their owner alone can read.
    """
    umask = os.umask(0)  # there is no other way to read it
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has errors of a write to an open file say which file it is: a full disk's does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
