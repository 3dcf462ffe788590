"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from halos_pl.plan.layout import Fit
from halos_pl.plan.memory import ESTIMATES
from halos_pl.plan.plan import Plan

GB = 1e9


def _bytes(size: float) -> str:
    for unit, name in ((GB, "GB"), (1e6, "MB")):
        if size >= 0.01 * unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 1e3:,.2f} kB"


def lines(plan: Plan) -> Iterator[str]:
    """The lines of a report. GB are 10^9 bytes."""
    run, counts, layout = plan.run, plan.run.parameters, plan.layout
    numerics = run.numerics(sharded=layout.sharded)
    optimizer = run.optimizers[layout.cuda]
    yield f"model        {run.policy.config.model_type} ({run.policy.source})"
    adapter = f", adapter {counts.adapter:,}" if counts.adapter else ""
    yield f"parameters   {counts.total:,}; trained {counts.trained:,}{adapter}"
    used = str(numerics.autocast or numerics.used).removeprefix("torch.")
    how = " by autocast" if numerics.autocast else " when gathered" if numerics.gathered else ""
    stored = str(numerics.weights).removeprefix("torch.")
    yield f"numbers      weights {stored}{f', used in {used}{how}' if used != stored else ''}"
    masters = ", float32 master weights 4" if run.masters(numerics) else ""
    yield f"optimizer    {optimizer.name}: {optimizer.matrix:.3g} bytes of state per trained parameter{masters}"
    yield f"reference    {run.reference_name}{_reference_note(plan)}"
    yield f"rows         {plan.rows.source}"
    epoch = f"; steps per epoch: {plan.rows.steps:,}" if plan.rows.steps else ""
    each = "pairs" if run.needs.pairs else "rows"
    further = {"mismatched rows": run.needs.mismatched, "gold answers": run.needs.gold}
    included = "".join(f", {name} included" for name, needed in further.items() if needed)
    yield f"step         {run.batch_size} {each}, {plan.tokens:,.0f} tokens{included}{epoch}"
    yield f"useful FLOP  {'unknown: a mixture of experts' if plan.flops is None else f'{plan.flops:.3g} per step'}"
    devices = f"{layout.cards} device{'s' if layout.cards > 1 else ''}"
    replicas = f", {layout.replicas} replicas" if layout.replicas > 1 else ""
    strategy = f" ({layout.strategy}{replicas})" if layout.cards > 1 else ""
    yield ""
    yield f"memory of each of {devices}{strategy}, {_settings(run.gradient_checkpointing, run.micro_batch_rows)}"
    width = max(map(len, plan.memory.parts), default=0)
    for name, size in plan.memory.parts.items():
        mark = "  (estimate)" if name in ESTIMATES else ""
        yield f"  {name:<{width}} {_bytes(size):>12}{mark}"
    yield f"  {'together':<{width}} {_bytes(plan.memory.total):>12}  at the peak, in {plan.memory.moment}"
    if plan.card is not None:
        name, capacity = plan.card
        verdict = f"fits, {_bytes(capacity - plan.memory.total)} are free" if plan.fits else "DOES NOT FIT"
        yield f"  {name:<{width}} {_bytes(capacity):>12}  {verdict}"
    if plan.smallest:
        yield ""
        yield f"smallest layout for {run.batch_size} {each} per step"
        for name, (capacity, fit) in plan.smallest.items():
            yield f"  {name}: {_fit(fit, capacity)}"
    yield ""
    yield "estimates (all others are counted; GB are 10^9 bytes):"
    for name in plan.memory.parts:
        if name in ESTIMATES:
            yield f"  {name}: {ESTIMATES[name]}"
    for note in notes(plan):
        yield f"note: {note}"


def _settings(checkpointing: bool, micro: int | None) -> str:
    rows = "all rows in one pass" if micro is None else f"micro_batch_rows {micro}"
    return f"gradient_checkpointing {str(checkpointing).lower()}, {rows}"


def _fit(fit: Fit | None, size: float) -> str:
    if fit is None:
        return "none of up to 256 cards, or as many as a step has examples"
    layout = fit.layout
    spread = "sharded (fsdp2)" if layout.sharded else "not sharded"
    cards = f"{layout.cards} card{'s' if layout.cards > 1 else ''}"
    settings = _settings(fit.gradient_checkpointing, fit.micro_batch_rows)
    return f"{cards}, {spread}, {settings}; {_bytes(fit.memory.total)} of {_bytes(size)} on each"


def _reference_note(plan: Plan) -> str:
    run = plan.run
    if not run.has_reference:
        return " (the objective needs none)"
    if run.adapter_off:
        return ": the policy without its adapter, no memory of its own"
    if run.stored:
        return ": its log-probs are stored; it takes memory until all of them are"
    return ""


def notes(plan: Plan) -> Iterator[str]:
    """What the plan does not cover, or assumes of the run."""
    run = plan.run
    if run.unsharded:
        yield f"the smallest layout is one card, as this run cannot be sharded: {run.unsharded}"
    if run.shares_prefixes:
        yield "prompts are taken to be shared between rows; a self-test decides when a run starts"
    if run.reference_is_assumed:
        yield f"{run.reference_name} is taken to hold a copy of the policy"
    if run.needs.samples:
        yield "the key-value cache of the samples that the objective draws from the policy is not counted"
    if run.needs.pairs and run.micro_batch_rows == 1:
        yield "both rows of a pair stay in one micro-batch"
