"""Memory of one device, by part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from halos_pl.batch import TokenBatch
from halos_pl.plan.error import PlanError
from halos_pl.plan.fake import Work, step_memory
from halos_pl.plan.live import PARTS, Moment
from halos_pl.plan.rows import Rows, rows_of_unit
from halos_pl.plan.run import Numerics, Settings
from halos_pl.policy.head import GPU_LOGITS, LOGITS

#: Steps with more than twice as many rows of equal length are computed from steps with these and twice these.
_FEW = 3
#: Rules by which parts are computed. All others are counts of bytes that a run allocates and keeps.
ESTIMATES = {
    "activations": "the engine's own step on tensors without data: what autograd keeps for the rows above",
    "autocast copies": "the same step: half-precision copies of weights, which autocast keeps from forward to backward",
    "dequantized weights": "the same step: a quantized layer dequantizes its matrix in each pass, one layer at a time",
    "logits": "the same step: tensors of the head with the vocabulary's dimension",
    "working memory": "the same step: temporary tensors at the peak; buffers inside kernels are not counted",
    "gradients": "the same step: those that exist at the peak",
    "gathered weights": "embedding and head for the whole step, and two decoder layers at a time",
    "reduced gradients": "one layer's gradients before they are reduced, and their float32 copy",
    "optimizer step": "measured on small tensors: temporary memory per parameter",
}


@dataclass(frozen=True)
class Layout:
    """Where a run is trained.

    Attributes:
        cards: number of devices, over all nodes.
        sharded: whether weights, gradients and optimizer are spread over devices (``fsdp2``).
        replicas: number of groups that each hold a whole model, if sharded.
        cuda: whether the devices are GPUs.
        whole_reference: whether each device holds the whole reference although the policy is sharded.
        reshard: whether a sharded layer is freed after its forward pass.

    Raises:
        PlanError: if the replicas do not divide the devices.
    """

    cards: int = 1
    sharded: bool = False
    replicas: int = 1
    cuda: bool = True
    whole_reference: bool = False
    reshard: bool = True

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.cards % self.replicas:
            raise PlanError(
                f"--replicas {self.replicas} does not divide the {self.cards} devices; choose a divisor of {self.cards}"
            )
        if self.replicas > 1 and not self.sharded:
            raise PlanError(f"--replicas {self.replicas} needs --strategy fsdp2; ddp has a whole model on each device")

    @property
    def shards(self) -> int:
        """Number of devices that share a model."""
        return self.cards // self.replicas if self.sharded else 1

    @property
    def strategy(self) -> str:
        """Name for the Trainer."""
        return "fsdp2" if self.sharded else "ddp" if self.cards > 1 else "auto"


@dataclass
class Memory:
    """Memory of one device.

    Attributes:
        lasting: bytes of the parts that exist during the whole run.
        peak: bytes of the parts at the moment of the most memory.
        moment: that moment.
    """

    lasting: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    moment: str = ""

    @property
    def parts(self) -> dict[str, int]:
        """All parts that take memory."""
        return {name: size for name, size in {**self.lasting, **self.peak}.items() if size}

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


class Planner:
    """Computes the memory of a run in different layouts, and each step only once.

    Args:
        settings: the run.
        computed: called after each step that was computed, for progress.
    """

    def __init__(self, settings: Settings, computed: Callable[[], None] = lambda: None) -> None:
        self.settings, self._computed = settings, computed
        self._steps: dict[tuple[object, ...], list[Moment]] = {}

    def memory(
        self, layout: Layout, rows: Rows, *, gradient_checkpointing: bool, micro_batch_rows: int | None
    ) -> Memory:
        """Memory of the busiest device.

        Args:
            layout: devices.
            rows: rows of a step; each device has an equal share.
            gradient_checkpointing, micro_batch_rows: as in the run's settings, which they replace.

        Raises:
            PlanError: if the model cannot be run without data.
        """
        numerics = self.settings.numerics(sharded=layout.sharded)
        work = self._work(numerics, gradient_checkpointing, micro_batch_rows, GPU_LOGITS if layout.cuda else LOGITS)
        moments = self._moments(work, rows, math.ceil(self.settings.batch_size / layout.cards))
        candidates = [self._moment(layout, numerics, moment) for moment in moments]
        candidates += self._after_backward(layout, numerics, moments)
        moment, parts = max(candidates, key=lambda each: sum(each[1].values()))
        return Memory(self.lasting(layout), {name: round(size) for name, size in parts.items()}, moment)

    def _moments(self, work: Work, rows: Rows, units: int) -> list[Moment]:
        """The moments of a step of ``units`` rows (pairs, if the objective compares pairs) on a device."""
        each = rows_of_unit(self.settings.needs)
        micro = None if work.micro_batch_rows is None else max(1, work.micro_batch_rows // each)
        if micro is not None:
            units = min(units, 2 * micro)  # all micro-batches beyond the second are alike
        if not rows.alike or (units if micro is None else micro) <= 2 * _FEW or (micro and units < 2 * micro):
            return self._step(work, rows.make(units))
        if micro is None:
            few, more = (self._step(work, rows.make(number)) for number in (_FEW, 2 * _FEW))
            return _with_rows(few, more, units)
        few, more = (
            self._step(replace(work, micro_batch_rows=number * each), rows.make(2 * number))
            for number in (_FEW, 2 * _FEW)
        )
        return _with_rows(few, more, micro)

    def _step(self, work: Work, batch: TokenBatch) -> list[Moment]:
        settings = work.weights, work.autocast, work.gradient_checkpointing, work.micro_batch_rows, work.logits
        key = (*settings, *_key(batch))
        if key not in self._steps:
            self._steps[key] = step_memory(work, batch)
            self._computed()
        return self._steps[key]

    def _work(
        self, numerics: Numerics, gradient_checkpointing: bool, micro_batch_rows: int | None, logits: int
    ) -> Work:
        run = self.settings
        return Work(
            config=run.policy.config,
            alike=run.parameters.alike,
            lora=run.lora,
            quantize=run.quantize,
            weights=numerics.used,
            adapter=numerics.adapter,
            autocast=numerics.autocast,
            gradient_checkpointing=gradient_checkpointing,
            shares_prefixes=run.shares_prefixes,
            needs=run.needs,
            reference=(run.other or run.policy).config if run.has_reference else None,
            adapter_off=run.adapter_off,
            micro_batch_rows=micro_batch_rows,
            logits=logits,
        )

    def lasting(self, layout: Layout) -> dict[str, int]:
        """Bytes of the parts that exist during the whole run, on each device."""
        run, shards = self.settings, layout.shards
        numerics = run.numerics(sharded=layout.sharded)
        counts, size = run.parameters, numerics.weights.itemsize
        optimizer = run.optimizers[layout.cuda]
        matrices = counts.trained - counts.trained_vectors
        copy, exact = run.reference_counts
        of_reference = run.reference_itemsize(sharded=layout.sharded)
        trained = self._trained_shards(layout)
        parts = {
            "weights": counts.total * (counts.bits / 8 if counts.bits else size) / shards
            + counts.adapter * numerics.adapter.itemsize,
            "master weights": run.masters(numerics) * 4 / trained,
            "optimizer state": (matrices * optimizer.matrix + counts.trained_vectors * optimizer.vector) / trained,
            "reference": copy * of_reference / (1 if layout.whole_reference else shards) + exact * 4 / trained,
            # DDP reduces gradients in buckets that it keeps.
            "gradient buckets": counts.trained * run.trained_dtype(numerics).itemsize * (layout.strategy == "ddp"),
        }
        return {name: math.ceil(each) for name, each in parts.items()}

    def _trained_shards(self, layout: Layout) -> int:
        """Number of devices that share a trained weight; each has the whole adapter."""
        return 1 if self.settings.lora else layout.shards

    def _moment(self, layout: Layout, numerics: Numerics, moment: Moment) -> tuple[str, dict[str, float]]:
        """The parts at a moment of the step on a device."""
        parts: dict[str, float] = {name: moment.parts[name] for name in PARTS}
        parts["gradients"] = moment.gradients
        shards = self._trained_shards(layout)
        if layout.sharded:
            if not self.settings.lora:
                parts["gradients"] *= numerics.weights.itemsize / numerics.used.itemsize / shards
            parts |= self._of_sharding(layout, numerics)
        if moment.micro_batch:  # float32 sums of the gradients of earlier micro-batches
            parts["gradients"] += 4 * self.settings.masters(numerics) / shards
        return "the passes of a micro-batch", parts

    def _of_sharding(self, layout: Layout, numerics: Numerics) -> dict[str, float]:
        counts, used = self.settings.parameters, numerics.used.itemsize
        gathered = counts.outside + 2 * counts.block if layout.reshard else counts.total
        size: float = used * gathered
        if counts.bits:  # embedding and head are not quantized
            size = used * counts.outside + counts.block_bits / 8 * (gathered - counts.outside)
        parts: dict[str, float] = {"gathered weights": size}
        if not self.settings.lora:  # an adapter is not sharded
            largest = max(counts.trained_block, counts.trained_outside)
            parts["reduced gradients"] = used * (counts.trained_outside + counts.trained_block) + 4 * largest
        return parts

    def _after_backward(
        self, layout: Layout, numerics: Numerics, moments: list[Moment]
    ) -> list[tuple[str, dict[str, float]]]:
        """The parts when gradients move to the float32 copies, and in the optimizer's step."""
        run, shards = self.settings, self._trained_shards(layout)
        counts, masters = run.parameters, run.masters(numerics)
        optimizer, dtype = run.optimizers[layout.cuda], run.trained_dtype(numerics)
        size = 4 if masters else dtype.itemsize
        gradients = counts.trained * size / shards
        temporary = (optimizer.step * counts.trained + optimizer.largest * counts.largest) * size / 4 / shards
        candidates = [("the optimizer's step", {"gradients": gradients, "optimizer step": temporary})]
        if masters:
            half = dtype.itemsize * (masters if moments[-1].micro_batch else counts.largest)
            candidates.append(("after the last backward pass", {"gradients": gradients + half / shards}))
        return candidates


def _with_rows(few: list[Moment], more: list[Moment], units: int) -> list[Moment]:
    """The moments of ``units`` rows from those of ``_FEW`` and of twice as many: all but logits grow evenly."""
    before = {(m.micro_batch, m.lowest, m.phase, m.gradients): m.parts for m in few}
    times = (units - 2 * _FEW) / _FEW
    result = []
    for moment in more:
        parts = dict(moment.parts)
        if own := before.get((moment.micro_batch, moment.lowest, moment.phase, moment.gradients)):
            grown = {part: size + times * (size - own[part]) for part, size in parts.items() if part != "logits"}
            parts |= {part: max(0, round(size)) for part, size in grown.items()}
        result.append(replace(moment, parts=parts))
    return result


def _key(batch: TokenBatch) -> tuple[object, ...]:
    rows = [len(c) for c in batch.completions], [len(p) for p in batch.prompts], batch.prompt.tolist()
    return tuple(map(tuple, (*rows, batch.labels.mismatched.tolist(), batch.labels.pair.tolist())))
