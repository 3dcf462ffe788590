"""Search for faults of a value function over its whole range.

Up to 100 nats a grid cell of 4e-4 nats is 25 times narrower than the narrowest fault that must be found (0.01 nats),
and half a million points cost a twentieth of a second. Up to 10,000 nats cells are 0.1 nats wide. Narrower faults are
searched where there is a sign of one: at the constants that the code compares with, and in cells whose increment does
not fit the slopes at their ends (a jump has no derivative).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halos_pl.conformance.curve import CELLS, END, EPS, Curve, grid, rows_at_once
from halos_pl.conformance.rounding import Function, sums
from halos_pl.conformance.switches import breakpoints


def _misfit(a: Curve, b: Curve) -> Tensor:
    """Distance of the increment from a to b from the range that the slopes at both ends allow, utility, float64 [n]."""
    h, rise = b.u - a.u, b.value - a.value
    low, high = torch.minimum(a.slope, b.slope) * h, torch.maximum(a.slope, b.slope) * h
    return torch.maximum(low - rise, rise - high).clamp(min=0).nan_to_num(nan=torch.inf)


def survey(v: Function, cells: int = CELLS, most: int = 400) -> Curve:
    """The curve of v over |u| <= 1e8 with all the points where a fault could hide, non-finite ones included.

    Args:
        v: a value function; it is called many times, with up to ``cells`` outcomes.
        cells: number of cells in the dense part of the grid.
        most: maximum number of suspicious cells to examine.
    """
    u = grid(cells)
    rows = rows_at_once(v)
    edges, seams = breakpoints(v, u, rows)
    some = u[:: max(1, len(u) // 10_000)]
    rounded = torch.stack([some, torch.cat([sums(v, piece) for piece in some.split(max(1, rows // 2))])])
    curve = Curve.of(v, u, seams, rounded)

    def more(points: Tensor) -> Curve:
        return Curve.of(v, torch.unique(points.clamp(-END, END)), seams, rounded)

    if len(edges):
        away = torch.cat([torch.zeros(1), torch.logspace(-9, -3, 13)]).double()
        curve = curve.with_points(more((edges[:, None] + torch.cat([-away, away])).flatten()))
    sound = curve.finite()
    if len(sound.u) < 3:
        return curve
    extremes = _extremes(sound)
    if len(extremes):
        # The next points on either side, so that a fault as narrow as a cell has several points.
        sides = sound.u[(extremes[:, None] + torch.tensor([-1, 1])).clamp(0, len(sound.u) - 1)]
        share = torch.linspace(0, 1, 9, dtype=torch.float64)[1:-1]
        center = sound.u[extremes, None]
        inside = torch.cat([center + (side[:, None] - center) * share for side in sides.T])
        curve = curve.with_points(more(inside.flatten()))
        sound = curve.finite()
    misfit = _misfit(sound.part(slice(None, -1)), sound.part(slice(1, None)))
    floor = sound.noise
    doubt = misfit / (floor[1:] + floor[:-1] + 1e-300)
    worst = doubt.topk(min(most, len(doubt))).indices
    worst = worst[doubt[worst] > 0.5]
    if not len(worst):
        return curve
    # Bisected towards the less consistent half: a jump stays, an inflection point vanishes.
    low, high = sound.part(worst), sound.part(worst + 1)
    seen = []
    for _ in range(45):
        middle = Curve.of(v, (low.u + high.u) / 2, seams, rounded)
        seen.append(middle)
        left, right = _misfit(low, middle), _misfit(middle, high)
        go_left = left > right
        low = _where(go_left, low, middle)
        high = _where(go_left, middle, high)
    u, value, slope = (torch.cat([getattr(part, name) for part in seen]) for name in ("u", "value", "slope"))
    return curve.with_points(Curve(u, value, slope, seams, rounded))


def _extremes(curve: Curve, most: int = 1000) -> Tensor:
    """Indices of points whose slope is a local extremum: the slope may be more extreme between them."""
    before, slope, after = curve.slope[:-2], curve.slope[1:-1], curve.slope[2:]
    dip = torch.minimum(before, after) - slope
    peak = slope - torch.maximum(before, after)
    size = torch.maximum(dip, peak) - curve.slope_noise[1:-1]
    largest = size.topk(min(most, len(size)))
    return largest.indices[largest.values > 0] + 1


def _where(condition: Tensor, a: Curve, b: Curve) -> Curve:
    return replace(a, **{k: torch.where(condition, getattr(a, k), getattr(b, k)) for k in ("u", "value", "slope")})


def _without_single_points(curve: Curve) -> Tensor:
    """The slopes without those at single outcomes, which autograd may choose at a kink.

    Outcomes a few roundings apart are one: beside a kink, v may round them to the kink itself.
    """
    apart = curve.u.diff() > 8 * EPS * curve.u[1:].abs()
    first = torch.cat([apart.new_ones(1), apart])
    slope = curve.slope[first]
    if len(slope) > 2:
        a, b, c = slope[:-2], slope[1:-1], slope[2:]
        inner = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
        slope = torch.cat([slope[:1], inner, slope[-1:]])
    return slope[first.cumsum(0) - 1]


def falls(curve: Curve) -> tuple[float, float] | None:
    """Two outcomes u1 < u2 between which v falls by the most; None for a curve that never falls."""
    curve = curve.finite()
    if len(curve.u) < 3:
        return None
    slope = _without_single_points(curve)
    drop = curve.value.diff() < -(curve.noise[1:] + curve.noise[:-1])
    down = slope < -curve.slope_noise
    if not bool(drop.any()) and not bool(down.any()):
        return None
    # The largest fall within one nat of the fall nearest to 0.
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
    """Two gains u1 < u2 between which v is convex: its slope grows or v jumps; None if v is concave on gains."""
    curve = curve.finite()
    gains = curve.u > 0
    value_floor, slope_floor = curve.noise[gains], curve.slope_noise[gains]
    curve = curve.part(gains)
    if len(curve.u) < 3:
        return None
    slope = _without_single_points(curve)
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
