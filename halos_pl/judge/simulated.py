"""A simulated judge of known accuracy and position bias, to test what a report recovers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from halos_pl.judge.win_rates import JudgedPair


@dataclass(frozen=True)
class SimulatedJudge:
    """Prefers a position with some probability, and otherwise the better answer with some accuracy.

    Attributes:
        accuracy: probability of preferring the better answer in a verdict that does not follow the position.
        position_bias: probability of preferring the first answer unseen; negative for the second one.
        abstains: probability that a reply names neither answer.
        ties: probability of a tie in a verdict that does not follow the position.
    """

    accuracy: float
    position_bias: float = 0.0
    abstains: float = 0.0
    ties: float = 0.0

    @property
    def agreement(self) -> float:
        """Expected agreement of single verdicts with the truth, over both orders."""
        accuracy = (1 - self.ties) * self.accuracy + self.ties / 2
        return 0.5 + (1 - abs(self.position_bias)) * (accuracy - 0.5)

    def verdict(self, better_is_first: bool, rng: np.random.Generator) -> float | None:
        """Preference for the answer that is shown first; None for an abstention."""
        if rng.random() < self.abstains:
            return None
        if rng.random() < abs(self.position_bias):
            return float(self.position_bias > 0)
        if rng.random() < self.ties:
            return 0.5
        return float(better_is_first == (rng.random() < self.accuracy))

    def judge(self, truth: Mapping[str, int], rng: np.random.Generator, repeats: int = 1) -> list[JudgedPair]:
        """Judges pairs in both orders.

        Args:
            truth: the better answer of each pair: 1 for the answer, -1 for the other one.
            rng: source of random numbers.
            repeats: number of judgements again in each order.
        """
        pairs = []
        for name, label in truth.items():
            first = [self.verdict(label > 0, rng) for _ in range(repeats + 1)]
            second = [None if v is None else 1 - v for v in (self.verdict(label < 0, rng) for _ in range(repeats + 1))]
            pairs.append(JudgedPair(name, first[0], second[0], tuple(first[1:]), tuple(second[1:])))
        return pairs
