"""Whether v, called as a program calls it, is what was recorded: in large batches, other shapes, modes and dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor, nn

from halos_pl.proof.point import value_at
from halos_pl.proof.program import Node

_OUTCOMES = [0.0, *(sign * 10 ** (k / 4 - 3) for k in range(36) for sign in (-1, 1))]  # up to 5.6e5
_ERROR = 1e-7  # of the largest value at outcomes no further out, or up to 1: what cancels, and F.softplus beyond 20


def mismatch(v: nn.Module, graph: Sequence[Node], parameters: Mapping[str, Fraction]) -> str:
    """Says where v is not what was recorded; empty if it is so wherever it is tried.

    Args:
        v: a value function; its mode and parameters are as before afterwards.
        graph: its expression.
        parameters: the value of each unknown in it.
    """
    exact: dict[float, float] = {}
    for u in _OUTCOMES:
        try:
            value = float(value_at(graph, Fraction(u), parameters))
        except (ValueError, OverflowError):
            continue
        if abs(value) < 1e300:
            exact[u] = value
    if len(exact) < 8:
        return ""  # undefined nearly everywhere, which the claims are about
    us = torch.tensor([*exact], dtype=torch.float64)
    expected = torch.tensor([*exact.values()], dtype=torch.float64)
    near = expected[us.abs() <= 1].abs()
    allowed = _ERROR * expected.abs().cummax(0).values.clamp(min=float(near.max()) if len(near) else 0.0)
    places = torch.arange(len(us))
    with _kept(v), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as on slow strides
        for where, index, call in _contexts(places):
            found = call(v, us)
            if found.shape != index.shape:
                return f"it returns another shape {where}"
            wrong = (found.double() - expected[index]).abs() > allowed[index] + _ERROR * expected[index].abs()
            wrong &= found.isfinite()  # overflow is not what a proof is about
            if wrong.any():
                at = index[wrong][0]
                value, recorded = float(found[wrong][0]), float(expected[at])
                return f"v({float(us[at]):.6g}) is {value:.6g} {where}, and {recorded:.6g} in what was recorded"
    return ""


class _Call:
    """Calls v with the outcomes at some places, in their shape."""

    def __init__(
        self, index: Tensor, *, inference: bool = False, gradient: bool = False, default: bool = False
    ) -> None:
        self.index, self.inference, self.gradient, self.default = index, inference, gradient, default

    def __call__(self, v: nn.Module, us: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        try:
            if self.default:
                torch.set_default_dtype(torch.float64)
            with torch.inference_mode(self.inference), torch.set_grad_enabled(self.gradient):
                u = us[self.index]
                found: Tensor = v(u.requires_grad_() if self.gradient else u)
        finally:
            torch.set_default_dtype(before)
        return found.detach().clone()


def _contexts(places: Tensor) -> Iterator[tuple[str, Tensor, Callable[[nn.Module, Tensor], Tensor]]]:
    n = len(places)
    large = places.repeat(1 + 2500 // n)
    calls = {
        f"in a batch of {len(large)}": _Call(large),
        "in a batch in another order": _Call(places.flip(0), gradient=True),
        "in four dimensions": _Call(places[: n // 8 * 8].view(2, 2, 2, -1)),
        "with the default dtype float64": _Call(places, default=True),
        "in inference mode": _Call(places, inference=True),
    }
    yield from ((where, call.index, call) for where, call in calls.items())
    for i in places[:: max(1, n // 6)]:
        yield "alone", i.view(1), _Call(i.view(1))
    yield "in a tensor that is not contiguous", places, _strided


def _strided(v: nn.Module, us: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = v(torch.stack([us, us], dim=1)[:, 0])
    return found.clone()


@contextmanager
def _kept(v: nn.Module) -> Iterator[None]:
    """Leaves the dtype of v's tensors at float64 meanwhile, and its mode, as they were before."""
    modes = {module: module.training for module in v.modules()}
    tensors = {x: x.data for x in (*v.parameters(), *v.buffers()) if x.is_floating_point()}
    try:
        for x, data in tensors.items():
            x.data = data.double()
        yield
    finally:
        for x, data in tensors.items():
            x.data = data
        for module, training in modes.items():
            module.training = training
