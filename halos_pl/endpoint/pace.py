"""When to repeat a request: backoff with jitter, and pauses that a server asks for."""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Protocol

from tqdm import tqdm

from halos_pl.common.messages import plain

#: Seconds before the first repetition, and at most before any.
FIRST, MOST = 1.0, 60.0
#: Longest pause in seconds to wait out if a server asks for it.
LONGEST_PAUSE = 600.0
#: Shortest wait in seconds that is reported.
REPORTED = 5.0


class Clock(Protocol):
    """Time, which tests replace."""

    def now(self) -> float:
        """Seconds since some moment."""

    def sleep(self, seconds: float, stop: threading.Event) -> None:
        """Waits, at most until ``stop`` is set."""


class SystemClock:
    """The machine's time."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, stop: threading.Event) -> None:
        stop.wait(seconds)


def backoff(attempt: int, jitter: float) -> float:
    """Seconds to wait after a failed attempt: from half to all of 1, 2, 4, ..., 60.

    Args:
        attempt: Number of the attempt, from 0.
        jitter: Number from 0 to 1.
    """
    return float(min(MOST, FIRST * 2 ** min(attempt, 30)) * (0.5 + 0.5 * jitter))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers of a response ask to wait: a number or a date; None if they ask for nothing.

    Source: RFC 9110, section 10.2.3; ``retry-after-ms`` is OpenAI's.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) * unit
            if 0 <= seconds < float("inf"):
                return seconds
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            pass
    return None


class Pace:
    """Lets all threads of an endpoint wait while the server asks for a pause.

    Args:
        clock: The time.
        seed: Seed of the jitter; None draws one.
    """

    def __init__(self, clock: Clock | None = None, seed: int | None = None) -> None:
        self.clock = clock or SystemClock()
        self._random, self._lock, self._until = random.Random(seed), threading.Lock(), 0.0
        self._reported = -math.inf  # the end of the last wait that was reported

    def jitter(self) -> float:
        """A number from 0 to 1."""
        with self._lock:
            return self._random.random()

    def pause(self, seconds: float) -> None:
        """No request starts for so many seconds."""
        with self._lock:
            self._until = max(self._until, self.clock.now() + seconds)

    def say(self, reason: str, seconds: float) -> None:
        """Reports a wait and its reason on standard error, unless it is short or another thread's was reported."""
        with self._lock:
            now = self.clock.now()
            if seconds < REPORTED or now < self._reported:
                return
            self._reported = now + seconds
        tqdm.write(f"halos: {plain(reason)}; waits {seconds:.0f} s and tries again", file=sys.stderr)

    def wait(self, stop: threading.Event) -> None:
        """Waits for the end of a pause, and up to a second longer, so that requests do not start all at once."""
        with self._lock:
            seconds = self._until - self.clock.now()
        if seconds > 0:
            self.clock.sleep(seconds + self.jitter(), stop)
