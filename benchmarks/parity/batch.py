"""The batch that all losses are computed on: log-probs, reward-model scores and labels, without a model.

Rows 0 to 3 are chosen, rows 4 to 7 rejected completions of four pairs, rows 8 to 15 mismatched rows, one for each of
the rows before. Completions have 3 to 10 tokens. The numbers are fractions of products of integers, so that anyone can
compute them again. A test states what the batch has to contain for every branch of a loss to be reached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.labels import Labels

PAIRS = 4
PROMPT = 3
LENGTHS = [9, 4, 7, 3, 8, 6, 3, 5, 5, 8, 3, 7, 4, 9, 10, 6]
#: Mean log-ratio of each row's tokens, nats.
RATIO = [1.3, 0.2, -0.3, 0.1, -0.8, -0.2, 0.3, 1.2, -0.3, -0.2, 0.3, 0.4, 0.0, -0.1, 0.2, 0.1]
SCORES = [0.9, 0.3, 0.8, 0.6, 0.1, 0.2, 0.5, -0.4]


@dataclass(frozen=True)
class Batch:
    """Rows as a loss sees them.

    Attributes:
        tokens: float32 [n, PROMPT + T], log-prob of each token of prompt and completion under the policy; a leaf.
        scalar: float32 [n], output of a reward model; a leaf.
        reference: float32 [n, T], log-prob of completion tokens under the reference, 0 beyond a row's end.
        mask: bool [n, T], True on completion tokens.
        labels: Labels of the rows; their scores are those of the data.
    """

    tokens: Tensor
    scalar: Tensor
    reference: Tensor
    mask: Tensor
    labels: Labels

    @property
    def prompt(self) -> Tensor:
        """float32 [n, PROMPT], log-prob of each prompt token."""
        return self.tokens[:, :PROMPT]

    @property
    def policy(self) -> Tensor:
        """float32 [n, T], log-prob of completion tokens, 0 beyond a row's end."""
        return torch.where(self.mask, self.tokens[:, PROMPT:], 0.0)

    @property
    def logp(self) -> Tensor:
        """float32 [n], log-prob of each completion."""
        return self.policy.sum(1)

    @property
    def ratio(self) -> Tensor:
        """float32 [n, T], log-ratio of policy and reference at each token."""
        return self.policy - self.reference

    @property
    def r(self) -> Tensor:
        """float32 [n], log-ratio of policy and reference of each completion."""
        return self.ratio.sum(1)

    @property
    def length(self) -> Tensor:
        """long [n], number of completion tokens."""
        return self.mask.sum(1)

    @property
    def good(self) -> Tensor:
        """long [pairs], the chosen rows, in the order of their pairs."""
        return (self.labels.desirable & self.labels.train).nonzero().squeeze(1)

    @property
    def bad(self) -> Tensor:
        """long [pairs], the rejected row of each chosen one."""
        return self.labels.pair[self.good]

    @property
    def train(self) -> Tensor:
        """long [2 * pairs], chosen rows, then rejected ones."""
        return torch.cat([self.good, self.bad])

    @property
    def mismatched(self) -> Tensor:
        """long [m], the mismatched rows."""
        return self.labels.mismatched.nonzero().squeeze(1)

    @property
    def gold(self) -> Tensor:
        """long [pairs], the rows that are gold answers for a loss that takes some: the chosen rows' mismatched ones."""
        return self.mismatched[: len(self.good)]

    def margin(self, of_rows: Tensor) -> Tensor:
        """float32 [pairs], chosen minus rejected."""
        return of_rows[self.good] - of_rows[self.bad]

    def of_pairs(self, *pairs: int) -> Batch:
        """The rows of some pairs, with their mismatched rows."""
        rows = torch.tensor([pair + PAIRS * kind for kind in range(4) for pair in pairs])
        return Batch(
            self.tokens[rows], self.scalar[rows], self.reference[rows], self.mask[rows], self.labels.select(rows)
        )

    def halves(self) -> tuple[Batch, Batch]:
        """Two micro-batches of two pairs, which together are the batch."""
        return self.of_pairs(0, 1), self.of_pairs(2, 3)

    def each(self) -> list[Batch]:
        """Micro-batches of one pair."""
        return [self.of_pairs(pair) for pair in range(PAIRS)]

    def rows(self, needs: Needs) -> LogProbBatch:
        """The rows for an objective of ours, with mismatched rows, or gold answers in their place, if it needs them."""
        labels = self.labels
        if needs.gold:
            gold = torch.zeros_like(labels.gold).index_fill(0, self.gold, True)
            labels = replace(labels, gold=gold, mismatched=labels.mismatched & ~gold)
        rows = LogProbBatch(self.policy, self.reference, self.mask, labels, scalar=self.scalar)
        return rows if needs.mismatched else rows.select(labels.train_index)

    def with_reference(self, shift: float) -> Batch:
        """The same rows under another reference, whose tokens differ by up to ``shift`` nats."""
        other = self.reference - shift * _fractions(len(self.mask), self.mask.shape[1], 3)
        return replace(self, reference=torch.where(self.mask, other, 0.0))


def fixed_batch() -> Batch:
    """The batch; its leaves have no gradient yet."""
    n, most = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(most) < torch.tensor(LENGTHS)[:, None]
    tokens = -1.3 - 1.2 * _fractions(n, PROMPT + most, 1)
    ratio = torch.tensor(RATIO)[:, None] + 1.4 * (_fractions(n, most, 2) - 0.5)
    reference = torch.where(mask, (tokens[:, PROMPT:] - ratio).clamp(max=-0.02), 0.0)
    reference[1, 2] = tokens[1, PROMPT + 2]  # a token with a log-ratio of exactly 0
    row = torch.arange(n)
    labels = Labels(
        desirable=row < PAIRS,
        pair=torch.where(row < 2 * PAIRS, (row + PAIRS) % (2 * PAIRS), -1),
        mismatched=row >= 2 * PAIRS,
        group=row % PAIRS // 2,
        score=torch.tensor(SCORES * 2),
    )
    scalar = 4 * _fractions(n, 1, 4).squeeze(1) - 2
    return Batch(tokens.requires_grad_(), scalar.requires_grad_(), reference, mask, labels)


def _fractions(rows: int, columns: int, salt: int) -> Tensor:
    """float32 [rows, columns], numbers from 0 to 1 without a pattern that matters."""
    i, j = torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1)
    return ((i * 37 + j * 61 + i * j * 17 + i * i * j * salt * 29 + j * j * 11) % 97).float() / 96
