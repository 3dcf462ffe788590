"""Batches: the data that flow from files to the loss, with shapes and units.

A batch is ``n`` rows of (prompt, completion). A preference pair is two rows that refer to each other as ``pair``. A
mismatched row (x_i, y_j), which only feeds the reference point, is marked ``mismatched``. All losses share one forward
path because they see nothing but rows.

Glossary (symbol in the paper, name here, unit):

========  ====================  ==========================================================  =======
r         ``reward``            implied reward l(y) * sum_t log pi_theta(y_t) / pi_ref(y_t)  nats
z0        ``reference_point``   E_Q[r(x, y')], what an outcome is compared with              nats
u         ``outcome``           r - z0: a gain where positive, a loss where negative         nats
v         ``value``             value attributed to the outcome                              utility
a         ``sign``              -1: raising the value lowers the loss; +1: the opposite      --
w         ``weight``            weight of the row, at least 0                                --
========  ====================  ==========================================================  =======
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halos_pl.common.transfer import moved
from halos_pl.labels import Labels, versions_of


@dataclass(frozen=True)
class Needs:
    """What an objective needs from data and models; a run computes nothing else.

    Attributes:
        reference: Log-probs under the reference model.
        pairs: Rows come as pairs that refer to each other.
        mismatched: Mismatched rows (x_i, y_j), which feed the reference point and get no gradient.
        undesirable: Undesirable rows; a baseline that only imitates has no use for them.
        step_rewards: The reference point averages over the step's rows, so all of them must be scored (without
            gradient) before the first row's loss is known.
        whole_step: Rows of the whole step are compared with each other *with* gradient, so no row's loss is known
            without all the others.
        groups: All rows of a prompt come in the same step, on the same rank.
        exact_kl: KL divergence over the whole vocabulary at each token of the mismatched rows.
        samples: Maximum number of tokens of completions that the policy samples as mismatched rows; 0 for none.
        routing: How the policy's experts share the tokens; the policy must be a mixture of experts.
        scalar: A scalar per row, from a linear head on the policy's hidden state after the row's last token.
        scores: Scores of all rows; rows without are refused.
        gold: A gold answer beside the completions of each example; rows of an example without one are refused.
        logps: The policy's log-probs beside the scalar. Without ``scalar`` they are computed in any case.
    """

    reference: bool = False
    pairs: bool = False
    mismatched: bool = False
    undesirable: bool = False
    step_rewards: bool = False
    whole_step: bool = False
    groups: bool = False
    exact_kl: bool = False
    samples: int = 0
    routing: bool = False
    scalar: bool = False
    scores: bool = False
    gold: bool = False
    logps: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(**{f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    @property
    def policy_logps(self) -> bool:
        """Whether the policy's log-probs are computed: always, except for an objective that only reads the scalar."""
        return self.logps or self.reference or not self.scalar


class HostView(NamedTuple):
    """The numbers of a batch that decide how it is computed, as Python lists: reading them never waits for a device.

    Attributes:
        prompt: [n], index of each row's prompt, as in :class:`TokenBatch`.
        mismatched: [n], whether a row is mismatched, as in :class:`Labels`.
        loss: [n], ascending positions of each completion's tokens with loss; None if all have it.
    """

    prompt: list[int]
    mismatched: list[bool]
    loss: list[list[int] | None]


@dataclass
class TokenBatch:
    """Token ids of the rows of one optimizer step (this rank's share), without layout or padding.

    Attributes:
        prompts: Distinct prompts, each a 1-D LongTensor of at least one token.
        completions: One 1-D LongTensor of at least one token per row; ends in EOS unless truncated.
        prompt: LongTensor [n], index of each row's prompt in ``prompts``.
        labels: Labels of the rows.
        row_ids: Name of each row for messages and files: ``FILE:LINE`` and, for a pair, ``#chosen`` or ``#rejected``;
            a mismatched row has the names of both sides, and a gold answer ends in ``#gold``.
        loss: For each row, a BoolTensor like the completion, True on the tokens that carry the loss, or None if all do.
            The others are read but not predicted: other speakers, and turns that were not judged. Default: all tokens
            of all rows.
    """

    prompts: list[Tensor]
    completions: list[Tensor]
    prompt: Tensor
    labels: Labels
    row_ids: list[str] = field(default_factory=list)
    loss: list[Tensor | None] | None = None

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def host(self) -> HostView:
        """The batch's layout on the host. A batch that was created on a device waits for it."""
        versions, prompt, positions = self.__dict__.get("_host", (None, None, None))  # replace() drops it
        if versions != self._versions:
            masks = self.loss or [None] * len(self)
            positions = [None if mask is None else [k for k, y in enumerate(mask.tolist()) if y] for mask in masks]
            prompt = self.prompt.tolist()
        return HostView(prompt, self.labels.host.mismatched, positions)

    @property
    def _versions(self) -> Any:
        return versions_of([self.prompt, *(mask for mask in self.loss or () if mask is not None)])

    @property
    def on_host(self) -> TokenBatch:
        """The batch on the CPU. A batch that was created on a device waits for it."""
        if self.prompt.device.type == "cpu":
            return self
        origin: TokenBatch | None = self.__dict__.get("_origin")
        return self.to("cpu") if origin is None else origin

    @property
    def train_ids(self) -> list[str]:
        """The names of the rows that carry a loss."""
        return [name for name, extra in zip(self.row_ids, self.host.mismatched, strict=False) if not extra]

    def to(self, device: torch.device | str, **_: Any) -> TokenBatch:
        """The same batch on ``device`` (Lightning moves batches with this). All columns go to a GPU in one copy."""
        masks, of_labels = [mask for mask in self.loss or () if mask is not None], self.labels._columns()
        columns = iter(moved([*self.prompts, *self.completions, self.prompt, *masks, *of_labels], torch.device(device)))
        batch = TokenBatch(
            prompts=[next(columns) for _ in self.prompts],
            completions=[next(columns) for _ in self.completions],
            prompt=next(columns),
            loss=self.loss and [None if mask is None else next(columns) for mask in self.loss],
            labels=self.labels._on(list(columns)),
            row_ids=self.row_ids,
        )
        batch.__dict__["_host"] = (batch._versions, self.host.prompt, self.host.loss)
        if batch.prompt.device.type != "cpu":
            batch.__dict__["_origin"] = self.on_host
        return batch

    def select(self, index: Tensor, numbers: Sequence[int] | None = None) -> TokenBatch:
        """The rows ``index``, with prompts and pairs renumbered.

        Args:
            index: LongTensor [m], positions of the rows, on their device.
            numbers: The same positions on the host; without them, this reads them from ``index``.
        """
        rows = index.tolist() if numbers is None else list(numbers)
        host = self.host
        prompts = sorted({host.prompt[i] for i in rows})
        place = {old: new for new, old in enumerate(prompts)}
        renumbered = [place[host.prompt[i]] for i in rows]
        (prompt,) = moved([torch.tensor(renumbered, dtype=torch.long, device="cpu")], self.prompt.device)
        batch = TokenBatch(
            prompts=[self.prompts[i] for i in prompts],
            completions=[self.completions[i] for i in rows],
            prompt=prompt,
            labels=self.labels.select(index, rows),
            row_ids=[self.row_ids[i] for i in rows] if self.row_ids else [],
            loss=None if self.loss is None else [self.loss[i] for i in rows],
        )
        batch.__dict__["_host"] = (batch._versions, renumbered, [host.loss[i] for i in rows])
        if (origin := self.__dict__.get("_origin")) is not None:
            batch.__dict__["_origin"] = origin.select(torch.tensor(rows, device="cpu"), rows)
        return batch


@dataclass
class Routing:
    """How a mixture of experts routed the tokens of n rows: sums over a row's tokens and all layers with E experts.

    A token counts if the model reads it to predict a later one: the prompt and the completion without its last token.
    A prompt that several rows share counts in each of them.

    Attributes:
        probability: float32 [n, E], the router's probability of each expert. Zeros for mismatched rows.
        chosen: float32 [n, E], how often each expert was among those chosen for a token, without gradient.

    Raises:
        ValueError: for tensors of different shapes.
    """

    probability: Tensor
    chosen: Tensor

    def __post_init__(self) -> None:
        if self.probability.dim() != 2 or self.probability.shape != self.chosen.shape:
            shapes = tuple(self.probability.shape), tuple(self.chosen.shape)
            raise ValueError(
                f"Routing.probability and chosen have shapes {shapes[0]} and {shapes[1]}, not (rows, experts)"
            )

    def __len__(self) -> int:
        return len(self.chosen)

    def detach(self) -> Routing:
        """The same sums, detached from the policy's graph."""
        return Routing(self.probability.detach(), self.chosen)

    def select(self, index: Tensor) -> Routing:
        """The rows ``index`` (LongTensor [m])."""
        return Routing(self.probability[index], self.chosen[index])


@dataclass
class LogProbBatch:
    """The input of an objective: log-probs of the rows' completion tokens, and labels. No model, no text.

    Attributes:
        policy_logps: float32 [n, T], log pi_theta of each completion token, 0 where ``mask`` is False.
        reference_logps: The same under the reference model, without gradient; None if not needed.
        mask: BoolTensor [n, T], True on completion tokens with loss. Never derived from values: a log-prob may be 0.
        labels: Labels of the rows.
        kl: float32 [n, T], KL(pi_theta || pi_ref) over the whole vocabulary at each token, without gradient; None if
            not needed.
        routing: How the policy's experts share the rows' tokens; None if not needed.
        scalar: float32 [n], the number that the policy's scalar head gives each row; None if not needed.
        has_logps: Whether ``policy_logps`` were computed. If not, they are NaN, so that a part that reads them without
            declaring it stops the run.

    Raises:
        ValueError: for a tensor of the wrong shape, since (B,) + (B, T) would broadcast to a wrong loss.
    """

    policy_logps: Tensor
    reference_logps: Tensor | None
    mask: Tensor
    labels: Labels
    kl: Tensor | None = None
    routing: Routing | None = None
    scalar: Tensor | None = None
    has_logps: bool = True

    def __post_init__(self) -> None:
        shape = tuple(self.policy_logps.shape)
        if len(shape) != 2:
            raise ValueError(f"LogProbBatch.policy_logps has shape {shape}, not (rows, tokens)")
        if len(self.labels) != shape[0]:
            raise ValueError(f"LogProbBatch.labels has {len(self.labels)} rows, but policy_logps has {shape[0]}")
        for name in ("reference_logps", "mask", "kl"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"LogProbBatch.{name} has shape {tuple(value.shape)}, not {shape}")
        if self.routing is not None and len(self.routing) != shape[0]:
            raise ValueError(f"LogProbBatch.routing has {len(self.routing)} rows, but policy_logps has {shape[0]}")
        if self.scalar is not None and tuple(self.scalar.shape) != shape[:1]:
            raise ValueError(f"LogProbBatch.scalar has shape {tuple(self.scalar.shape)}, not {shape[:1]}")

    def __len__(self) -> int:
        return self.policy_logps.shape[0]

    def detach(self) -> LogProbBatch:
        """The same rows, detached from the policy's graph."""
        routing = None if self.routing is None else self.routing.detach()
        scalar = None if self.scalar is None else self.scalar.detach()
        return replace(self, policy_logps=self.policy_logps.detach(), routing=routing, scalar=scalar)

    def select(self, index: Tensor, numbers: Sequence[int] | None = None) -> LogProbBatch:
        """The rows ``index``, with pairs renumbered (see :meth:`Labels.select`)."""
        return LogProbBatch(
            policy_logps=self.policy_logps[index],
            reference_logps=None if self.reference_logps is None else self.reference_logps[index],
            mask=self.mask[index],
            labels=self.labels.select(index, numbers),
            kl=None if self.kl is None else self.kl[index],
            routing=None if self.routing is None else self.routing.select(index),
            scalar=None if self.scalar is None else self.scalar[index],
            has_logps=self.has_logps,
        )

    def without_gold(self) -> LogProbBatch:
        """The rows that are no gold answers; this batch itself if none is."""
        if not self.labels.has_gold:
            return self
        numbers = [i for i, gold in enumerate(self.labels.host.gold) if not gold]
        (index,) = moved([torch.tensor(numbers, dtype=torch.long, device="cpu")], self.labels.gold.device)
        return self.select(index, numbers)
