"""How much the runs of an arm vary: estimated over all arms together, since each arm has few seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Runs:
    """The runs of one arm on one metric.

    Attributes:
        values: [seeds, examples]; one row for a model without seeds.
        seeds: those of the rows; empty for a model that was not trained, whose runs cannot vary.
    """

    values: Values
    seeds: tuple[int, ...]

    def on(self, seeds: tuple[int, ...]) -> Values:
        """[seeds, examples] of some seeds; without seeds of its own the one row for each."""
        rows = [self.seeds.index(seed) for seed in seeds] if self.seeds else [0] * max(1, len(seeds))
        return self.values[rows]

    @property
    def logs(self) -> Runs | None:
        """The same on the log scale, None where a run's mean is not positive.

        A run's mean becomes its logarithm; its examples vary around that by their share of the mean, which is what they
        add to the error of the logarithm (the delta method). So examples of 0 are no trouble.
        """
        means = self.values.mean(axis=1, keepdims=True)
        return Runs(np.log(means) + self.values / means - 1, self.seeds) if (means > 0).all() else None


@dataclass(frozen=True)
class RunVariance:
    """Variance of a run's mean over examples, in the metric's unit squared; it includes what sampling adds to it.

    Attributes:
        paired, paired_df: without what is common to all runs of a seed, which cancels between arms; the residual of
            arms by seeds.
        whole, whole_df: with it, for a comparison with a model without seeds; degrees of freedom by Satterthwaite.
        own: by arm, of its runs alone, without what is common to a seed.
        own_whole: by arm, with it.
        own_df: by arm.
    """

    paired: float
    paired_df: float
    whole: float
    whole_df: float
    own: Mapping[str, float]
    own_whole: Mapping[str, float]
    own_df: Mapping[str, int]


@lru_cache
def _fit(names: tuple[str, ...], seeds: tuple[int, ...]) -> tuple[Values, Values]:
    """Which run is of which arm, and the hat matrix of arms and seeds, for runs with those names and seeds."""
    of_arm = np.array([[name == each for each in dict.fromkeys(names)] for name in names], dtype=np.float64)
    of_seed = np.array([[seed == each for each in sorted(set(seeds))] for seed in seeds], dtype=np.float64)
    design = np.hstack([of_arm, of_seed])
    return of_arm, design @ np.linalg.pinv(design)


def run_variance(arms: Mapping[str, Runs]) -> RunVariance | None:
    """The variance of runs, by least squares on the means of all runs; arms without seeds are not pooled.

    Returns:
        None where no arm has two seeds.
    """
    trained = {name: runs for name, runs in arms.items() if runs.seeds}
    names = [name for name, runs in trained.items() for _ in runs.seeds]
    seeds = [seed for runs in trained.values() for seed in runs.seeds]
    if len(names) < len(trained) + 1:
        return None
    means = np.concatenate([runs.values.mean(axis=1) for runs in trained.values()])
    of_arm, hat = _fit(tuple(names), tuple(seeds))
    rest = means - hat @ means
    df = len(means) - round(np.trace(hat))
    within = means - of_arm @ (of_arm.T @ means / of_arm.sum(axis=0))
    squares, all_squares, all_df = float(rest @ rest), float(within @ within), len(means) - len(trained)
    whole_df = float(all_df)
    if 0 < df < all_df and all_squares > 0:
        common = max(all_squares - squares, 0.0)
        whole_df = all_squares**2 / (common**2 / (all_df - df) + squares**2 / df)
    own, own_whole, own_df = {}, {}, {}
    for place, (name, runs) in enumerate(trained.items()):
        if len(runs.seeds) > 1:
            rows = of_arm[:, place] > 0
            left = float((1 - np.diag(hat)[rows]).sum())
            own[name] = float(rest[rows] @ rest[rows]) / left if left > 1e-9 else 0.0
            own_whole[name] = float(means[rows].var(ddof=1))
            own_df[name] = len(runs.seeds) - 1
    return RunVariance(
        paired=squares / df if df else 0.0,
        paired_df=float(df),
        whole=all_squares / all_df,
        whole_df=whole_df,
        own=own,
        own_whole=own_whole,
        own_df=own_df,
    )
