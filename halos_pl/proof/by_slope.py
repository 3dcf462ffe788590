"""Value functions that are given by their slope: what is recorded of them, and whether v is its integral."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from halos_pl.proof.contexts import OUTCOMES, disagreement
from halos_pl.proof.recorder import UntraceableError
from value_functions.by_slope import BySlope, panels

_ERROR = 1e-10  # of an integral, as a share of the largest one no further out
_TOO_LARGE = 1e-6  # an error, as such a share
_MOST_PARTS = 200  # between two seams or outcomes


class Slope(nn.Module):
    """v' of a value function that is given by it."""

    def __init__(self, value_function: BySlope) -> None:
        super().__init__()
        self.value_function = value_function

    def forward(self, u: Tensor) -> Tensor:
        return self.value_function.slope(u)


def subject(v: nn.Module) -> nn.Module:
    """What is recorded: v' if v is its integral by the code of :class:`BySlope`, else v itself."""
    integrates = getattr(v.forward, "__func__", None) is BySlope.forward
    return Slope(v) if isinstance(v, BySlope) and integrates else v


def no_integral(slope: Slope, seams: Sequence[float]) -> str:
    """Says where v is not the integral of its slope from 0; empty if it is so wherever it is tried.

    Args:
        slope: that of v.
        seams: outcomes at which it switches branches.

    Raises:
        UntraceableError: the integral is not found.
    """
    from scipy import integrate  # which takes a third of a second to import

    v, exact = slope.value_function, {0.0: (0.0, 0.0)}

    def at(u: float) -> float:
        with torch.no_grad():
            return float(slope(torch.tensor([u], dtype=torch.float64)))

    for sign in (-1, 1):
        last = total = error = largest = 0.0
        for u in sorted((u for u in OUTCOMES if u * sign > 0), key=abs):
            inside = [seam for seam in seams if min(last, u) < seam < max(last, u)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", integrate.IntegrationWarning)  # the error is returned as well
                part, off, *_ = integrate.quad(
                    at,
                    last,
                    u,
                    points=inside or None,
                    epsabs=_ERROR * largest,
                    epsrel=_ERROR,
                    limit=_MOST_PARTS + len(inside),
                )
            last, total, error = u, total + part, error + off
            largest = max(largest, abs(total))
            if not error <= _TOO_LARGE * largest:
                raise UntraceableError(f"is too sharp: its integral from 0 to {u:.6g} is not found")
            exact[u] = total, error
    why = disagreement(v, {u: exact[u] for u in sorted(exact, key=abs)}, "as the integral of its slope")
    missing = [seam for seam in sorted(seams, key=abs) if abs(seam) not in panels(tuple(v.kinks)).tolist()]
    return f"{why}: its kinks lack {missing[0]:.9g}, where the slope switches branches" if why and missing else why
