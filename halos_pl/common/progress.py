"""Progress of a loop: a bar on a terminal, occasional plain lines in a file or a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def clock(seconds: float) -> str:
    """Seconds as ``H:MM:SS``."""
    return str(timedelta(seconds=round(seconds)))


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn; some terminals in containers are 0 columns wide."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return False
    with suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns > 0
    return True


class Progress:
    """Progress on standard error: a bar on a terminal, otherwise a line now and then. A context manager.

    Args:
        total: number of steps.
        what: description of the work, such as "sampling answers".
        done: number of steps that were done before.
        max_seconds: seconds after which another line is printed, without a terminal.
    """

    def __init__(self, total: int, what: str, *, done: int = 0, max_seconds: float = 30.0) -> None:
        self._total, self._what, self._max_seconds = total, what, max_seconds
        self._first, self._done = done, done
        self._began = self._printed = time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc=what, leave=False) if is_terminal(sys.stderr) else None

    def advance(self, number: int = 1, note: str = "") -> None:
        """Counts steps that are done; ``note`` is shown with them."""
        self._done += number
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(number)
            return
        now = time.monotonic()
        if self._done < self._total and now - self._printed >= self._max_seconds:
            self._printed, spent = now, now - self._began
            left = spent / (self._done - self._first) * (self._total - self._done)
            line = f"{self._what}: {self._done}/{self._total}; {clock(spent)} so far, {clock(left)} left"
            print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def counted(items: Collection[T], what: str, max_seconds: float = 30.0) -> Iterator[T]:
    """Yields the items, with :class:`Progress`."""
    with Progress(len(items), what, max_seconds=max_seconds) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def counting(what: str, unit: str, max_seconds: float = 10.0) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each piece of work, if nobody knows how many there will be.

    Progress goes to standard error.

    Args:
        what: description of the work, such as "planning".
        unit: name of the pieces.
        max_seconds: seconds after which another line is printed, without a terminal.
    """
    bar = (
        tqdm(desc=what, leave=False, bar_format=f"{{desc}}: {{n_fmt}} {unit}, {{elapsed}}")
        if is_terminal(sys.stderr)
        else None
    )
    began = printed = time.monotonic()
    number = 0

    def done() -> None:
        nonlocal printed, number
        number, now = number + 1, time.monotonic()
        if bar is not None:
            bar.update()
        elif now - printed >= max_seconds:
            printed = now
            print(f"{what}: {number} {unit}; {clock(now - began)} so far", file=sys.stderr, flush=True)

    try:
        yield done
    finally:
        if bar is not None:
            bar.close()
