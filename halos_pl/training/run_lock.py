"""Allows one writer at a time in a run's folder, even across machines that share its disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities import rank_zero_info


class RunLock:
    """A lock file in the folder that it protects, so that every machine that sees the folder sees the lock.

    It is a POSIX lock, which network file systems support too. It ends with its process in any case, a data loader's
    forked processes do not inherit it, and it stays valid when the folder is renamed.

    Args:
        folder: the folder, created if it is missing.
        command: the kind of writer; different kinds do not exclude each other.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command = folder, command
        self._file: IO[str] | None = None
        self._place = Path()

    def take(self) -> None:
        """Takes the lock, or reports that the file system does not support locks.

        Raises:
            FileExistsError: if another process holds it.
            OSError: if the folder is not writable.
        """
        try:
            import fcntl
        except ImportError:
            rank_zero_info(f"halos: {self.folder} is not protected from other writers: this system has no POSIX locks")
            return
        self._place = self.folder.resolve() / f".{self.command}.lock"
        while self._file is None:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            file = self._place.open("a", encoding="utf-8")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its holder may have removed or moved the file after it was opened here.
                if self._place.exists() and os.path.samestat(os.fstat(file.fileno()), self._place.stat()):
                    self._file = file
            except OSError as error:
                file.close()
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise FileExistsError(
                        f"another halos {self.command} is writing to {self.folder}; wait for it, or name another"
                        " --run_dir"
                    ) from None
                rank_zero_info(f"halos: {self.folder} is not protected from other writers: locking fails ({error})")
                self._place.unlink(missing_ok=True)
                return
            if self._file is None:
                file.close()

    def release(self, moved: Path | None = None) -> None:
        """Releases the lock; ``moved`` is the folder's new path if it was renamed."""
        if self._file is not None:
            place = moved / self._place.name if moved else self._place
            place.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def refuse_held(folder: Path, command: str) -> None:
    """Refuses a folder that another process writes to; creates nothing.

    Raises:
        FileExistsError: if another process is writing to it.
    """
    if (folder / f".{command}.lock").is_file() and os.access(folder, os.W_OK):
        lock = RunLock(folder, command)
        lock.take()
        lock.release()
