"""Clauses on a value function's numbers: finite, precise in every dtype, with the right gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halos_pl.conformance.clause import explained
from halos_pl.conformance.curve import EPS, FAR, LARGEST_COTANGENT, Curve, in_pieces, value_and_slope
from halos_pl.conformance.rounding import sums
from halos_pl.conformance.switches import operations
from halos_pl.conformance.value_case import DTYPES, ValueFunctionCase, varied_outcomes
from halos_pl.conformance.witness import number, pair
from value_functions import ValueFunction

# How exact torch's special functions are in float32: their values; and their derivatives within 10 nats, beyond which
# the error grows as u^2, since log-densities are differences of squares.
SPECIAL, SPECIAL_SLOPE = 2e-6, 3e-5


@explained(
    example="""
        def forward(self, u):
            return torch.log(torch.sigmoid(u))
        """,
    cure="""Use the stable form: F.logsigmoid(u) for log(sigmoid(u)), torch.log1p, torch.expm1, F.softplus. Under
    torch.where both branches must be finite, since the gradient of the unused one is multiplied by 0, and 0 * inf is
    NaN.""",
)
def finite(case: ValueFunctionCase) -> str | None:
    """Values and gradients are finite numbers for every |u| up to 10,000 nats, whatever the learnable parameters."""
    # In the other dtypes, only where the exact number fits into the dtype.
    for dtype, sample in case.samples.items():
        most = 0.99 * torch.finfo(dtype).max
        for name, computed, exact, largest in (
            ("v", sample.value, sample.exact_value, most),
            ("v'", sample.slope, sample.exact_slope, most / LARGEST_COTANGENT),
        ):
            fits = torch.ones_like(computed, dtype=torch.bool) if dtype == torch.float64 else exact.abs() < largest
            bad = (~computed.isfinite() & fits).nonzero().squeeze(1)
            if len(bad):
                at = int(bad[sample.u[bad].double().abs().argmin()])
                shown = "" if dtype == torch.float64 else f", exactly {number(float(exact[at]))}"
                return f"{name}({number(float(sample.u[at]))}) = {float(computed[at])} in {str(dtype)[6:]}{shown}"
    if witness := _not_finite(case.curve):
        return witness
    for words, _, curve in case.pushed:
        if witness := _not_finite(curve):
            return f"{witness}, with {words}"
    return _beyond_domain(case)


def _not_finite(curve: Curve) -> str | None:
    bad = (~(curve.value.isfinite() & curve.slope.isfinite()) & (curve.u.abs() <= FAR)).nonzero().squeeze(1)
    if not len(bad):
        return None
    at = int(bad[0])
    return f"at u = {float(curve.u[at])!r}: v = {float(curve.value[at])}, v' = {float(curve.slope[at])} in float64"


def _beyond_domain(case: ValueFunctionCase) -> str | None:
    """A function that declares a ``domain`` must continue linearly beyond it."""
    domain = getattr(case.target, "domain", None)
    if domain is None:
        return None
    low, high = domain
    for edge, far in ((low, -FAR), (high, FAR)):
        if edge is None or abs(edge) >= FAR:  # None and infinity are no bounds
            continue
        u = edge + (far - edge) * torch.logspace(-6, 0, 4001, dtype=torch.float64)
        slope = in_pieces(case.fresh(), u)[1]
        off = (slope - slope[0]).abs() > 1e-6 * slope[0].abs()
        if bool(off.any()):
            at = int(off.nonzero()[0])
            a, b = pair(float(slope[0]), float(slope[at]))
            return f"declared domain {low} to {high}, yet v' is {a} at its edge and {b} at u = {float(u[at]):g}"
    return None


@explained(
    example="""
        def forward(self, u):
            return (1e4 + torch.tanh(u)) - 1e4
        """,
    cure="""Avoid differences of large, nearly equal numbers (use torch.expm1(x) instead of exp(x) - 1), casts to
    another dtype, and constants that depend on the dtype. If v rounds to float32 inside, the report says so.""",
)
def precision(case: ValueFunctionCase) -> str | None:
    """In float32 and bfloat16 the values and slopes agree with those in float64 up to rounding.

    In bfloat16 only where all operations of v exist in it: objectives are computed in float32.
    """
    # The textbook bound: each of v's k operations rounds once, as if u were off by k roundings and the value by k
    # roundings of its size. Slopes may cancel on the way, so they may be off by k roundings of the size of v per nat.
    if case.single_precision:
        return case.single_precision
    count = operations(case.fresh()) + 2
    for dtype in case.dtypes[1:]:
        sample, eps, v = case.samples[dtype], torch.finfo(dtype).eps, case.fresh()
        tiny = torch.finfo(torch.float32).tiny
        fits = (sample.exact_value.abs() < 0.99 * torch.finfo(dtype).max) & (
            (sample.u.double().abs() > 1e-20) | (sample.u == 0)
        )
        value, slope, u = sample.value.double(), sample.slope.double(), sample.u.double()
        # A rough bound clears most values; the others are compared with all that rounding can explain.
        share = max(count * eps, SPECIAL)
        rough = share * (sample.exact_value.abs() + (u * sample.exact_slope).abs()) + tiny
        at = _most_doubtful(torch.where(fits, (value - sample.exact_value).abs() / rough, 0.0))
        low, high = _around(v, u[at], count * eps, 0)
        size = case.size_around(v, u[at])
        off = torch.maximum(low - value[at], value[at] - high) - share * size - tiny
        if bool((off > 0).any()):
            worst = int(at[(off / (size + 1e-300)).masked_fill(off <= 0, -1).argmax()])
            a, b = pair(float(value[worst]), float(sample.exact_value[worst]))
            return f"v({number(float(u[worst]))}) = {a} in {str(dtype)[6:]}, {b} in float64"
        exact = sample.exact_slope.abs()
        shares = (SPECIAL_SLOPE * (u / 10).square().clamp(1, 1e4)).clamp(min=4 * count * eps)
        per_nat = torch.minimum(sample.exact_value.abs() / u.abs(), exact[fits].nan_to_num().max())
        rough = shares * (exact + per_nat) + tiny
        at = _most_doubtful(torch.where(fits, (slope - sample.exact_slope).abs() / rough, 0.0))
        low, high = _around(v, u[at], count * eps, 1, count * eps * _added(v, u[at]))
        slack = shares[at] * (exact[at] + case.slope_around(v, u[at])) + tiny
        off = torch.maximum(low - slope[at], slope[at] - high) - slack
        off = torch.where(exact[at] < 0.2 * torch.finfo(dtype).max, off, -torch.inf)
        if bool((off > 0).any()):
            worst = int(at[(off / slack).argmax()])
            a, b = pair(float(slope[worst]), float(sample.exact_slope[worst]))
            return f"v'({number(float(u[worst]))}) = {a} in {str(dtype)[6:]}, {b} in float64"
    return None


def _around(
    v: ValueFunction, u: Tensor, relative: float, which: int, further: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Lowest and highest value (0) or slope (1) in float64, as far around each outcome as rounding may move it.

    ``further``: nats that it may also move outcomes, whatever their size.
    """
    shares = (-1, -0.6, -0.3, -0.1, 0, 0.1, 0.3, 0.6, 1)
    around = torch.stack([in_pieces(v, u * (1 + relative * t) + further * t)[which] for t in shares])
    return around.min(dim=0).values, around.max(dim=0).values


def _added(v: ValueFunction, u: Tensor) -> Tensor:
    """The size of what is added to u on the way, nats, float64 [n], on either side of 0: 1 for (u + 1).clamp(max=1)."""
    sizes = []
    for side in (-1, 1):
        beside = side * (u.abs() + 1e-4)
        slope = in_pieces(v, beside)[1].abs()
        sizes.append(torch.where(slope > 0, sums(v, beside) / slope, 0.0).clamp(max=1e3))
    return torch.maximum(*sizes)


def _most_doubtful(ratio: Tensor, most: int = 20_000) -> Tensor:
    """Places where ``ratio`` is above 1, the largest first, and at least one place."""
    ratio = ratio.nan_to_num(posinf=torch.finfo(ratio.dtype).max)
    return ratio.topk(max(1, min(most, int((ratio > 1).sum())))).indices


@explained(
    example="""
        def forward(self, u):
            return torch.sigmoid(u).detach() + 0.5 * (u - u.detach())
        """,
    cure="""Let the gradient flow: no detach, item, round or no_grad between u and the value. At a kink, return one of
    the two slopes: sqrt(|u|), for example, has an infinite slope at 0, and NaN under autograd.""",
)
def gradient(case: ValueFunctionCase) -> str | None:
    """Autograd's slope agrees with finite differences of the values, also at u = 0, where every run starts.

    Whatever is handed back is passed on and left as it is: cotangents of 1e-8 to 1e4 and 0, alike or mixed, in small
    and large batches, in float64 and float32.
    """
    for words, v, curve in (("", case.fresh(), case.curve), *case.pushed):
        if witness := _gradient_at_zero(case, v) or _gradient_elsewhere(case, v, curve.finite()):
            return f"{witness}, with {words}" if words else witness
    return _cotangents_passed_on(case)


def _cotangents(n: int, dtype: torch.dtype, every: bool) -> Iterator[Tensor | None]:
    """What may be handed back to n values, [n]; None for the gradient of their sum, which is one number in memory."""
    sizes = torch.tensor([0.0, *(10.0**k for k in range(-8, 5))], dtype=dtype)
    signs = 1 - 2 * (torch.arange(n) % 3 % 2).to(dtype)
    mixed = sizes[torch.arange(n) * 5 % len(sizes)]
    for size in sizes if every else ():
        yield signs * size
        yield torch.ones(n, dtype=dtype) * size
    yield from (mixed, signs * mixed.flip(0), torch.full((n,), 1 / n, dtype=dtype), None)


def _cotangents_passed_on(case: ValueFunctionCase) -> str | None:
    """The gradient is the slope times what is handed back, for cotangents of every size, which stay as they are."""
    for dtype, n in ((dtype, n) for dtype in DTYPES[:2] for n in (28, min(4099, max(28, case.affordable // 256)))):
        u = torch.cat([varied_outcomes(n - 4), torch.zeros(4)]).to(dtype)
        slope, eps = value_and_slope(case.fresh(), u)[1].double(), torch.finfo(dtype).eps
        size = max(1e-6, eps**0.5) * slope.abs() + 64 * eps * case.slope_around(case.fresh(), u.double())
        for back in _cotangents(n, dtype, every=n == 28):
            leaf, beside = u.clone().requires_grad_(), torch.zeros_like(u, requires_grad=True)
            value = case.fresh()(leaf.clone())
            if not value.requires_grad:
                break
            total = value + beside  # whatever is added to v is handed back the same
            handed, kept = torch.autograd.grad((total if back is None else total * back).sum(), (leaf, beside))
            back = torch.ones_like(u) if back is None else back
            if not torch.equal(kept, back):
                at = int((kept != back).nonzero()[0])
                return f"backward changes its cotangent in place, from {float(back[at]):.6g} to {float(kept[at]):.6g}"
            exact = slope * back.double()
            off = (handed.double() - exact).abs() > size * back.abs().double() + torch.finfo(torch.float32).tiny
            off |= ~handed.isfinite() & slope.isfinite()
            if bool(off.any()):
                at = int(off.nonzero()[0])
                return (
                    f"at u = {float(u[at]):.6g} the gradient of v is {float(handed[at]):.6g} for a cotangent of"
                    f" {float(back[at]):.6g} in {str(dtype)[6:]}, not {float(exact[at]):.6g}, in a batch of {n}"
                )
    return None


def _gradient_at_zero(case: ValueFunctionCase, v: ValueFunction) -> str | None:
    """Checks u = 0. At a kink, the slope may be anything between the slopes on the left and on the right."""
    u = torch.zeros(2, dtype=torch.float64)  # two, since a batch of one has a cotangent of 1
    value, slope = value_and_slope(v, u)
    if not bool(value.isfinite().all() and slope.isfinite().all()):
        return None  # another clause reports it
    around, witness = float(_rounded(case, v, u)[0]), None
    for exponent in range(2, 19):  # steep functions are flat again close by
        step = 10.0**-exponent
        sides = tuple(float(side[0]) for side in _slopes_beside(v, u, value, torch.full_like(u, step)))
        right, left = sides[:2]
        most, rounding = max(abs(left), abs(right)), 64 * EPS * around / step
        slack = 1e-5 * most + rounding
        inside = (slope >= min(sides) - slack) & (slope <= max(sides) + slack)
        if bool(inside.all()) and rounding <= 1e-2 * most:
            return None
        if not bool(inside.all()) and (witness is None or exponent == 6):
            wrong = float(slope[~inside][0])
            witness = f"v'(0) = {wrong:.6g} by autograd, {left:.6g} on its left and {right:.6g} on its right"
    return witness


def _rounded(case: ValueFunctionCase, v: ValueFunction, u: Tensor) -> Tensor:
    """The size of what v rounds at each outcome, and of what it adds up there, utility, float64 [n]."""
    return torch.maximum(case.size_around(v, u), sums(v, u) / 8)


def _slopes_beside(v: ValueFunction, u: Tensor, value: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slopes by finite differences: right and left of each outcome, and a step further, in case v jumps at the outcome.

    At a jump the first two tell of the jump, and the others of the slope on either side.
    """
    with torch.no_grad():
        after, before, far_after, far_before = (v(u + k * step) for k in (1, -1, 2, -2))
    return (after - value) / step, (value - before) / step, (far_after - after) / step, (before - far_before) / step


def _gradient_elsewhere(case: ValueFunctionCase, v: ValueFunction, curve: Curve) -> str | None:
    inside = curve.u.abs() <= FAR
    slack, curve = curve.noise[inside], curve.part(inside)
    h, rise = curve.u.diff(), curve.value.diff()
    off = (rise - h * (curve.slope[1:] + curve.slope[:-1]) / 2).abs() - h * curve.slope.diff().abs()
    doubt = (off > slack[1:] + slack[:-1]).nonzero().squeeze(1)
    doubt = doubt[:: max(1, len(doubt) // 2000)]
    # Points inside inconsistent cells, and points everywhere; one of them is a kink or a jump only by bad luck.
    far = torch.logspace(-6, 4, 300, dtype=torch.float64) * 1.0173
    u = torch.cat([curve.u[doubt] + 0.3819 * h[doubt], varied_outcomes(1000) * 1.0091, far, -far])
    u = u[u != 0]
    value, slope = in_pieces(v, u)
    wrong = value.isfinite() & slope.isfinite()
    shown, around = slope, _rounded(case, v, u)
    for size in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        step = size * u.abs()
        sides = torch.stack(_slopes_beside(v, u, value, step))
        rounding = 64 * EPS * around / step
        center = (sides[0] + sides[1]) / 2
        slack = 1e-5 * torch.maximum(slope.abs(), center.abs()) + rounding
        between = (slope >= sides.amin(0) - slack) & (slope <= sides.amax(0) + slack)
        shown = torch.where(wrong & (rounding < 1e-3 * (slope - center).abs()), center, shown)
        wrong &= ~between
    if not bool(wrong.any()):
        return None
    worst = ((shown - slope).abs() / (shown.abs() + slope.abs() + 1e-300)).masked_fill(~wrong, -1)
    at = int(worst.argmax())
    a, b = pair(float(slope[at]), float(shown[at]))
    return f"v'({u[at]:.6g}) = {a} by autograd, {b} by finite differences"
