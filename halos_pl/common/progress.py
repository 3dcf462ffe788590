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


def counted(items: Collection[T], what: str, max_seconds: float = 30.0) -> Iterator[T]:
    """Yields the items, with progress on standard error.

    Args:
        items: items to iterate over.
        what: description of the work, such as "sampling answers".
        max_seconds: seconds after which another line is printed, without a terminal.
    """
    if is_terminal(sys.stderr):
        yield from tqdm(items, desc=what, leave=False)
        return
    began = printed = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if number and now - printed >= max_seconds:
            printed, spent = now, now - began
            left = spent / number * (len(items) - number)
            done = f"{what}: {number}/{len(items)}"
            print(f"{done}; {clock(spent)} so far, {clock(left)} left", file=sys.stderr, flush=True)
        yield item


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
