"""The smallest layout that a run fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from halos_pl.plan.memory import Layout, Memory, Planner
from halos_pl.plan.rows import Rows, rows_of_unit

#: Numbers of cards that are tried.
CARDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Fit:
    """A layout that a run fits.

    Attributes:
        layout: devices.
        gradient_checkpointing, micro_batch_rows: settings that it assumes.
        memory: memory of one device.
    """

    layout: Layout
    gradient_checkpointing: bool
    micro_batch_rows: int | None
    memory: Memory


def smallest(planner: Planner, rows: Rows, memory: float) -> Fit | None:
    """The layout with the fewest cards, of the numbers in ``CARDS``, that a run fits; None if it fits none.

    The run's own settings come first. If they do not fit, gradient checkpointing is switched on, and a micro-batch is
    made as large as fits. Several cards share the model (``fsdp2`` with one replica), which takes the least memory;
    a run that cannot be sharded gets one card.

    Args:
        planner: the run.
        rows: rows of a step.
        memory: bytes of a card.
    """
    run = planner.settings
    for cards in CARDS[:1] if run.unsharded else CARDS:
        if cards > run.batch_size:
            return None
        layout = Layout(cards, sharded=cards > 1)

        def fit(checkpointing: bool, micro: int | None, layout: Layout = layout) -> Fit | None:
            needed = planner.memory(layout, rows, gradient_checkpointing=checkpointing, micro_batch_rows=micro)
            return Fit(layout, checkpointing, micro, needed) if needed.total <= memory else None

        if sum(planner.lasting(layout).values()) > memory:
            continue
        if own := fit(run.gradient_checkpointing, run.micro_batch_rows):
            return own
        one, each = 2 if run.needs.pairs else 1, rows_of_unit(run.needs)
        if (best := fit(True, one)) is None:
            continue
        sizes = [one]
        while 2 * sizes[-1] < each * math.ceil(run.batch_size / cards):
            sizes.append(2 * sizes[-1])
        fits, too_many = 0, len(sizes)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if larger := fit(True, sizes[middle]):
                best, fits = larger, middle
            else:
                too_many = middle
        return best
    return None
