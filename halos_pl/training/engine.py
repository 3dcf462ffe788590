"""One optimizer step's forward and backward passes, without Lightning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from halos_pl.batch import LogProbBatch, Routing, TokenBatch
from halos_pl.distributed import world_size
from halos_pl.objective.halo import Context, Objective, Result
from halos_pl.policy.kl import Scoring, completion_kl
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.scorer import Scorer


class Reference(Scoring, Protocol):
    """Log-probs under the reference model, and the model itself where a KL divergence is asked for."""

    def logps(self, batch: TokenBatch) -> Tensor:
        """Log-probs of the completion tokens, float32 [n, T], without gradient."""


def scored_rows(
    policy: Scorer,
    reference: Reference | None,
    batch: TokenBatch,
    *,
    gradient: bool = False,
    kl: bool = False,
    routing: bool = False,
    reference_logps: Tensor | None = None,
) -> LogProbBatch:
    """The rows of a batch as an objective sees them.

    Args:
        policy: the model that is trained.
        reference: where log pi_ref comes from; None for none.
        batch: n rows.
        gradient: of the policy's log-probs.
        kl: compute the KL divergence over the whole vocabulary at the tokens of mismatched rows.
        routing: Whether to return how the policy's experts share the tokens.
        reference_logps: those of the reference, [n, T], where they are known.
    """
    # The reference first, before the policy's activations take up memory.
    if reference is not None and reference_logps is None:
        reference_logps = reference.logps(batch)
    with torch.set_grad_enabled(gradient):
        policy_logps, of_experts = policy(batch, wanted="routing") if routing else (policy(batch), None)
    divergence = None
    mismatched = batch.labels.mismatched.nonzero().squeeze(1)
    if kl and reference is not None and len(mismatched):
        of_mismatched = completion_kl(policy, reference, batch.select(mismatched))
        divergence = torch.zeros_like(policy_logps, requires_grad=False)
        divergence[mismatched, : of_mismatched.shape[1]] = of_mismatched
    return LogProbBatch(policy_logps, reference_logps, completion_mask(batch), batch.labels, divergence, of_experts)


def _widened(rows: LogProbBatch, width: int) -> LogProbBatch:
    """The same rows with padding up to ``width`` tokens."""
    pad = (0, width - rows.mask.shape[1])
    return LogProbBatch(
        policy_logps=F.pad(rows.policy_logps, pad),
        reference_logps=None if rows.reference_logps is None else F.pad(rows.reference_logps, pad),
        mask=F.pad(rows.mask, pad),
        labels=rows.labels,
        kl=None if rows.kl is None else F.pad(rows.kl, pad),
        routing=rows.routing,
    )


def _differentiable(rows: LogProbBatch) -> list[Tensor]:
    """What the policy computed for the rows, through which gradients flow."""
    return [rows.policy_logps] if rows.routing is None else [rows.policy_logps, rows.routing.probability]


@dataclass(frozen=True)
class Part:
    """A micro-batch of a step that is done.

    Attributes:
        index: LongTensor [m], the places of its rows in ``batch``.
        batch: the step's batch, with what the policy has sampled for it.
        rows: their log-probs, without gradient.
        result: what the objective says of them, without gradient; the losses of the parts of all ranks sum to the
            loss of the step.
    """

    index: Tensor
    batch: TokenBatch
    rows: LogProbBatch
    result: Result

    @property
    def row_ids(self) -> list[str]:
        """The names of its rows."""
        return [self.batch.row_ids[i] for i in self.index.tolist()] if self.batch.row_ids else []


@dataclass(frozen=True)
class _Draw:
    """The random state of this process and of its GPU."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def now(device: torch.device) -> _Draw:
        return _Draw(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def _forked(device: torch.device) -> AbstractContextManager[None]:
    """When it is left, the random state is as it was."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def _replayed(draw: _Draw | None, device: torch.device) -> Iterator[None]:
    """While entered, dropout draws again what it has drawn from ``draw`` on; nothing changes for None."""
    if draw is None:
        yield
        return
    with _forked(device):
        torch.set_rng_state(draw.cpu)
        if draw.cuda is not None:
            torch.cuda.set_rng_state(draw.cuda, device)
        yield


class Deferral:
    """A ``defer_sync`` that only says whether it is entered: for trainers that synchronize by themselves.

    Attributes:
        active: more micro-batches of the step follow.
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

    Mismatched rows come first; then z0, once for the step and all ranks; then the rows with gradient, where a pair
    stays together. There is one denominator for the step. Where several ranks take part, their gradients are expected
    to be averaged, as DDP and FSDP do.

    >>> engine = StepEngine(objective, policy, reference, micro_batch_rows=8)        # doctest: +SKIP
    >>> for batch in batches:                                                        # doctest: +SKIP
    ...     engine.step(batch)
    ...     optimizer.step()
    ...     optimizer.zero_grad()

    Args:
        objective: what is minimized.
        policy: the model that is trained.
        reference: where log pi_ref comes from; None where nothing needs it.
        micro_batch_rows: rows that are forwarded with gradient at a time; None for all rows of the step.
        sampler: adds samples of the policy to a batch, where the objective needs them.

    Raises:
        ValueError: for fewer than one row at a time, or an objective that needs what is not given.
    """

    def __init__(
        self,
        objective: Objective,
        policy: Scorer,
        reference: Reference | None = None,
        micro_batch_rows: int | None = None,
        sampler: Callable[[TokenBatch], TokenBatch] | None = None,
    ) -> None:
        if micro_batch_rows is not None and micro_batch_rows < 1:
            raise ValueError(f"micro_batch_rows is {micro_batch_rows}; it must be at least 1, or None")
        if objective.needs.reference and reference is None:
            raise ValueError("the objective needs log pi_ref; give the engine a reference")
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
        """Computes the loss of a step and back-propagates it; gradients add up in ``.grad``.

        Args:
            batch: this rank's share of the step.
            backward: called with the loss of each micro-batch.
            defer_sync: entered around all passes but the last, such as ``ddp.no_sync``: ranks exchange gradients once.
        """
        if self.sampler and self.objective.needs.samples:
            batch = self.sampler(batch)
        return list(_Step(self, batch, backward, defer_sync).parts())

    @torch.no_grad()
    def evaluate(self, batch: TokenBatch, moment: object = None) -> Iterator[Part]:
        """Yields the parts of a step without back-propagating anything, one after the other.

        The random state is left as it was: a run that resumes after an evaluation does not evaluate again.

        Args:
            batch: as for :meth:`step`.
            moment: what the samples of the policy are drawn for, beside the names of the rows and the seed of torch:
                the step of the run, say.
        """
        if self.sampler and self.objective.needs.samples:
            with _forked(self.policy.device):
                names = hashlib.sha256(repr((batch.row_ids, moment, torch.initial_seed())).encode())
                torch.manual_seed(int.from_bytes(names.digest()[:4]))
                batch = self.sampler(batch)
        yield from _Step(self, batch, None, nullcontext).parts()


class _Step:
    """One step on its way.

    Args:
        engine: whose step it is.
        batch: its rows.
        backward, defer_sync: as for :meth:`StepEngine.step`; None for a step without gradient.
    """

    def __init__(
        self,
        engine: StepEngine,
        batch: TokenBatch,
        backward: Callable[[Tensor], object] | None,
        defer_sync: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.objective, self.policy, self.reference = engine.objective, engine.policy, engine.reference
        self.micro_batch_rows, self.batch = engine.micro_batch_rows, batch
        self.backward, self.defer_sync = backward, defer_sync
        self.gradient = backward is not None
        self.device = batch.prompt.device
        self.rows = self._blank()

    def parts(self) -> Iterator[Part]:
        """Yields each micro-batch when it has been back-propagated."""
        needs = self.objective.needs
        train = self.batch.labels.train.nonzero().squeeze(1)
        mismatched = self.batch.labels.mismatched.nonzero().squeeze(1)
        parts = self._split(train)
        # The same on every rank, however many rows each has: what follows gathers over ranks in another order.
        at_once = needs.whole_step and self.micro_batch_rows is not None
        scored: dict[int, LogProbBatch] = {}
        # With dropout a part's second pass has to be that of the same network as its first.
        draws: dict[int, _Draw] = {}
        if len(parts) == 1 and not at_once and len(mismatched) and self.policy.shares_prefixes:
            # One pass for all of the step: mismatched rows share the prompts of the rest, and have no gradient.
            everything = torch.arange(len(self.batch), device=self.device)
            scored[0] = self._keep(everything, self._score(everything, gradient=self.gradient)).select(train)
        elif len(mismatched):
            for index in self._split(mismatched):
                self._keep(index, self._score(index, gradient=False))
        if not scored and (needs.step_rewards or at_once):
            # One part: the pass with gradient serves z0 as well. Several: a pass of its own, since the first
            # part's loss already depends on the last part's rewards.
            alone = len(parts) == 1 and not at_once
            for number, index in enumerate(parts):
                draws[number] = _Draw.now(self.device)
                first_pass = self._keep(index, self._score(index, gradient=self.gradient and alone))
                if len(parts) == 1:
                    scored[number] = first_pass
        with self._float32():
            context = self.objective.prepare(self.rows)
        if at_once:
            yield self._judge_at_once(context.select(train), train, parts, draws)
            return
        for number, index in enumerate(parts):
            if number in scored:
                rows = scored.pop(number)
            else:
                draw = draws.get(number)
                rows = self._score(index, gradient=self.gradient, draw=draw, known=draw is not None)
            with self._float32():
                result = self.objective.compute_loss(rows, context.select(index))
            self._back_propagate(result.loss, last=number == len(parts) - 1)
            yield self._part(index, rows, result)

    def _judge_at_once(self, context: Context, train: Tensor, parts: list[Tensor], draws: dict[int, _Draw]) -> Part:
        """A step whose rows are compared with each other, in micro-batches all the same.

        The loss is computed on log-probs that were scored without gradient; its slope in each of them is what the
        passes with gradient are back-propagated with. Exact, at the price of one more forward pass.
        """
        rows = self.rows.select(train)
        leaves = replace(rows, policy_logps=rows.policy_logps.clone().requires_grad_(self.gradient))
        if rows.routing is not None:
            probability = rows.routing.probability.clone().requires_grad_(self.gradient)
            leaves.routing = replace(rows.routing, probability=probability)
        with self._float32():
            result = self.objective.compute_loss(leaves, context)
        if self.gradient:
            scores = _differentiable(leaves)
            parameters = [p for p in self.objective.parameters() if p.requires_grad]
            slopes = torch.autograd.grad(result.loss, [*scores, *parameters], allow_unused=True, materialize_grads=True)
            of_scores, of_parameters = slopes[: len(scores)], slopes[len(scores) :]
            place = torch.empty(len(self.batch), dtype=torch.long, device=self.device)
            place[train] = torch.arange(len(train), device=self.device)
            for number, index in enumerate(parts):
                scored = _differentiable(self._score(index, gradient=True, draw=draws[number], known=True))
                products = [(score * slope[place[index]]).sum() for score, slope in zip(scored, of_scores, strict=True)]
                linear = torch.stack(products).sum()
                last = number == len(parts) - 1
                if last:
                    for parameter, its_slope in zip(parameters, of_parameters, strict=True):
                        linear = linear + (parameter * its_slope).sum()
                    linear = linear + (result.loss - linear).detach()  # shown as the loss that it stands for
                self._back_propagate(linear, last=last)
        return self._part(train, rows, result)

    def _back_propagate(self, loss: Tensor, *, last: bool) -> None:
        if self.backward is None:
            return
        # The ranks' losses sum to the step's, and their gradients are averaged.
        scaled = loss * world_size()
        if last:
            self.backward(scaled)
        else:
            with self.defer_sync():
                self.backward(scaled)

    def _part(self, index: Tensor, rows: LogProbBatch, result: Result) -> Part:
        return Part(index, self.batch, rows.detach(), replace(result, loss=result.loss.detach()))

    # -- scoring --------------------------------------------------------------------------------------

    def _score(self, index: Tensor, *, gradient: bool, draw: _Draw | None = None, known: bool = False) -> LogProbBatch:
        """Log-probs of the rows ``index`` under policy and reference, padded to the whole step's width.

        Args:
            index: LongTensor [m], places in the batch.
            gradient: of the policy's.
            draw: where dropout draws what it has drawn before.
            known: an earlier pass of the step has computed those under the reference.
        """
        part = self.batch.select(index)
        of_reference = self.rows.reference_logps
        width = max(len(completion) for completion in part.completions)
        with _replayed(draw, self.device):
            rows = scored_rows(
                self.policy,
                self.reference,
                part,
                gradient=gradient,
                kl=self.objective.needs.exact_kl,
                routing=self.objective.needs.routing,
                reference_logps=of_reference[index, :width] if known and of_reference is not None else None,
            )
        return _widened(rows, self.rows.mask.shape[1])

    def _keep(self, index: Tensor, rows: LogProbBatch) -> LogProbBatch:
        """Notes what the reference point may read of rows; returns them."""
        self.rows.policy_logps[index] = rows.policy_logps.detach()
        if self.rows.reference_logps is not None and rows.reference_logps is not None:
            self.rows.reference_logps[index] = rows.reference_logps
        if self.rows.kl is not None and rows.kl is not None:
            self.rows.kl[index] = rows.kl
        if rows.routing is not None:
            if self.rows.routing is None:  # the number of experts is known now
                zeros = torch.zeros_like(rows.routing.chosen[:1]).repeat(len(self.rows), 1)
                self.rows.routing = Routing(zeros, zeros.clone())
            self.rows.routing.probability[index] = rows.routing.probability.detach()
            self.rows.routing.chosen[index] = rows.routing.chosen
        return rows

    def _blank(self) -> LogProbBatch:
        """All rows of the step with log-probs of zero: labels and masks, and room for what is scored."""
        mask = completion_mask(self.batch)
        # The dtype is named wherever a tensor is made: under bf16-true the default is another one.
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=self.device)
        return LogProbBatch(
            policy_logps=zeros,
            reference_logps=zeros.clone() if self.reference is not None else None,
            mask=mask,
            labels=self.batch.labels,
            kl=zeros.clone() if self.objective.needs.exact_kl else None,
        )

    def _split(self, index: Tensor) -> list[Tensor]:
        """``index`` in parts of at most ``micro_batch_rows`` rows: a pair is never split, and prompts are shared."""
        if self.micro_batch_rows is None or len(index) <= self.micro_batch_rows:
            return [index]
        units: dict[int, list[int]] = {}
        for i, other in zip(index.tolist(), self.batch.labels.pair[index].tolist(), strict=True):
            units.setdefault(min(i, other) if other >= 0 else i, []).append(i)
        prompt = self.batch.prompt.tolist()
        parts: list[list[int]] = [[]]
        for unit in sorted(units.values(), key=lambda unit: prompt[unit[0]]):
            if parts[-1] and len(parts[-1]) + len(unit) > self.micro_batch_rows:
                parts.append([])
            parts[-1].extend(unit)
        return [torch.tensor(part, device=index.device) for part in parts]

    def _float32(self) -> torch.autocast:
        """While entered, products are not rounded: an objective is no model, whatever the precision of training."""
        return torch.autocast(self.device.type, enabled=False)
