"""Locks between machines that share a file system, without support by the file system."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

#: A lock whose holder has not been seen for so many seconds is taken over.
DURATION = 30.0


class Lease:
    """A lock file that its holder renews, so that a machine that dies holds it no longer than ``DURATION``.

    Works on any file system that creates files exclusively and renames them atomically, as NFS and Lustre do, also
    where they are mounted without locks. A process that is stopped for longer than ``DURATION`` and continues may
    overlap with the next holder, so what it protects must be safe then, if wasteful.

    Args:
        path: path of the lock file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Kept, as it counts the seconds for which it has seen no renewal.
        self._lease = SoftFileLease(path, lease_duration=DURATION)

    @contextmanager
    def held(self, *, wait: bool = True) -> Iterator[bool]:
        """Holds the lock.

        Args:
            wait: whether to wait while another process holds it.

        Yields:
            Whether the lock is held.
        """
        while not self._acquired(DURATION / 6 if wait else 0):
            if not wait:
                yield False
                return
        try:
            yield True
        finally:
            self._lease.release()

    def _acquired(self, seconds: float) -> bool:
        try:
            self._lease.acquire(timeout=seconds, poll_interval=0.2)
        except Timeout:
            self._remove_unwritten()
            return False
        return True

    def _remove_unwritten(self) -> None:
        """A machine may die between creating the file and writing to it; nobody can tell then whose lock it was."""
        with suppress(OSError):
            state = self._path.stat()
            if not state.st_size and time.time() - state.st_mtime > 2 * DURATION:
                self._path.unlink()
