"""Whether v, called as a program calls it, is what was recorded: in large batches, other shapes, modes and dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor, nn

from halos_pl.common.messages import raised
from halos_pl.proof.point import value_at
from halos_pl.proof.program import Node

_OUTCOMES = [0.0, *(sign * 10 ** (k / 4 - 3) for k in range(36) for sign in (-1, 1))]  # up to 5.6e5
_ERROR = 1e-7  # of the largest value at outcomes no further out, or up to 1: what cancels, and F.softplus beyond 20


def mismatch(v: nn.Module, graph: Sequence[Node], parameters: Mapping[str, Fraction]) -> str:
    """Says where v is not what was recorded; empty if it is so wherever it is tried.

    Args:
        v: a value function; its parameters are as before afterwards.
        graph: its expression.
        parameters: the value of each unknown in it.
    """
    exact: dict[float, tuple[float, float]] = {}  # v(u), and how far it may be off
    for u in _OUTCOMES:
        try:
            ball = value_at(graph, Fraction(u), parameters)
            enclosed = float(ball.mid()), float(ball.rad())
        except (ValueError, OverflowError):
            continue
        if abs(enclosed[0]) < 1e300:
            exact[u] = enclosed
    if len(exact) < 8:
        return ""  # undefined nearly everywhere, which the claims are about
    us = torch.tensor([*exact], dtype=torch.float64)
    expected, unknown = torch.tensor([*exact.values()], dtype=torch.float64).unbind(dim=1)
    near = expected[us.abs() <= 1].abs()
    allowed = _ERROR * expected.abs().cummax(0).values.clamp(min=float(near.max()) if len(near) else 0.0) + unknown
    places = torch.arange(len(us))
    with _kept(v), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as on slow strides
        for where, index, call in _contexts(places):
            try:
                found = call(v, us[index])
            except Exception as error:
                return f"it raises {raised(error)} {where}"
            if found.shape != index.shape:
                return f"it returns another shape {where}"
            wrong = (found.double() - expected[index]).abs() > allowed[index] + _ERROR * expected[index].abs()
            wrong &= found.isfinite()  # overflow is not what a proof is about
            if wrong.any():
                at = index[wrong][0]
                value, recorded = float(found[wrong][0]), float(expected[at])
                return f"v({float(us[at]):.6g}) is {value:.6g} {where}, and {recorded:.6g} in what was recorded"
    return ""


_Call = Callable[[nn.Module, Tensor], Tensor]


def _plain(v: nn.Module, u: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = v(u)
    return found


def _with_gradients(v: nn.Module, u: Tensor) -> Tensor:
    with torch.enable_grad():
        found: Tensor = v(u.requires_grad_())
    return found.detach()


def _in_inference(v: nn.Module, u: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = v(u.clone())  # a tensor of that mode itself
    return found


def _with_default_float64(v: nn.Module, u: Tensor) -> Tensor:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _plain(v, u)
    finally:
        torch.set_default_dtype(before)


def _strided(v: nn.Module, u: Tensor) -> Tensor:
    return _plain(v, torch.stack([u, u], dim=1)[:, 0])


def _contexts(places: Tensor) -> Iterator[tuple[str, Tensor, _Call]]:
    """What to call a context, the places of the outcomes in it, in their shape, and how v is called with them."""
    n = len(places)
    large = places.repeat(1 + 2500 // n)
    yield f"in a batch of {len(large)}", large, _plain
    yield "in a batch in another order", places.flip(0), _with_gradients
    yield "in four dimensions", places[: n // 8 * 8].view(2, 2, 2, -1), _plain
    yield "with the default dtype float64", places, _with_default_float64
    yield "in inference mode", places, _in_inference
    for i in places[:: max(1, n // 6)]:
        yield "alone", i.view(1), _plain
    yield "in a tensor that is not contiguous", places, _strided


@contextmanager
def _kept(v: nn.Module) -> Iterator[None]:
    """Leaves the dtype of v's tensors at float64 meanwhile, as it was before."""
    tensors = {x: x.data for x in (*v.parameters(), *v.buffers()) if x.is_floating_point()}
    try:
        for x, data in tensors.items():
            x.data = data.double()
        yield
    finally:
        for x, data in tensors.items():
            x.data = data
