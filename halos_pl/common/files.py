"""Writes files for other users and programs: complete, and with the modes of the umask."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

#: The ending of a file that is not complete yet.
PART = ".part"


def host_name() -> str:
    """The name of this machine as part of a file name, without dots."""
    return re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())


def unique_name() -> str:
    """A part of a file name that no other process on any machine uses: host, process and a random number."""
    return f"{host_name()}-{os.getpid()}-{secrets.token_hex(4)}"


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(part: Path, place: Path, intact: Callable[[], bool]) -> None:
    """Renames a complete folder to ``place``, where processes on other machines may look or do the same.

    An intact folder that another process has put there meanwhile stays, and ``part`` is left for its owner to remove. A
    damaged one is replaced.

    Args:
        part: the folder, on the same disk.
        place: its final path.
        intact: tells whether there is an intact folder at ``place``.
    """
    try:
        os.rename(part, place)
    except OSError:
        if intact():
            return
        aside = place.with_name(f"{place.name}.{unique_name()}.removed")
        os.rename(place, aside)
        os.rename(part, place)
        with suppress(OSError):  # NFS keeps files that this machine has open; the limit of the cache counts them
            remove(aside)


def share(folder: Path) -> None:
    """Gives a folder and its content the modes of the umask.

    safetensors and ``tempfile`` create files that only their owner can read.
    """
    umask = os.umask(0)  # there is no other way to read it
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def part_of(path: Path, writer: str = "halos") -> Path:
    """The file that :func:`whole` renames to ``path``; ``path`` itself if it is a pipe, a device or the like."""
    path = path.resolve()
    return path if path.exists() and not path.is_file() else path.with_name(f"{path.name}.{writer}{PART}")


def check_target(path: Path) -> None:
    """Refuses a path that cannot be written, before the work whose result it will contain.

    Raises:
        OSError: names the path.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write to")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: there is no folder {folder}; create it or name another file"
        )
    if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write to {folder}; name another file")


def lock(file: IO[bytes], path: Path) -> None:
    """Locks an open file against other processes until it is closed; does nothing where files cannot be locked.

    It is a POSIX lock: any other handle of this process that is closed releases it.

    Raises:
        FileExistsError: if another process holds the lock; names ``path``.
    """
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(f"another process is writing to {path}; wait for it, or name another --out") from None
    except (ImportError, OSError):  # no locks here
        return


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds ``path`` to errors of the system that name no file, such as that of a full disk.

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
def whole(path: Path, *, keep: bool = False, writer: str = "halos") -> Iterator[IO[str]]:
    """A text file to write, which replaces ``path`` once it is complete.

    Args:
        path: path of the file; a link stays a link.
        keep: whether to keep an incomplete file (see :func:`part_of`) after an error.
        writer: part of its name; a :func:`unique_name` if several processes may write ``path`` at once.

    Raises:
        OSError: if the file cannot be written; names it.
    """
    beside, path = part_of(path, writer), path.resolve()
    try:
        with naming(path), beside.open("w", newline="", encoding="utf-8") as file:
            yield file
        if beside != path:
            os.replace(beside, path)
    except BaseException:
        if beside != path and not keep:
            beside.unlink(missing_ok=True)
        raise


def write(path: Path, text: str, *, writer: str = "halos") -> None:
    """Writes ``path`` as :func:`whole` does."""
    with whole(path, writer=writer) as file:
        file.write(text)
