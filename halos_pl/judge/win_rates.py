"""Win rates of pairs that were judged in both orders, and the biases of the judge that both orders reveal.

A verdict is a preference from 0 to 1: 1 if the judge prefers the answer, 0 if it prefers the other one, 0.5 for a tie,
or the judge's probability of preferring the answer. A judge that names neither answer abstains: None.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from halos_pl.judge.estimates import Estimate, mean_of


@dataclass(frozen=True)
class JudgedPair:
    """The verdicts on one pair of answers.

    Attributes:
        name: name of the pair.
        shown_first: preference for the answer when it is shown first; None for an abstention.
        shown_second: preference for the answer when it is shown second; None for an abstention.
        again_first, again_second: the same, judged a second time; empty if it was not.
        identical: whether both answers are equal, which is a tie without asking the judge.
        failed: number of first judgements that got no reply.
        example: name of the example, which pairs of the same prompt share, such as the turns of a conversation;
            default: ``name``. Such pairs are not independent, so an example counts once, with the mean of its pairs.
    """

    name: str
    shown_first: float | None
    shown_second: float | None
    again_first: tuple[float | None, ...] = ()
    again_second: tuple[float | None, ...] = ()
    identical: bool = False
    failed: int = 0
    example: str = ""

    @property
    def preference(self) -> float | None:
        """The mean over both orders; None if the judge abstained in one of them.

        One order alone would carry the judge's preference for a position into the win rate.
        """
        if self.shown_first is None or self.shown_second is None:
            return None
        return (self.shown_first + self.shown_second) / 2


@dataclass(frozen=True)
class WinRate:
    """A win rate and the behaviour of its judge.

    Attributes:
        rate: the win rate over examples with a verdict in both orders; ties count half.
        wins, ties, losses: numbers of pairs with a preference above, equal to and below 0.5.
        identical: number of pairs with equal answers, which are ties.
        abstentions: number of replies that name neither answer, over both orders, first judgements only.
        failures: number of requests without a reply.
        left_out: number of pairs without a verdict in both orders.
        bounds: the win rate over all examples if the pairs left out were losses, and if they were wins.
        position_bias: probability of preferring the first position minus that of the second, from -1 to 1. The quality
            of the answers cancels, as each is shown first once.
        follows_position: share of pairs whose two verdicts prefer the same position.
        consistency: share of repeated judgements, in the same order, with the same winner.
        preferences: the preference for the answer by example.
    """

    rate: Estimate
    wins: int
    ties: int
    losses: int
    identical: int
    abstentions: int
    failures: int
    left_out: int
    bounds: tuple[float, float]
    position_bias: Estimate
    follows_position: Estimate
    consistency: Estimate
    preferences: dict[str, float] = field(repr=False, default_factory=dict)


def winner(preference: float) -> int:
    """1 for the answer, -1 for the other one, 0 for a tie."""
    return int(np.sign(preference - 0.5))


def win_rate(pairs: Sequence[JudgedPair]) -> WinRate:
    """The win rate of judged pairs, with ties counted half."""
    judged = [(pair, pair.preference) for pair in pairs if pair.preference is not None]
    preferences = means_of(judged)
    winners = [winner(value) for _, value in judged]
    asked = [pair for pair in pairs if not pair.identical]
    return WinRate(
        rate=mean_of(list(preferences.values())),
        wins=winners.count(1),
        ties=winners.count(0),
        losses=winners.count(-1),
        identical=len(pairs) - len(asked),
        abstentions=sum((p.shown_first is None) + (p.shown_second is None) for p in asked)
        - sum(p.failed for p in asked),
        failures=sum(p.failed for p in asked),
        left_out=len(pairs) - len(judged),
        bounds=(_rate_if(pairs, 0.0), _rate_if(pairs, 1.0)),
        position_bias=position_bias(asked),
        follows_position=follows_position(asked),
        consistency=consistency(asked),
        preferences=preferences,
    )


def _rate_if(pairs: Sequence[JudgedPair], left_out: float) -> float:
    """The win rate if the preference in each pair left out were ``left_out``; that itself without pairs."""
    means = means_of((pair, left_out if pair.preference is None else pair.preference) for pair in pairs)
    return sum(means.values()) / len(means) if means else left_out


def means_of(values: Iterable[tuple[JudgedPair, float]]) -> dict[str, float]:
    """The mean value of each example."""
    by_example: dict[str, list[float]] = defaultdict(list)
    for pair, value in values:
        by_example[pair.example or pair.name].append(value)
    return {example: sum(each) / len(each) for example, each in by_example.items()}


def _both(pairs: Iterable[JudgedPair]) -> list[tuple[JudgedPair, float, float]]:
    """The pairs with a verdict in both orders, and these verdicts."""
    return [
        (p, p.shown_first, p.shown_second)
        for p in pairs
        if p.shown_first is not None and p.shown_second is not None and not p.identical
    ]


def position_bias(pairs: Iterable[JudgedPair]) -> Estimate:
    """Probability of preferring the first position minus that of the second, over pairs judged in both orders."""
    return mean_of(list(means_of((pair, first - second) for pair, first, second in _both(pairs)).values()), -1.0, 1.0)


def follows_position(pairs: Iterable[JudgedPair]) -> Estimate:
    """Share of pairs whose two verdicts prefer the same position, over pairs without a tie in either order."""
    winners = [(pair, winner(first), winner(second)) for pair, first, second in _both(pairs)]
    shares = means_of((pair, float(first != second)) for pair, first, second in winners if first and second)
    return mean_of(list(shares.values()))


def consistency(pairs: Iterable[JudgedPair]) -> Estimate:
    """Share of repeated judgements with the winner of the first one."""
    equal = [
        (pair, float(winner(first) == winner(again)))
        for pair in pairs
        for first, repeats in ((pair.shown_first, pair.again_first), (pair.shown_second, pair.again_second))
        for again in repeats
        if first is not None and again is not None
    ]
    return mean_of(list(means_of(equal).values()))


def from_alpaca_eval(preference: float) -> float:
    """AlpacaEval's preference (1 for the baseline, 2 for the model, 0 or 1.5 for a tie) as a number from 0 to 1."""
    return 0.5 if preference == 0 else preference - 1
