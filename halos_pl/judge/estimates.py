"""Means of bounded values with standard errors and 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

LEVEL = 0.05
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean or another figure of n items.

    Attributes:
        value: the estimate; NaN without items.
        error: its standard error; NaN with fewer than two items.
        low, high: ends of its 95% interval.
        n: number of independent items, such as pairs.
    """

    value: float
    error: float
    low: float
    high: float
    n: int

    def contains(self, value: float) -> bool:
        """Whether the interval contains a value."""
        return self.low <= value <= self.high

    def text(self, places: int = 3) -> str:
        """``0.612 [0.551, 0.670]``."""
        if not self.n:
            return "unknown"
        return f"{self.value:.{places}f} [{self.low:.{places}f}, {self.high:.{places}f}]"


def mean_of(values: Sequence[float] | Values, least: float = 0.0, most: float = 1.0) -> Estimate:
    """The mean of independent values, with the standard error s / sqrt(n), where s has n - 1 degrees of freedom.

    The interval is Wilson's (1927) with the quantile of t, for the effective number of items of Korn and Graubard
    (1998): p (1 - p) / error², where p is the mean scaled to 0..1. It stays within the bounds. If all values are equal,
    that number is n: a few equal values do not say that all are.

    Args:
        values: one value per item, from ``least`` to ``most``.
        least, most: bounds of a value.

    Raises:
        ValueError: if a value is not finite or out of bounds.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not ((array >= least) & (array <= most)).all():
        raise ValueError(f"expected a list of numbers from {least:g} to {most:g}")
    n = len(array)
    if not n:
        return Estimate(math.nan, math.nan, least, most, 0)
    mean = float(array.mean())
    error = float(array.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    if n == 1:
        return Estimate(mean, math.nan, least, most, 1)
    return Estimate(mean, error, *_wilson(mean, error, n, least, most), n)


def _wilson(
    value: float, error: float, n: int, least: float, most: float, informative: float | None = None
) -> tuple[float, float]:
    """The interval of :func:`mean_of`."""
    span = most - least
    p, scaled = (value - least) / span, error / span
    many = max(p * (1 - p) / scaled**2, 1.0) if scaled > 1e-12 else float(informative or n)
    z = float(special.stdtrit(n - 1, 1 - LEVEL / 2))
    centre, reach = p + z**2 / (2 * many), z * math.sqrt(p * (1 - p) / many + z**2 / (4 * many**2))
    low, high = (centre - reach) / (1 + z**2 / many), (centre + reach) / (1 + z**2 / many)
    return least + span * max(low, 0.0), least + span * min(high, 1.0)


def linear(
    value: float,
    influence: Values,
    least: float = -math.inf,
    most: float = math.inf,
    informative: float | None = None,
) -> Estimate:
    """A smooth function of means, with its error from the influence of each item (delta method).

    If no item has any influence, the interval is that of :func:`mean_of` for equal values of the informative items.

    Args:
        value: the estimate.
        influence: [n] first-order effect of each item on n times the estimate; its mean is 0.
        least, most: bounds of the interval.
        informative: number of items that say something about the value; default: all n.
    """
    n = len(influence)
    if n < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, least, most, n)
    error = float(influence.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 and least <= value <= most < math.inf:
        return Estimate(value, error, *_wilson(value, error, n, least, most, informative), n)
    reach = float(special.stdtrit(n - 1, 1 - LEVEL / 2)) * error
    return Estimate(value, error, max(value - reach, least), min(value + reach, most), n)
