"""The plan of a run: parameters, tokens, FLOP, memory of a device, and the cards that it fits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halos_pl.batch import TokenBatch
from halos_pl.common.progress import counting
from halos_pl.plan.error import PlanError
from halos_pl.plan.layout import Fit, smallest
from halos_pl.plan.memory import ESTIMATES, Layout, Memory, Planner
from halos_pl.plan.rows import Rows, assumed, largest, longest
from halos_pl.plan.run import Settings
from halos_pl.training.throughput import step_flops, step_tokens


def assumed_rows(run: Settings, length: int, why: str) -> Rows:
    """Rows that all have ``length`` tokens.

    Args:
        run: the run.
        length: tokens of prompt and completion together.
        why: origin of the length, in words.
    """
    batch = assumed(run.batch_size, length, run.needs)
    source = f"assumed: each row has {length} tokens ({why}), half of them prompt, and no two rows share a prompt"
    return Rows(source, [batch], None, lambda rows: assumed(rows, length, run.needs), alike=True)


def rows_of(run: Settings, batches: Sequence[TokenBatch], steps: int) -> Rows:
    """Rows of training data.

    Args:
        run: the run.
        batches: the first steps of an epoch.
        steps: number of steps of an epoch.
    """
    source = f"counted in the first {len(batches)} of {steps} steps; memory is that of the longest of their rows"
    batch = largest(batches)
    return Rows(source, batches, steps, lambda rows: longest(batch, rows, run.needs), alike=False)


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        run: the run.
        rows: its rows.
        layout: devices that were asked for.
        memory: memory of the busiest device.
        tokens: tokens of a step: distinct prompts and completions, mismatched rows included.
        flops: useful FLOP of a step, see :func:`halos_pl.training.throughput.step_flops`; None if unknown.
        card: name and bytes of the card that was asked for; None if none was.
        fits: whether the run fits it.
        smallest: smallest layout by name of the card, None if there is none.
    """

    run: Settings
    rows: Rows
    layout: Layout
    memory: Memory
    tokens: float
    flops: float | None
    card: tuple[str, float] | None
    smallest: dict[str, tuple[float, Fit | None]]

    @property
    def fits(self) -> bool | None:
        """Whether the run fits the card; None without a card."""
        return None if self.card is None else self.memory.total <= self.card[1]

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON; memory in bytes."""
        run, counts = self.run, self.run.parameters
        numerics = run.numerics(sharded=self.layout.sharded)
        return {
            "model": {"source": run.policy.source, "type": run.policy.config.model_type},
            "parameters": {"total": counts.total, "trained": counts.trained, "adapter": counts.adapter},
            "optimizer": run.optimizers[self.layout.cuda].name,
            "reference": run.reference_name,
            "dtypes": {
                "weights": str(numerics.weights).removeprefix("torch."),
                "used": str(numerics.autocast or numerics.used).removeprefix("torch."),
            },
            "rows": {
                "source": self.rows.source,
                "batch_size": run.batch_size,
                "tokens_per_step": self.tokens,
                "steps_per_epoch": self.rows.steps,
            },
            "flops_per_step": self.flops,
            "layout": _layout(self.layout),
            "settings": {
                "gradient_checkpointing": run.gradient_checkpointing,
                "micro_batch_rows": run.micro_batch_rows,
                "prefix_sharing": run.shares_prefixes,
            },
            "memory": {"parts": self.memory.parts, "total": self.memory.total, "peak": self.memory.moment},
            "card": None if self.card is None else {"name": self.card[0], "bytes": self.card[1], "fits": self.fits},
            "smallest": {
                name: None
                if fit is None
                else {
                    **_layout(fit.layout),
                    "gradient_checkpointing": fit.gradient_checkpointing,
                    "micro_batch_rows": fit.micro_batch_rows,
                    "parts": fit.memory.parts,
                    "total": fit.memory.total,
                }
                for name, (_, fit) in self.smallest.items()
            },
            "rules": {name: rule for name, rule in ESTIMATES.items() if name in self.memory.parts},
        }


def _layout(layout: Layout) -> dict[str, Any]:
    return {"devices": layout.cards, "strategy": layout.strategy, "replicas": layout.replicas}


def make_plan(
    run: Settings, rows: Rows, layout: Layout, *, card: tuple[str, float] | None, cards: dict[str, float]
) -> Plan:
    """Plans a run.

    Args:
        run: the run.
        rows: its rows.
        layout: devices.
        card: name and bytes of the card to fit; None for none.
        cards: bytes of the cards to find the smallest layout for, by name.

    Raises:
        PlanError: if there are more devices than rows, or the model cannot be planned.
    """
    if layout.cards > run.batch_size:
        raise PlanError(
            f"{layout.cards} devices are more than the {run.batch_size} examples of a step; raise data.batch_size or"
            " use fewer devices"
        )
    with counting("planning", "steps computed") as computed:
        planner = Planner(run, computed)
        memory = planner.memory(
            layout,
            rows,
            gradient_checkpointing=run.gradient_checkpointing,
            micro_batch_rows=run.micro_batch_rows,
        )
        fits = {name: (size, smallest(planner, rows, size)) for name, size in cards.items()}
    flops = None
    if run.cost is not None:
        share_of_reference = 0.0 if run.stored else run.reference_share
        flops = statistics.fmean(step_flops(run.cost, batch, reference=share_of_reference) for batch in rows.batches)
    return Plan(
        run=run,
        rows=rows,
        layout=layout,
        memory=memory,
        tokens=statistics.fmean(map(step_tokens, rows.batches)),
        flops=flops,
        card=card,
        smallest=fits,
    )
