"""Value functions that are given by their slope."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from value_functions.base import ValueFunction

_POINTS = 16  # of Gauss and Legendre's rule on each panel
_Slope = Callable[[Tensor], Tensor]


class BySlope(ValueFunction):
    """v(u) = the integral of ``slope`` from 0 to u.

    For losses that are published as a gradient: a weight without gradient times log pi_theta, as in CISPO or VESPO.
    Such a loss has the gradient of the HALO whose value function has this weight as its slope. The gradient of v is
    ``slope`` itself. v is integrated numerically in float64, on panels of a quarter of a nat up to 64 nats and
    doubling beyond, with errors around 1e-12 of the integral where the slope is smooth on each panel.

    A subclass defines ``slope`` instead of ``forward``, and has no learnable parameters.

    Raises:
        ValueError: when called: there are parameters to learn, ``kinks`` is not a sequence of numbers, or ``slope``
            does not return a tensor of the shape of u.

    Attributes:
        kinks: outcomes, in nats, at which the slope jumps or bends; panels end there.
    """

    kinks: Sequence[float] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "slope" in vars(cls) and "violates" not in vars(cls):  # as for a new forward
            cls.violates = MappingProxyType({})

    @abstractmethod
    def slope(self, u: Tensor) -> Tensor:
        """v'(u) of each outcome, in utility per nat; finite, elementwise, with the shape and dtype of ``u``."""

    def forward(self, u: Tensor) -> Tensor:
        if learned := [name for name, each in self.named_parameters() if each.requires_grad]:
            raise ValueError(
                f"{type(self).__name__}: {learned[0]} cannot be learned: a value function given by its slope has a"
                " gradient in u only; make it a number"
            )
        kinks: Any = self.kinks
        if not isinstance(kinks, Sequence) or not all(isinstance(kink, int | float) for kink in kinks):
            raise ValueError(f"{type(self).__name__}: kinks is {kinks!r}; it must be a sequence of numbers, in nats")
        value: Tensor = Integral.apply(u, self._slope, tuple(kinks))  # type: ignore[no-untyped-call]
        return value

    def _slope(self, u: Tensor) -> Tensor:
        slope: Any = self.slope(u)
        if not isinstance(slope, Tensor) or slope.shape != u.shape:
            what = f"shape {tuple(slope.shape)}" if isinstance(slope, Tensor) else f"a {type(slope).__name__}"
            raise ValueError(f"{type(self).__name__}: slope returns {what}, not a tensor of shape {tuple(u.shape)}")
        return slope


class Integral(torch.autograd.Function):
    """The integral of a slope from 0 to each outcome, whose gradient is the slope."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: _Slope, kinks: tuple[float, ...]) -> Tensor:
        ctx.save_for_backward(u)
        ctx.slope = slope
        return _integral(slope, u.detach().double(), kinks).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return upstream * ctx.slope(u.double()).to(upstream.dtype), None, None


@cache
def _rule() -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights of the rule, float64: eigenvalues of its Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, _POINTS, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    first: Tensor = vectors[0]
    return (nodes + 1) / 2, first.square()


@cache
def panels(kinks: tuple[float, ...]) -> Tensor:
    """Ends of the panels on one side of 0, ascending from 0, in nats, float64 [n]."""
    fine = torch.arange(0, 64, 0.25, dtype=torch.float64)
    doubling = 2.0 ** torch.arange(6, 28, dtype=torch.float64)
    ends = torch.cat([fine, doubling, torch.tensor([abs(kink) for kink in kinks], dtype=torch.float64)])
    ascending: Tensor = ends.unique()
    return ascending


def _integral(slope: _Slope, u: Tensor, kinks: tuple[float, ...]) -> Tensor:
    nodes, weights = (each.to(u.device) for each in _rule())
    edges = panels(kinks).to(u.device)
    size, low, high = u.abs(), edges[:-1, None], edges[1:, None]
    panel = torch.searchsorted(edges, size.contiguous(), right=True) - 1
    left = edges[panel]
    rest = size - left

    def side(sign: float) -> Tensor:
        whole = (slope(sign * (low + (high - low) * nodes)) * weights * (high - low)).sum(dim=1)
        before = torch.cat([whole.new_zeros(1), whole.cumsum(0)])[panel]
        last = (slope(sign * (left[..., None] + rest[..., None] * nodes)) * weights).sum(dim=-1) * rest
        return sign * (before + last)

    return torch.where(u < 0, side(-1.0), side(1.0))
