"""Where the time of a command goes: seconds by part, for the files that it writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

#: From the beginning of a command to its first step or measurement; and the parts of training and of measuring.
START, REFERENCE, TRAINING, SCORING, SAMPLING = "start-up", "reference", "training", "scoring", "sampling"

_seconds: dict[str, float] = {}
_began = time.monotonic()
_inner = 0.0  # seconds of the parts within the current one


def begin() -> None:
    """Counts from now on, as a command begins."""
    global _began, _inner
    _seconds.clear()
    _began, _inner = time.monotonic(), 0.0


def started() -> None:
    """Ends the start-up, at the first call."""
    _seconds.setdefault(START, time.monotonic() - _began - sum(_seconds.values()))


@contextmanager
def part(name: str) -> Iterator[None]:
    """Adds the time in this context to a part, except that of parts within it."""
    global _inner
    before, _inner, start = _inner, 0.0, time.monotonic()
    try:
        yield
    finally:
        total = time.monotonic() - start
        _seconds[name] = _seconds.get(name, 0.0) + total - _inner
        _inner = before + total


def seconds() -> dict[str, float]:
    """Seconds by part, so far."""
    return {name: round(value, 3) for name, value in _seconds.items()}


def training(total: float) -> dict[str, float]:
    """Seconds by part of a fit.

    Args:
        total: seconds since its first step, which include those of the reference.
    """
    return seconds() | {TRAINING: round(total - _seconds.get(REFERENCE, 0.0), 3)}
