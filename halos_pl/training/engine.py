"""One optimizer step's forward and backward passes, without Lightning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Routing, TokenBatch
from halos_pl.distributed import world_size
from halos_pl.labels import Labels
from halos_pl.objective.halo import Context, Objective, Result, refuse_gold
from halos_pl.policy.kl import completion_kl
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.reference import check_divergence
from halos_pl.policy.scorer import Scorer, scorer_of
from halos_pl.policy.sharding import is_sharded, most_over_ranks
from halos_pl.training.parts import Part, Rows, on_device, split, without_gold
from halos_pl.training.replay import Draw, forked, replayed
from halos_pl.training.scored_rows import Reference, as_leaves, differentiable, scored_rows, widened


class Deferral:
    """A ``defer_sync`` that only records whether it is entered, for trainers that synchronize gradients themselves.

    Attributes:
        active: Whether more micro-batches of the step follow.
    """

    active = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False


class StepEngine:
    """Computes an optimizer step in micro-batches, with the same result however it is split.

    Mismatched rows are scored first. Then z0 is computed, once for the step and all ranks. Then come the rows with
    gradient; pairs stay together. All rows share one denominator. With several ranks, gradients must be averaged over
    them, as DDP and FSDP do.

    >>> engine = StepEngine(objective, policy, reference, micro_batch_rows=8)        # doctest: +SKIP
    >>> for batch in batches:                                                        # doctest: +SKIP
    ...     engine.step(batch)
    ...     optimizer.step()
    ...     optimizer.zero_grad()

    Args:
        objective: Loss to minimize.
        policy: Model to train; also a wrapper around the scorer, such as DDP.
        reference: Source of log pi_ref; None if the objective needs none.
        micro_batch_rows: Number of rows in a forward pass with gradient; None for all rows of the step.
        sampler: Adds samples of the policy to a batch; required if the objective needs them.

    Raises:
        TypeError: if the objective, the policy or the reference has the wrong type.
        ValueError: if ``micro_batch_rows`` is below 1, a reference or sampler that the objective needs is missing, or
            the reference consists of several models and the objective needs the exact KL divergence.
    """

    def __init__(
        self,
        objective: Objective,
        policy: Scorer,
        reference: Reference | None = None,
        micro_batch_rows: int | None = None,
        sampler: Callable[[TokenBatch], TokenBatch] | None = None,
    ) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(
                f"objective is a {type(objective).__name__}; pass an Objective, such as load_objective(...)"
            )
        if not isinstance(scorer_of(policy), Scorer):
            raise TypeError(f"policy is a {type(policy).__name__}; pass a Scorer, such as Scorer(model)")
        if reference is not None and not callable(getattr(reference, "logps", None)):
            raise TypeError(f"reference is a {type(reference).__name__}; pass FixedModel(model, policy), for example")
        if micro_batch_rows is not None and not (isinstance(micro_batch_rows, int) and micro_batch_rows >= 1):
            raise ValueError(f"micro_batch_rows is {micro_batch_rows}; it must be a whole number from 1, or None")
        if objective.needs.reference and reference is None:
            raise ValueError("the objective needs log pi_ref; give the engine a reference")
        check_divergence(reference, objective.needs)
        if objective.needs.samples and sampler is None:
            raise ValueError("the objective needs samples of the policy; give the engine a sampler")
        self.objective, self.policy, self.reference = objective, policy, reference
        self.micro_batch_rows, self.sampler = micro_batch_rows, sampler

    # -- entry points ---------------------------------------------------------------------------------

    def step(
        self,
        batch: TokenBatch,
        *,
        backward: Callable[[Tensor], object] = Tensor.backward,
        defer_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> list[Part]:
        """Computes the loss of a step and back-propagates it; gradients accumulate in ``.grad``.

        Args:
            batch: This rank's share of the step.
            backward: Called with the loss of each micro-batch.
            defer_sync: Context of all micro-batches but the last, such as ``ddp.no_sync``, so that ranks exchange
                gradients once.
        """
        if self.sampler and self.objective.needs.samples:
            batch = self.sampler(batch)
        parts = list(_Step(self, batch, backward, defer_sync).parts())
        self.objective.observe([part.result for part in parts])
        return parts

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch, moment: object = None) -> Iterator[Part]:
        """Yields the parts of a step in turn, without a backward pass.

        The random state does not change, because a run that resumes after an evaluation does not repeat the evaluation.

        Args:
            batch: This rank's share of the step; it may have no rows, which gives one part without rows.
            moment: Seeds the policy's samples, together with the rows' names and torch's seed; for example, the run's
                step.
        """
        if self.sampler and self.objective.needs.samples and len(batch):
            with forked(scorer_of(self.policy).device):
                names = hashlib.sha256(repr((batch.row_ids, moment, torch.initial_seed())).encode())
                torch.manual_seed(int.from_bytes(names.digest()[:4]))
                batch = self.sampler(batch)
        yield from _Step(self, batch, None, nullcontext).parts()

    @torch.no_grad()
    def divergences(self, batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields KL(policy || reference) at the completion tokens of rows that are not mismatched.

        Args:
            batch: This rank's share of the step; it may have no rows.

        Yields:
            For a few rows at a time, or none, nats, float32 [m, T], and the number of tokens with loss. Gold answers
            are left out.
        """
        assert self.reference is not None
        step = _Step(self, batch, None, nullcontext)
        instead = step.stand_ins[0]
        rows = step.kinds[0]
        if batch.labels.has_gold:
            rows, _ = without_gold(rows, batch)
        for index in step.equal_parts(rows)[0]:
            chosen, m = index if len(index) else instead, len(index)
            part = step.batch.select(chosen.index, chosen.numbers)
            kl = completion_kl(self.policy, self.reference, part)
            yield kl[:m], completion_mask(part)[:m].sum()


def _stand_in(device: torch.device) -> TokenBatch:
    """A row of one token, and a mismatched one: the passes of a rank without rows, whose results are dropped."""
    ids = torch.zeros(1, dtype=torch.long, device="cpu")
    mismatched = torch.tensor([False, True], device="cpu")
    labels = Labels(desirable=torch.zeros_like(mismatched), mismatched=mismatched)
    return TokenBatch([ids], [ids, ids], prompt=ids.repeat(2), labels=labels).to(device)


class _Step:
    """The state of one step.

    Args:
        engine: Engine that computes the step.
        batch: Rows of the step.
        backward, defer_sync: As in :meth:`StepEngine.step`; ``backward`` is None for a step without gradient.

    Attributes:
        batch: The rows, or the stand-ins of a rank without rows.
        kinds: The rows that carry a loss, the mismatched ones, and all.
        stand_ins: Rows to score in place of none, for each kind.
    """

    def __init__(
        self,
        engine: StepEngine,
        batch: TokenBatch,
        backward: Callable[[Tensor], object] | None,
        defer_sync: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.objective, self.policy, self.reference = engine.objective, engine.policy, engine.reference
        refuse_gold(engine.objective.needs, batch.labels)
        self.micro_batch_rows, self.device = engine.micro_batch_rows, batch.prompt.device
        self.backward, self.defer_sync = backward, defer_sync
        self.scorer, self.gradient = scorer_of(engine.policy), backward is not None
        self.of_step, self.empty = batch, not len(batch)
        self.batch = _stand_in(self.device) if self.empty else batch
        mismatched = self.batch.host.mismatched
        numbers = range(len(mismatched))
        groups = [i for i in numbers if not mismatched[i]], [i for i in numbers if mismatched[i]], list(numbers)
        train, extra, everything = kinds = on_device(groups, self.device)
        self.stand_ins = train[:1], extra[:1], everything
        self.kinds = [rows[:0] for rows in kinds] if self.empty else kinds
        self.rows = self._blank()

    def parts(self) -> Iterator[Part]:
        """Yields each micro-batch after its backward pass."""
        needs = self.objective.needs
        train, mismatched, everything = self.kinds
        of_train, extra, all_kinds = self.stand_ins
        parts, of_mismatched = self.equal_parts(train, mismatched)
        # Must not depend on a rank's number of rows: the two branches gather over ranks in different orders.
        at_once = needs.whole_step and self.micro_batch_rows is not None
        scored: dict[int, LogProbBatch] = {}
        # With dropout, the second pass of a part must use the same network as the first.
        draws: dict[int, Draw] = {}
        if len(parts) == 1 and not at_once and of_mismatched and self.scorer.shares_prefixes:
            # One pass for the whole step: mismatched rows share the others' prompts and get no gradient.
            together = self._keep(everything, self._score(everything, gradient=self.gradient, instead=all_kinds))
            scored[0] = together.select(train.index, train.numbers)
        else:
            for index in of_mismatched:
                self._keep(index, self._score(index, gradient=False, instead=extra))
        if not scored and (needs.step_rewards or at_once):
            # With one part, the pass with gradient also serves z0. With several, an extra pass is needed, because the
            # first part's loss already depends on the last part's rewards.
            alone = len(parts) == 1 and not at_once
            for number, index in enumerate(parts):
                draws[number] = Draw.now(self.device)
                first_pass = self._keep(index, self._score(index, gradient=self.gradient and alone, instead=of_train))
                if len(parts) == 1:
                    scored[number] = first_pass
        with self._float32():
            rows = self.rows.select(everything.index, everything.numbers) if self.empty else self.rows
            context = self.objective.prepare(rows)
        if at_once:
            yield self._whole_step(context.select(train.index), train, parts, draws)
            return
        for number, index in enumerate(parts):
            last = number == len(parts) - 1
            with self._synchronized(last):
                if number in scored:
                    rows = scored.pop(number)
                else:
                    draw = draws.get(number)
                    rows = self._score(
                        index, gradient=self.gradient, draw=draw, again=draw is not None, instead=of_train
                    )
                if not len(index) and not last:
                    self._back_propagate(torch.stack([scores.sum() for scores in differentiable(rows)]).sum())
                    continue
                with self._float32():
                    result = self.objective.compute_loss(rows, context.select(index.index))
                self._back_propagate(result.loss)
            yield self._part(index, rows, result)

    def _whole_step(self, context: Context, train: Rows, parts: list[Rows], draws: dict[int, Draw]) -> Part:
        """A step whose rows are compared with each other, computed in micro-batches all the same.

        The loss is computed from log-probs without gradient. Its derivatives with respect to them then weight the
        passes with gradient. This is exact and costs one more forward pass.
        """
        rows = self.rows.select(train.index, train.numbers)
        leaves = as_leaves(rows, gradient=self.gradient)
        with self._float32():
            result = self.objective.compute_loss(leaves, context)
        if self.gradient:
            scores = differentiable(leaves)
            parameters = [p for p in self.objective.parameters() if p.requires_grad]
            slopes = torch.autograd.grad(result.loss, [*scores, *parameters], allow_unused=True, materialize_grads=True)
            of_scores, of_parameters = slopes[: len(scores)], slopes[len(scores) :]
            place = torch.empty(len(self.batch), dtype=torch.long, device=self.device)
            place[train.index] = torch.arange(len(train), device=self.device)
            for number, index in enumerate(parts):
                last = number == len(parts) - 1
                with self._synchronized(last):
                    scored = differentiable(
                        self._score(index, gradient=True, draw=draws[number], again=True, instead=self.stand_ins[0])
                    )
                    pairs = zip(scored, of_scores, strict=True)
                    linear = torch.stack([(score * slope[place[index.index]]).sum() for score, slope in pairs]).sum()
                    if last:
                        for parameter, its_slope in zip(parameters, of_parameters, strict=True):
                            linear = linear + (parameter * its_slope).sum()
                        linear = linear + (result.loss - linear).detach()  # reported as the loss itself
                    self._back_propagate(linear)
        return self._part(train, rows, result)

    def _synchronized(self, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch: its passes forward and backward, as DDP decides in the forward pass."""
        return nullcontext() if last or self.backward is None else self.defer_sync()

    def _back_propagate(self, loss: Tensor) -> None:
        if self.backward is not None:
            # The ranks' losses sum to the step's loss, but their gradients are averaged.
            self.backward(loss * world_size())

    def _part(self, index: Rows, rows: LogProbBatch, result: Result) -> Part:
        if rows.labels.has_gold:
            index, places = without_gold(index, self.batch)
            rows = rows.select(places.index, places.numbers)
        detached = replace(result, loss=result.loss.detach())
        return Part(index.index, index.numbers, self.of_step, rows.detach(), detached)

    # -- scoring --------------------------------------------------------------------------------------

    def _score(
        self,
        index: Rows,
        *,
        gradient: bool,
        draw: Draw | None = None,
        again: bool = False,
        instead: Rows,
    ) -> LogProbBatch:
        """Log-probs of the rows ``index`` under policy and reference, padded to the width of the whole step.

        Args:
            index: Positions in the batch.
            gradient: Whether the policy's log-probs get a gradient.
            draw: Random state to replay, so that dropout repeats an earlier pass.
            again: Whether an earlier pass of the step has scored these rows under the reference.
            instead: Rows to score, and drop, if ``index`` is empty.
        """
        chosen = index if len(index) else instead
        part = self.batch.select(chosen.index, chosen.numbers)
        of_reference = self.rows.reference_logps
        # Stand-ins need no reference, unless its passes are collective operations.
        scored_before = again or (self.empty and not is_sharded(self.scorer.model))
        width = max(len(completion) for completion in part.completions)
        with replayed(draw, self.device):
            rows = scored_rows(
                self.policy,
                self.reference,
                part,
                gradient=gradient,
                needs=self.objective.needs,
                reference_logps=of_reference[chosen.index, :width]
                if scored_before and of_reference is not None
                else None,
            )
        rows = widened(rows, self.rows.mask.shape[1])
        return rows if len(index) else rows.select(index.index, index.numbers)

    def _keep(self, index: Rows, rows: LogProbBatch) -> LogProbBatch:
        """Stores the rows' scores, which the reference point may read, and returns the rows."""
        if rows.has_logps:
            self.rows.policy_logps[index.index] = rows.policy_logps.detach()
        if self.rows.scalar is not None and rows.scalar is not None:
            self.rows.scalar[index.index] = rows.scalar.detach()
        if self.rows.reference_logps is not None and rows.reference_logps is not None:
            self.rows.reference_logps[index.index] = rows.reference_logps
        if self.rows.kl is not None and rows.kl is not None:
            self.rows.kl[index.index] = rows.kl
        if rows.routing is not None:
            if self.rows.routing is None:  # only now is the number of experts known
                zeros = rows.routing.chosen.new_zeros(len(self.rows), rows.routing.chosen.shape[1])
                self.rows.routing = Routing(zeros, zeros.clone())
            self.rows.routing.probability[index.index] = rows.routing.probability.detach()
            self.rows.routing.chosen[index.index] = rows.routing.chosen
        return rows

    def _blank(self) -> LogProbBatch:
        """All rows of the step with their labels and masks; log-probs are zero until they are scored."""
        mask = completion_mask(self.batch)
        # The dtype is explicit because bf16-true changes the default.
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=self.device)
        needs = self.objective.needs
        return LogProbBatch(
            policy_logps=zeros if needs.policy_logps else torch.full_like(zeros, torch.nan),
            reference_logps=zeros.clone() if self.reference is not None else None,
            mask=mask,
            labels=self.batch.labels,
            kl=zeros.clone() if needs.exact_kl else None,
            scalar=zeros.new_zeros(len(mask)) if needs.scalar else None,
            has_logps=needs.policy_logps,
        )

    def equal_parts(self, *indices: Rows) -> list[list[Rows]]:
        """The parts of each index, as many as on the other ranks if the model is sharded.

        Each pass is then a collective operation, so a rank with fewer parts begins with empty ones. The first index has
        at least one part, which is empty on a rank without rows.
        """
        parts_of = [split(index, self.batch, self.micro_batch_rows) if len(index) else [] for index in indices]
        # In training, every rank has rows.
        if is_sharded(self.scorer.model) and (self.micro_batch_rows is not None or not self.gradient):
            most = most_over_ranks(*map(len, parts_of))
            parts_of = [
                [index[:0]] * (number - len(parts)) + parts
                for index, parts, number in zip(indices, parts_of, most, strict=True)
            ]
        return [parts_of[0] or [indices[0]], *parts_of[1:]]

    def _float32(self) -> torch.autocast:
        """Disables autocast: objectives are computed in float32 whatever the precision of training."""
        return torch.autocast(self.device.type, enabled=False)
