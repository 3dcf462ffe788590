"""Files that other users and programs are meant to read: whole, and with the modes that the umask asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

#: The ending of a file that is not complete yet.
PART = ".part"


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it; does nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def part_of(path: Path) -> Path:
    """Where :func:`whole` writes what is to be ``path``; ``path`` itself where that is a pipe, a device or the like."""
    path = path.resolve()
    return path if path.exists() and not path.is_file() else path.with_name(f"{path.name}.halos{PART}")


def check_target(path: Path) -> None:
    """Refuses a path that no file can be written to, before the work that is to be kept in it.

    Raises:
        OSError: naming it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write to")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {folder}; make it, or name another file")
    if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {folder} may not be written to; name another file")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names ``path`` in errors of the system that name no file, such as that of a full disk.

    Raises:
        OSError: with ``path`` as its file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def whole(path: Path, *, keep: bool = False) -> Iterator[IO[str]]:
    """A text file to write, which appears as ``path`` when all of it has been written; until then an older one stays.

    Args:
        path: of the file; a link stays one.
        keep: leave the part that was written (see :func:`part_of`) where the rest could not be.

    Raises:
        OSError: naming the file, where it cannot be written.
    """
    beside, path = part_of(path), path.resolve()
    try:
        with naming(path), beside.open("w", newline="", encoding="utf-8") as file:
            yield file
        if beside != path:
            os.replace(beside, path)
    except BaseException:
        if beside != path and not keep:
            beside.unlink(missing_ok=True)
        raise


def write(path: Path, text: str) -> None:
    """Writes ``path`` as :func:`whole` does."""
    with whole(path) as file:
        file.write(text)
