"""The values that a hyper-parameter may take, stated once: constructors check them and proofs quantify over them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers.

    Attributes:
        low, high: its ends; may be infinite.
        with_low, with_high: whether the ends belong to it.
    """

    low: float = -math.inf
    high: float = math.inf
    with_low: bool = False
    with_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low or (self.with_low and value == self.low)
        below = value < self.high or (self.with_high and value == self.high)
        return above and below

    def __str__(self) -> str:
        left, right = "[" if self.with_low else "(", "]" if self.with_high else ")"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    @property
    def demand(self) -> str:
        """What a number must be, for an error message."""
        if self.high == math.inf:
            return "finite" if self.low == -math.inf else f"{'at least' if self.with_low else 'above'} {self.low:g}"
        if self.low == -math.inf:
            return f"{'at most' if self.with_high else 'below'} {self.high:g}"
        return f"in {self}"


ANY, POSITIVE, NOT_NEGATIVE, NOT_POSITIVE = Range(), Range(0), Range(0, with_low=True), Range(high=0, with_high=True)
