"""Differences between the arms of a sweep at each point, over seeds and over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special
from statsmodels.stats.multitest import multipletests

from halos_pl.candidates.spec import Cell, Sweep
from halos_pl.candidates.values import Values
from halos_pl.study.standard_error import Floats

LEVEL = 0.05


@dataclass(frozen=True)
class Mean:
    """A cell's primary metric.

    Attributes:
        value: mean over seeds and prompts.
        seed_sd: standard deviation over seeds; 0 for a single one.
        seeds: number of seeds.
    """

    value: float
    seed_sd: float
    seeds: int


@dataclass(frozen=True)
class Difference:
    """The primary metric of an arm minus that of the baseline at the same point.

    Attributes:
        effect: its mean.
        seeds: its standard error over seeds, for these held-out prompts; 0 for a single seed.
        prompts: its standard error over prompts, for these seeds.
        df: degrees of freedom: the number of prompts minus 1.
        p: two-sided p of a t test with both errors, corrected by Holm over all differences of the sweep.
    """

    effect: float
    seeds: float
    prompts: float
    df: int
    p: float

    @property
    def error(self) -> float:
        """Standard error over new seeds and new prompts.

        Both parts contain the variance that is particular to a seed *and* a prompt, so it is slightly too large.
        """
        return float(np.hypot(self.seeds, self.prompts))

    @property
    def reach(self) -> float:
        """Half the width of the 95% interval."""
        return self.reach_of(1)

    def reach_of(self, tests: int) -> float:
        """Half the width of the interval that holds for the best of ``tests`` (Bonferroni)."""
        return float(special.stdtrit(self.df, 1 - LEVEL / 2 / tests)) * self.error

    @property
    def decided(self) -> bool:
        """Whether it is significant."""
        return self.p < LEVEL


def means(values: Values) -> dict[Cell, Mean]:
    """The primary metric of each cell that has a seed."""
    found = {}
    for cell, seeds in values.seeds().items():
        if seeds:
            of_seeds = [line[values.sweep.primary] for line in seeds.values()]
            sd = float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else 0.0
            found[cell] = Mean(float(np.mean(of_seeds)), sd, len(of_seeds))
    return found


def differences(values: Values) -> dict[Cell, Difference]:
    """By cell of each arm but the baseline, where both have finished the same rounds."""
    sweep, by_seed, by_prompt = values.sweep, values.seeds(), values.of_prompts()
    found = {}
    for cell in sweep.cells:
        other = cell._replace(arm=sweep.reference_arm)
        shared = sorted(by_seed[cell].keys() & by_seed[other].keys())
        rounds = sorted(by_prompt[cell].keys() & by_prompt[other].keys())
        if cell == other or not shared or not rounds:
            continue
        of_seeds = [by_seed[cell][s][sweep.primary] - by_seed[other][s][sweep.primary] for s in shared]
        of_prompts = _pooled(by_prompt[cell], rounds) - _pooled(by_prompt[other], rounds)
        found[cell] = _difference(of_seeds, of_prompts)
    return _corrected(sweep, found)


def over_chance(values: Values) -> dict[Cell, Difference]:
    """The primary metric minus 1/2 where the least is flipped and the most is kept; p is not given."""
    sweep, by_seed, by_prompt = values.sweep, values.seeds(), values.of_prompts()
    found = {}
    for cell, rounds in by_prompt.items():
        if rounds and by_seed[cell] and (cell.noise, cell.desirable) == (sweep.noise[0], sweep.desirable[-1]):
            seeds = [line[sweep.primary] - 0.5 for line in by_seed[cell].values()]
            found[cell] = _difference(seeds, _pooled(rounds, sorted(rounds)) - 0.5)
    return found


def _difference(of_seeds: Sequence[float], of_prompts: Floats) -> Difference:
    n, m = len(of_seeds), len(of_prompts)
    return Difference(
        effect=float(np.mean(of_seeds)),
        seeds=float(np.std(of_seeds, ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
        prompts=float(np.std(of_prompts, ddof=1) / np.sqrt(m)),
        df=m - 1,
        p=1.0,
    )


def _pooled(rounds: Mapping[int, tuple[int, float, Sequence[float]]], kept: Sequence[int]) -> Floats:
    """The mean of each prompt over the seeds of all rounds."""
    weights = [rounds[first][0] for first in kept]
    return np.average([rounds[first][2] for first in kept], axis=0, weights=weights)


def _corrected(sweep: Sweep, found: Mapping[Cell, Difference]) -> dict[Cell, Difference]:
    raw = []
    for each in found.values():
        sure = 0.0 if each.effect else 1.0
        raw.append(float(2 * special.stdtr(each.df, -abs(each.effect) / each.error)) if each.error else sure)
    adjusted = multipletests(raw, method="holm")[1] if raw else []
    return {cell: replace(each, p=float(p)) for (cell, each), p in zip(found.items(), adjusted, strict=True)}
