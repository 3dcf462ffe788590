"""Numbers of a report, with as many digits as their intervals justify."""

from __future__ import annotations

import math

from halos_pl.study.comparison import Comparison
from halos_pl.study.statistics import Estimate

#: Half-widths of intervals below this are rounding errors.
FINEST = 1e-10
#: The largest ratio that is written out; its inverse is the smallest.
FARTHEST = 1000.0


def decimals(value: float, low: float, high: float) -> int:
    """Decimals that show two digits of half the interval's width; three digits of the value if nothing varies."""
    scale = (high - low) / 2
    digits = 2
    if not (math.isfinite(scale) and scale > FINEST):
        scale, digits = abs(value), 3
    return min(9, max(0, digits - 1 - math.floor(math.log10(scale)))) if scale > 0 else 0


def number(value: float, places: int, sign: str = "") -> str:
    """A number with this many decimals; one that rounds to 0 has no minus sign."""
    if not math.isfinite(value):
        return f"{value:{sign}}"
    return f"{round(value, places) + 0.0:{sign}.{places}f}"


def of_estimate(e: Estimate, interval: bool = True) -> str:
    """A mean with its 95% interval."""
    places = decimals(e.value, e.low, e.high)
    mean = number(e.value, places)
    return f"{mean} [{number(e.low, places)}, {number(e.high, places)}]" if interval else mean


def of_comparison(c: Comparison) -> str:
    """An effect with its 95% interval: ``+0.12 [+0.03, +0.21]``, or ``x 1.4 [1.1, 1.8]`` for a ratio."""
    sign = "" if c.scale == "ratio" else "+"
    places = decimals(c.effect, c.low, c.high)
    if c.scale == "ratio":  # the interval is asymmetric: its lower half determines the digits
        places = min(4, max(places, decimals(c.effect, c.low, c.effect)))
    ratio = c.scale == "ratio"
    effect, low, high = (_far(value, ratio) or number(value, places, sign) for value in (c.effect, c.low, c.high))
    return f"{'x ' if c.scale == 'ratio' else ''}{effect} [{low}, {high}]"


def _far(value: float, ratio: bool) -> str:
    """A bound in place of a ratio too large or too small to write out; empty for others."""
    if not ratio or 1 / FARTHEST <= value <= FARTHEST:
        return ""
    return f"> {FARTHEST:g}" if value > 1 else f"< {1 / FARTHEST:g}"


def p_value(p: float) -> str:
    """``p = 0.012`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def short(value: float) -> str:
    """A number with three significant digits."""
    return f"{float(f'{value:.3g}'):g}"
