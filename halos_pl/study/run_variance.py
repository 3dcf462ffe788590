"""The variance between runs, estimated over all arms together, since each arm has few seeds."""

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
        seeds: seeds of the rows; empty for an untrained model, which has no runs to vary.
    """

    values: Values
    seeds: tuple[int, ...]

    def on(self, seeds: tuple[int, ...]) -> Values:
        """Values [seeds, examples] of some seeds; the single row repeated if the model has no seeds."""
        rows = [self.seeds.index(seed) for seed in seeds] if self.seeds else [0] * max(1, len(seeds))
        return self.values[rows]

    @property
    def logs(self) -> Runs | None:
        """The same on the log scale; None if the mean of a run is not positive.

        The mean of a run becomes its logarithm, and examples vary around it relative to the mean (the delta method), so
        examples may be 0.
        """
        means = self.values.mean(axis=1, keepdims=True)
        return Runs(np.log(means) + self.values / means - 1, self.seeds) if (means > 0).all() else None


@dataclass(frozen=True)
class RunVariance:
    """Variance of a run's mean over examples, in the squared unit of the metric, sampling included.

    Attributes:
        paired, paired_df: without the effect of the seed, which cancels between arms: the residual of arms x seeds.
        whole, whole_df: with the effect of the seed, for a comparison with a model without seeds; degrees of freedom
            by Satterthwaite.
        by_arm: variance of each arm's runs alone, without the effect of the seed.
        whole_by_arm: the same with the effect of the seed.
        df_by_arm: degrees of freedom of both.
    """

    paired: float
    paired_df: float
    whole: float
    whole_df: float
    by_arm: Mapping[str, float]
    whole_by_arm: Mapping[str, float]
    df_by_arm: Mapping[str, int]


@lru_cache
def _fit(names: tuple[str, ...], seeds: tuple[int, ...]) -> tuple[Values, Values]:
    """The indicator matrix of arms, and the hat matrix of arms and seeds, for runs with these names and seeds."""
    of_arm = np.array([[name == each for each in dict.fromkeys(names)] for name in names], dtype=np.float64)
    of_seed = np.array([[seed == each for each in sorted(set(seeds))] for seed in seeds], dtype=np.float64)
    design = np.hstack([of_arm, of_seed])
    return of_arm, design @ np.linalg.pinv(design)


def run_variance(arms: Mapping[str, Runs]) -> RunVariance | None:
    """The variance between runs, by least squares on the means of all runs; arms without seeds are left out.

    Returns:
        None if no arm has two seeds.
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
    by_arm, whole_by_arm, df_by_arm = {}, {}, {}
    for place, (name, runs) in enumerate(trained.items()):
        if len(runs.seeds) > 1:
            rows = of_arm[:, place] > 0
            left = float((1 - np.diag(hat)[rows]).sum())
            by_arm[name] = float(rest[rows] @ rest[rows]) / left if left > 1e-9 else 0.0
            whole_by_arm[name] = float(means[rows].var(ddof=1))
            df_by_arm[name] = len(runs.seeds) - 1
    return RunVariance(
        paired=squares / df if df else 0.0,
        paired_df=float(df),
        whole=all_squares / all_df,
        whole_df=whole_df,
        by_arm=by_arm,
        whole_by_arm=whole_by_arm,
        df_by_arm=df_by_arm,
    )
