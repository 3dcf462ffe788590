"""Search for faults of a value function over its whole range: a dense float64 grid with derivatives.

A grid cell of 4e-4 nats is 25 times narrower than the narrowest fault that has to be found (0.01 nats), and half a
million points cost a twentieth of a second. What is narrower still is looked for where there is a sign of it: at the
constants that the code compares with, and in cells whose increment does not fit the slopes at their ends (a jump has
no derivative).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EPS = torch.finfo(torch.float64).eps
EDGE, FAR = 100.0, 1e4
CELLS = 500_000
# Where ``F.softplus`` becomes linear it jumps by 2e-9, which is no fault of who uses it: allowed there, by this share
# of what v reaches.
JUMP = 3e-8
Function = Callable[[Tensor], Tensor]


class WrongShapeError(ValueError):
    """A function returned another shape than it was given."""


# What a row's loss may hand back to v, so that a backward that changes it is found out; powers of two divide exactly.
LARGEST_COTANGENT = 4.0
_COTANGENTS = (1.0, -1.0, LARGEST_COTANGENT, -0.5, 0.25, -2.0, -1.0)


@lru_cache(maxsize=1)
def _cotangents() -> Tensor:
    """As many as the largest batch has rows, in an order without a period."""
    draw = torch.Generator().manual_seed(0)
    order = torch.randint(len(_COTANGENTS), (2 * CELLS,), generator=draw)
    return torch.tensor(_COTANGENTS, dtype=torch.float64)[order]


def cotangents(like: Tensor) -> Tensor:
    """Signed powers of two, another one for each row, of the shape and dtype of ``like``."""
    every, n = _cotangents(), like.numel()
    every = every if n <= len(every) else every.repeat(1 + n // len(every))
    return every[:n].view(like.shape).to(like.dtype)


def value_and_slope(v: Function, u: Tensor, view: Function | None = None) -> tuple[Tensor, Tensor]:
    """v(u) and dv/du by autograd, both of the shape of ``u``; a slope of 0 where v has no gradient.

    Args:
        v: a value function.
        u: nats.
        view: what v is called with is this view of ``u``, and so are the values and slopes; left out, ``u`` itself.
    """
    view = view or (lambda tensor: tensor)
    with torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        given = view(leaf.clone())  # a copy, so that a change in place is found by its own clause only
        shape = given.shape
        value = v(given)
        if value.shape != shape:
            raise WrongShapeError(f"v of {tuple(shape)} has shape {tuple(value.shape)}")
        slope = None
        if value.requires_grad:
            back = cotangents(value)
            # Of the sum, since torch imports sympy (half a second) for those who hand it a gradient of their own.
            (slope,) = torch.autograd.grad((value * back).sum(), leaf, allow_unused=True)
    value = value.detach()
    return value, torch.zeros_like(value) if slope is None else view(slope.detach()) / back


_COMPARISONS = {"gt", "lt", "ge", "le", "eq", "ne"}
_BOUNDS = {"clamp", "clamp_min", "clamp_max", "hardtanh", "relu", "threshold", "leaky_relu", "elu", "celu"}
_STEPS = {"sign", "sgn", "floor", "ceil", "round", "trunc"}


class Switches(TorchDispatchMode):
    """Records, for each operation that takes one of several ways, which way each element went.

    Attributes:
        states: a float64 [count] for each such operation, in the order of the calls.
        seams: places in ``states`` of ``F.softplus``, which becomes linear with a jump.
        unknown_seams: whether there is one of another shape.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.states: list[Tensor] = []
        self.seams: list[int] = []
        self.unknown_seams = False
        self.operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: skipping it means importing it, which takes as long as a check does."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        before = args[0].clone() if name.endswith("_") and args and isinstance(args[0], Tensor) else None
        out = func(*args, **(kwargs or {}))
        name = name.rstrip("_")
        if isinstance(out, Tensor) and out.is_floating_point():
            self.operations += 1
        given = before if before is not None else (args[0] if args else None)
        if name == "softplus" and isinstance(given, Tensor):
            beta, threshold = (float(x) for x in (*args[1:], *(1, 20)[len(args) - 1 :]))
            if given.numel() == self.count:
                self.seams.append(len(self.states))
                self.states.append((given * beta > threshold).detach().flatten().double())
            self.unknown_seams |= given.numel() != self.count
        if isinstance(out, Tensor) and out.numel() == self.count and isinstance(given, Tensor):
            state = None
            if name in _COMPARISONS:
                state = out
            elif name in _BOUNDS and given.numel() == self.count:
                state = (out - given).sign()
            elif name in ("minimum", "maximum", "fmin", "fmax") and given.numel() == self.count:
                state = out == given
            elif name == "abs":
                state = given.sign()
            elif name in _STEPS:
                state = out
            if state is not None:
                self.states.append(state.detach().flatten().double())
        return out


def switches(v: Function, u: Tensor) -> Switches:
    """What was recorded of v(u)."""
    with torch.no_grad(), Switches(u.numel()) as mode:
        v(u.clone())
    return mode


def operations(v: Function) -> int:
    """How many operations with floats one call of v takes: each may round once."""
    with torch.no_grad(), Switches(-1) as mode:
        v(torch.tensor([0.5, -0.5]))
    return mode.operations


def breakpoints(v: Function, u: Tensor) -> tuple[Tensor, Tensor]:
    """Points on either side of the places where the code inside v takes another way.

    Args:
        v: a value function.
        u: nats, float64 [n], ascending.

    Returns:
        nats, float64 [m]: for each place the two sides, found by bisection; and those of them, float64 [2, k], where
        ``F.softplus`` becomes linear.
    """
    events, places, first, last = [], [], [], []
    mode = switches(v, u)
    for number, state in enumerate(mode.states):
        change = (state[1:] != state[:-1]).nonzero().squeeze(1)
        change = change[:: max(1, len(change) // 200)]
        events.append(torch.full_like(change, number))
        places.append(change)
        first.append(state[change])
        last.append(state[change + 1])
    everywhere = u.new_tensor([[-torch.inf], [torch.inf]])
    if not events or sum(map(len, events)) == 0:
        return u.new_empty(0), everywhere if mode.unknown_seams else everywhere[:, :0]
    # Twice: for where the left way ends and for where the right one begins; between them may be a third one.
    event, place = torch.cat(events).repeat(2), torch.cat(places).repeat(2)
    start, end = torch.cat(first).repeat(2), torch.cat(last).repeat(2)
    leaving = torch.arange(len(event)) < len(event) // 2
    low, high = u[place], u[place + 1]
    rows = torch.arange(len(event))
    for _ in range(60):
        middle = (low + high) / 2
        states = switches(v, middle).states
        if len(states) != len(events):
            break
        way = torch.stack(states)[event, rows]
        left = torch.where(leaving, way == start, way != end)
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    seam = torch.isin(event, torch.tensor(mode.seams))
    seams = everywhere if mode.unknown_seams else torch.stack([low[seam], high[seam]])
    return torch.cat([low, high]), seams


@dataclass(frozen=True)
class Noise:
    """What rounding may do at each point of a curve.

    Attributes:
        value, slope: float64 [n].
    """

    value: Tensor
    slope: Tensor


@dataclass(frozen=True)
class Curve:
    """v and its slope at many points.

    Attributes:
        u: nats, float64 [n], ascending.
        value, slope: v(u) and v'(u), float64 [n].
        seams: nats, float64 [2, k]: between which two points ``F.softplus`` becomes linear.
    """

    u: Tensor
    value: Tensor
    slope: Tensor
    seams: Tensor

    @classmethod
    def of(cls, v: Function, u: Tensor, seams: Tensor) -> Curve:
        """v at the points ``u``."""
        return cls(u, *value_and_slope(v, u), seams)

    def with_points(self, other: Curve) -> Curve:
        """The curve with further points, in any order."""
        other = other.part(other.u.argsort())
        # Merged, since sorting a million points anew takes longer than computing most value functions there.
        place = torch.searchsorted(self.u, other.u, right=True) + torch.arange(len(other.u))
        old = torch.ones(len(self.u) + len(other.u), dtype=torch.bool)
        old[place] = False

        def merged(own: Tensor, further: Tensor) -> Tensor:
            return torch.empty(len(old), dtype=own.dtype).masked_scatter_(old, own).index_copy_(0, place, further)

        names = ("u", "value", "slope")
        return replace(self, **{name: merged(getattr(self, name), getattr(other, name)) for name in names})

    def part(self, index: Any) -> Curve:
        """Some of the points."""
        return replace(self, u=self.u[index], value=self.value[index], slope=self.slope[index])

    def finite(self) -> Curve:
        """The points with finite value and slope."""
        kept = self.value.isfinite() & self.slope.isfinite()
        return self if bool(kept.all()) else self.part(kept)

    @cached_property
    def noise(self) -> Noise:
        """Rounding of float64, relative to what v reaches at each point; at its seams also the jump of ``F.softplus``.

        A jump is a fault however small it is, so nothing is allowed for it but what rounding explains: of v, and of
        the slopes that an increment is compared with.
        """
        at_zero = self.value[int(torch.searchsorted(self.u, 0.0).clamp(max=len(self.u) - 1))]
        steepest = _outward(self.slope.abs(), self.u)
        size = self.value.abs() + (self.u * self.slope).abs()
        # Near 0 what is rounded on the way may be larger than v itself, which starts at 0: as large as 1 nat away.
        near = size[self.u.abs() <= 1]
        size = torch.maximum(size, near.max() if len(near) else size.new_zeros(()))
        gap = self.u.diff()
        gap = torch.maximum(F.pad(gap, (1, 0)), F.pad(gap, (0, 1)))
        value = 64 * EPS * size + 1e-7 * self.slope.abs() * gap
        if self.seams.numel():
            reach = JUMP * _outward((self.value - at_zero).abs(), self.u)
            first = torch.searchsorted(self.u, self.seams[0].contiguous())
            beyond = torch.searchsorted(self.u, self.seams[1].contiguous(), right=True)
            steps = torch.zeros(len(self.u) + 1, dtype=torch.long)
            steps.index_add_(0, first, torch.ones_like(first)).index_add_(0, beyond, -torch.ones_like(beyond))
            value = value + reach * (steps.cumsum(0)[:-1] > 0)
        return Noise(value, 64 * EPS * steepest)

    def reflected(self) -> Curve:
        """-v(-u): how v acts on a reflected row."""
        return Curve(-self.u.flip(0), -self.value.flip(0), self.slope.flip(0), -self.seams.flip(0))


def grid(cells: int = CELLS) -> Tensor:
    """Outcomes in nats, ascending: dense on [-100, 100], by orders of magnitude near 0 and up to 1e4."""
    side = (
        torch.cat(
            [
                torch.logspace(-12, -3, 2000, dtype=torch.float64),
                # A step that is no round number, so that no periodic fault hides between the points.
                torch.arange(1, cells // 2 + 1, dtype=torch.float64) * (EDGE / (cells // 2) * 0.99999871),
                torch.logspace(2, 4, 20000, dtype=torch.float64),
            ]
        )
        .sort()
        .values
    )
    return torch.cat([-side.flip(0), side.new_zeros(1), side])


def _outward(values: Tensor, u: Tensor) -> Tensor:
    """Largest of ``values`` between 0 and each point, on its own side of 0."""
    zero = int(torch.searchsorted(u, 0.0))
    losses = values[:zero].flip(0).cummax(0).values.flip(0) if zero else values[:0]
    gains = values[zero:].cummax(0).values if zero < len(values) else values[:0]
    return torch.cat([losses, gains])


def _misfit(a: Curve, b: Curve) -> Tensor:
    """How far the increment from a to b is from what the slopes at either end allow, in utility, float64 [n]."""
    h, rise = b.u - a.u, b.value - a.value
    low, high = torch.minimum(a.slope, b.slope) * h, torch.maximum(a.slope, b.slope) * h
    return torch.maximum(low - rise, rise - high).clamp(min=0).nan_to_num(nan=torch.inf)


def survey(v: Function, cells: int = CELLS, most: int = 400) -> Curve:
    """The curve of v over |u| <= 1e4 with all the points that a fault could hide at, non-finite ones included.

    Args:
        v: a value function; it is called many times, with up to ``cells`` outcomes.
        cells: of the dense part of the grid.
        most: suspicious cells that are looked into.
    """
    u = grid(cells)
    edges, seams = breakpoints(v, u)
    curve = Curve.of(v, u, seams)

    def more(points: Tensor) -> Curve:
        return Curve.of(v, torch.unique(points.clamp(-FAR, FAR)), seams)

    if len(edges):
        away = torch.cat([torch.zeros(1), torch.logspace(-9, -3, 13)]).double()
        curve = curve.with_points(more((edges[:, None] + torch.cat([-away, away])).flatten()))
    sound = curve.finite()
    if len(sound.u) < 3:
        return curve
    extremes = _extremes(sound)
    if len(extremes):
        # The next points on either side, so that what is as narrow as a cell has several points.
        sides = sound.u[(extremes[:, None] + torch.tensor([-1, 1])).clamp(0, len(sound.u) - 1)]
        share = torch.linspace(0, 1, 9, dtype=torch.float64)[1:-1]
        center = sound.u[extremes, None]
        inside = torch.cat([center + (side[:, None] - center) * share for side in sides.T])
        curve = curve.with_points(more(inside.flatten()))
        sound = curve.finite()
    misfit = _misfit(sound.part(slice(None, -1)), sound.part(slice(1, None)))
    floor = sound.noise.value
    doubt = misfit / (floor[1:] + floor[:-1] + 1e-300)
    worst = doubt.topk(min(most, len(doubt))).indices
    worst = worst[doubt[worst] > 0.5]
    if not len(worst):
        return curve
    # Bisected towards the half that fits worse: a jump stays, an inflection point vanishes.
    low, high = sound.part(worst), sound.part(worst + 1)
    seen = []
    for _ in range(45):
        middle = Curve.of(v, (low.u + high.u) / 2, seams)
        seen.append(middle)
        left, right = _misfit(low, middle), _misfit(middle, high)
        go_left = left > right
        low = _where(go_left, low, middle)
        high = _where(go_left, middle, high)
    found, value, slope = (torch.cat([getattr(part, name) for part in seen]) for name in ("u", "value", "slope"))
    return curve.with_points(Curve(found, value, slope, seams))


def _extremes(curve: Curve, most: int = 1000) -> Tensor:
    """Points, by number, where the slope is lower or higher than on either side: there it may go further in between."""
    before, slope, after = curve.slope[:-2], curve.slope[1:-1], curve.slope[2:]
    dip = torch.minimum(before, after) - slope
    peak = slope - torch.maximum(before, after)
    size = torch.maximum(dip, peak) - curve.noise.slope[1:-1]
    largest = size.topk(min(most, len(size)))
    return largest.indices[largest.values > 0] + 1


def _where(condition: Tensor, a: Curve, b: Curve) -> Curve:
    return replace(a, **{k: torch.where(condition, getattr(a, k), getattr(b, k)) for k in ("u", "value", "slope")})


def _without_single_points(slope: Tensor) -> Tensor:
    """Median of three: at a kink autograd may return anything for the one point that lies on it."""
    if len(slope) < 3:
        return slope
    a, b, c = slope[:-2], slope[1:-1], slope[2:]
    inner = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    return torch.cat([slope[:1], inner, slope[-1:]])


def falls(curve: Curve) -> tuple[float, float] | None:
    """Two outcomes u1 < u2 between which v falls by the most; None for a curve that never falls."""
    curve = curve.finite()
    if len(curve.u) < 3:
        return None
    floor = curve.noise
    slope = _without_single_points(curve.slope)
    drop = curve.value.diff() < -(floor.value[1:] + floor.value[:-1])
    down = slope < -floor.slope
    if not bool(drop.any()) and not bool(down.any()):
        return None
    # Shown by the largest fall within a nat of the fall that is nearest to 0.
    places = torch.cat([drop.nonzero().squeeze(1), down.nonzero().squeeze(1)])
    first = int(places[curve.u[places].abs().argmin()])
    window = (curve.u - curve.u[first]).abs() <= 1
    there = curve.part(window)
    highest = there.value.cummax(0)
    depth = highest.values - there.value
    worst = int(depth.argmax())
    if depth[worst] > 0:
        return float(there.u[highest.indices[worst]]), float(there.u[worst])
    return float(curve.u[max(first - 1, 0)]), float(curve.u[min(first + 1, len(curve.u) - 1)])


def bends_up(curve: Curve) -> tuple[float, float] | None:
    """Two gains u1 < u2 between which v is convex: its slope grows or v jumps; None where v is concave on gains."""
    curve = curve.finite()
    gains = curve.u > 0
    curve, floor = curve.part(gains), curve.noise
    if len(curve.u) < 3:
        return None
    value_floor, slope_floor = floor.value[gains], floor.slope[gains]
    slope = _without_single_points(curve.slope)
    least = slope.cummin(0)
    growth = slope - least.values - slope_floor
    h, rise = curve.u.diff(), curve.value.diff()
    both = value_floor[1:] + value_floor[:-1]
    jump = torch.maximum(rise - least.values[:-1] * h, slope[1:] * h - rise) - both - slope_floor[1:] * h
    if bool((growth > 0).any()):
        first = int((growth > 0).nonzero()[0])
        at = int(growth.masked_fill(curve.u > curve.u[first] + 1, -torch.inf).argmax())
        return float(curve.u[least.indices[at]]), float(curve.u[at])
    if bool((jump > 0).any()):
        at = int(jump.argmax())
        return float(curve.u[at]), float(curve.u[at + 1])
    return None
