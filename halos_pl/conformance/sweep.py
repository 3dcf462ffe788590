"""A search over learnable parameters: at many of their values v is looked at briefly, where suspicious closely.

A band in which v falls may lie between the few values at which the whole curve is searched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from random import Random

import torch

from halos_pl.conformance.curve import Curve
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.search import bends_up, falls
from value_functions import ValueFunction

# How far a parameter p moves, in units of 1 + |p|; the farthest first.
_SHARES = (8.0, 4.0, 2.0, 1.0, 0.5, 6.0, 3.0, 1.5, 0.25, 7.0, 5.0, 3.5, 2.5)
_DRAWS = 24


def swept(v: ValueFunction, most: int = 240) -> Iterator[tuple[str, ValueFunction]]:
    """Values of the learnable parameters that an optimizer may reach: one element moved, a parameter, or all at random.

    Args:
        v: the value function; it stays as it is.
        most: maximum number of moves of single elements and parameters.

    Yields:
        words that complete "with ...", and one copy, which is moved in place.
    """
    copy, draw = duplicate(v), Random(0)
    free = [(name, p, p.detach().clone()) for name, p in copy.named_parameters() if p.requires_grad and p.numel()]
    stride = 1 + 4 * sum(p.numel() for _, p, _ in free) // most
    places = [(name, p, slice(None)) for name, p, _ in free]
    places += [
        (f"{name}[{i}]", p, slice(i, i + 1))
        for name, p, _ in free
        if p.numel() > 1
        for i in range(0, p.numel(), stride)
    ]
    places = places[:: 1 + 4 * len(places) // most]
    shares = _SHARES[: max(1, most // 2 // max(1, len(places)))]

    def back() -> None:
        for _, p, start in free:
            p.copy_(start)

    with torch.no_grad():
        for name, parameter, elements in places:
            for distance in (sign * share for share in shares for sign in (-1, 1)):
                part = parameter.view(-1)[elements]
                part.add_(distance * (1 + part.abs()))
                yield f"{name} = {float(part[0]):.4g}, which an optimizer may reach", copy
                back()
        for _ in range(_DRAWS if sum(p.numel() for _, p, _ in free) > 1 else 0):
            for _, p, start in free:
                moves = [draw.uniform(-1, 1) for _ in range(p.numel())] if p.numel() <= 4096 else draw.uniform(-1, 1)
                p.add_(start.new_tensor(moves).view(start.shape if p.numel() <= 4096 else ()) * 8 * (1 + start.abs()))
            yield "all learnable parameters moved, as an optimizer may move them", copy
            back()


def suspects(v: ValueFunction, most: int = 3) -> list[tuple[str, ValueFunction]]:
    """Copies with parameters at which a coarse grid shows that v falls, bends up on gains or is not finite."""
    size = torch.logspace(-3, 4, 120, dtype=torch.float64) * 0.9999
    u = torch.cat([-size.flip(0), torch.zeros(1, dtype=torch.float64), size])
    nothing = torch.zeros(2, 1, dtype=torch.float64)
    found = []
    for words, moved in swept(v):
        with suppress(Exception), torch.enable_grad():  # that it raises, a clause reports
            curve = Curve.of(moved, u, nothing[:, :0], nothing)
            if len(curve.finite().u) < len(u) or falls(curve) or bends_up(curve):
                found.append((words, duplicate(moved)))
    return found[:: -(-len(found) // most) or 1]
