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

# Up to 5.7e5; neither round, as the places of jumps often are, nor such that their sum is 0.
OUTCOMES = [0.0, *(x * 10 ** (k / 4 - 3) for k in range(36) for x in (-1.0313, 1.0093))]
# Shares of the largest value at outcomes no further out, or up to 1: what cancels, and F.softplus beyond 20; and all
# that float32 and autocast may round.
_ERROR = {torch.float64: 1e-7, torch.float32: 0.05}


def mismatch(v: nn.Module, graph: Sequence[Node], parameters: Mapping[str, Fraction], name: str = "v") -> str:
    """Says where v is not what was recorded; empty if it is so wherever it is tried.

    Args:
        v: a value function; its parameters are as before afterwards.
        graph: its expression.
        parameters: the value of each unknown in it.
        name: what to call v.
    """
    exact: dict[float, tuple[float, float]] = {}  # v(u), and how far it may be off
    for u in OUTCOMES:
        try:
            ball = value_at(graph, Fraction(u), parameters)
            enclosed = float(ball.mid()), float(ball.rad())
        except (ValueError, OverflowError):
            continue
        if abs(enclosed[0]) < 1e300:
            exact[u] = enclosed
    return disagreement(v, exact, "in what was recorded", name)


def disagreement(v: nn.Module, exact: Mapping[float, tuple[float, float]], what: str, name: str = "v") -> str:
    """Says where v, called as programs call it, has other values; empty if nowhere.

    Args:
        v: a value function; its parameters are as before afterwards.
        exact: by outcome, the value that v must have, and how far that may be off.
        what: what that value is.
        name: what to call v.
    """
    if len(exact) < 8:
        return ""  # undefined nearly everywhere, which the claims are about
    us = torch.tensor([*exact], dtype=torch.float64)
    expected, unknown = torch.tensor([*exact.values()], dtype=torch.float64).unbind(dim=1)
    near = expected[us.abs() <= 1].abs()
    largest = expected.abs().cummax(0).values.clamp(min=float(near.max()) if len(near) else 0.0)
    overflows: dict[torch.dtype, Tensor] = {}  # which is not what a proof is about
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as on slow strides
        for where, index, call, dtype in _contexts(torch.arange(len(us))):
            try:
                with _kept(v, dtype):
                    found = call(v, us.to(dtype)[index])
            except Exception as error:
                return f"it raises {raised(error)} {where}"
            if found.shape != index.shape:
                return f"it returns another shape {where}"
            allowed = unknown[index] + _ERROR[dtype] * (largest[index] + expected[index].abs())
            near_enough = (found.double() - expected[index]).abs() <= allowed
            wrong = ~near_enough & ~overflows.setdefault(dtype, ~found.isfinite())[index]
            if wrong.any():
                at = index[wrong][0]
                value, recorded = float(found[wrong][0]), float(expected[at])
                return f"{name}({float(us[at]):.6g}) is {value:.9g} {where}, and {recorded:.9g} {what}"
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


def _in_training(v: nn.Module, u: Tensor) -> Tensor:
    """As in training: u is the result of an operation with a gradient."""
    with torch.enable_grad():
        found: Tensor = v(u.requires_grad_() * 1)
    return found.detach()


def _in_evaluation(v: nn.Module, u: Tensor) -> Tensor:
    modes = {module: module.training for module in v.modules()}
    v.eval()
    try:
        return _plain(v, u)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _under_autocast(v: nn.Module, u: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return _in_training(v, u)


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


def _expanded(v: nn.Module, u: Tensor) -> Tensor:
    return _plain(v, u[:1].expand(u.shape))


def _inside(v: nn.Module, u: Tensor) -> Tensor:
    """u as a part of a longer tensor."""
    return _plain(v, torch.cat([u[:1], u])[1:])


def _contexts(places: Tensor) -> Iterator[tuple[str, Tensor, _Call, torch.dtype]]:
    """What to call a context, the places of the outcomes in it, in their shape, how v is called, and the dtype of u.

    In the first context of each dtype, v may overflow; in the others where it does so there.
    """
    n = len(places)
    large = places.repeat(1 + 2500 // n)
    cut = places[: n // 8 * 8]
    for dtype in _ERROR:
        yield f"in {dtype}", places, _plain, dtype
        yield f"in a batch of {len(large)} in {dtype}", large, _in_training, dtype
        yield f"in evaluation in {dtype}", large, _in_evaluation, dtype
        yield f"in a batch in another order in {dtype}", places.flip(0), _with_gradients, dtype
    for shape in ((2, 2, 2, -1), (2, 2, -1), (2, -1), (-1, 1)):
        yield f"in {len(shape)} dimensions", cut.view(shape), _in_training, torch.float64
    yield "with the default dtype float64", places, _with_default_float64, torch.float64
    yield "in inference mode", places, _in_inference, torch.float64
    for i in places[:: max(1, n // 6)]:
        yield "alone", i.view(1), _plain, torch.float64
        yield "without dimensions", i, _in_training, torch.float64
        yield "in an expanded tensor", i.expand(5), _expanded, torch.float64
    yield "in a tensor that is not contiguous", places, _strided, torch.float64
    yield "in a part of a tensor", places, _inside, torch.float64
    yield "under autocast", places, _under_autocast, torch.float32


@contextmanager
def _kept(v: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Leaves the dtype of v's tensors at that of the outcomes meanwhile, as it was before."""
    tensors = {x: x.data for x in (*v.parameters(), *v.buffers()) if x.is_floating_point()}
    try:
        for x, data in tensors.items():
            x.data = data.to(dtype)
        yield
    finally:
        for x, data in tensors.items():
            x.data = data
