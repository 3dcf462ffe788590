"""How often a report makes any false claim, and how often it finds a true difference, in simulated studies.

    python benchmarks/family_wise_error.py --studies 2000 --write docs/statistics.md

The decisions are those of `halos_pl.study.decisions.compare`, vectorised over many studies; a test compares the two. A
value is the sum of the effects of arm, prompt, arm × prompt, run, and run × prompt; a binary one is drawn from the
logistic function of such a sum. The power is compared with that of an unpooled method, in which each comparison
estimates its own run variance.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from halos_pl.common.files import write
from halos_pl.study.power import Noise, power
from halos_pl.study.run_variance import Runs
from halos_pl.study.standard_error import MARGIN, Floats, caution, errors, heterogeneous_df
from halos_pl.study.statistics import LEVEL

#: A variance of runs with its degrees of freedom.
Part = tuple[Floats, Floats | float]

UNPOOLED = "unpooled"
BEGIN, END = "<!-- simulated -->", "<!-- end of what is simulated -->"


#: SD over prompts of the log odds from which a binary metric is drawn.
LATENT = 1.5


@dataclass(frozen=True)
class Setting:
    """One kind of study.

    Attributes:
        arms: Number of arms, including the reference arm.
        seeds, prompts, metrics: Numbers of each in the study.
        run: SD over runs, in SDs over prompts (of the log odds for a binary metric).
        binary: Whether values are 0 or 1.
        uneven: Which arm's run SD is three times that of the others: ``reference``, ``arm`` or, if empty, none.
        untrained: Whether the reference is a model without seeds.
        sampled: Share of the variance over prompts that is drawn anew in each run, for a continuous metric.
        base: Mean of a binary metric.
        effect: True difference of the first other arm: a share, or in SDs over prompts.
    """

    arms: int
    seeds: int
    prompts: int
    run: float
    binary: bool = False
    metrics: int = 1
    uneven: str = ""
    untrained: bool = False
    sampled: float = 0.3
    base: float = 0.5
    effect: float = 0.0

    @property
    def kind(self) -> str:
        """The metric and anything unusual, as a table cell."""
        kind = f"binary, mean {self.base:g}" if self.binary else f"continuous, {100 * self.sampled:g}% sampled"
        uneven = f"; run SD of {'the reference' if self.uneven == 'reference' else 'one arm'} three times the others'"
        return kind + (uneven if self.uneven else "") + ("; untrained reference" if self.untrained else "")

    def run_sd(self, arm: int) -> float:
        """The SD of an arm over runs."""
        one = {"": None, "reference": 0, "arm": 1}[self.uneven]
        return self.run if one is None or arm == one else self.run / 3


@lru_cache
def log_odds(share: float) -> float:
    """The mean of the log odds for which binary values have the mean ``share``."""
    normal = np.linspace(-4, 4, 401)
    weights = stats.norm.pdf(normal)

    def excess(odds: float) -> float:
        return float(weights @ special.expit(odds + LATENT * normal)) / float(weights.sum()) - share

    return float(optimize.brentq(excess, -20, 20))


def drawn(s: Setting, studies: int, rng: np.random.Generator) -> Floats:
    """The primary metric, [studies, arms, seeds, prompts]; an untrained reference has the same values for each seed.

    The other metrics of a study are exploratory: no claims are made about them.
    """
    shape = (studies, s.arms, s.seeds, s.prompts)
    prompts = rng.normal(size=(studies, 1, 1, s.prompts)) + rng.normal(size=(studies, s.arms, 1, s.prompts))
    prompts *= math.sqrt(0.5)
    run = np.array([s.run_sd(arm) for arm in range(s.arms)])[:, None, None] * rng.normal(size=(*shape[:3], 1))
    effect = np.where(np.arange(s.arms) == 1, s.effect, 0.0)[:, None, None]
    if s.untrained:
        run[:, 0] = 0
    if s.binary:
        odds = np.array([log_odds(s.base + each) for each in effect.ravel()])[:, None, None]
        values = rng.random(shape, dtype=np.float32) < special.expit((odds + LATENT * (prompts + run)).astype("f4"))
    else:
        values = effect + math.sqrt(1 - s.sampled) * prompts + run
        values = values + math.sqrt(s.sampled) * rng.normal(size=shape)
    if s.untrained:
        values[:, 0] = values[:, 0, :1]
    return np.asarray(values, np.float64)


def arms_of(s: Setting, values: Floats) -> dict[str, Runs]:
    """One study in the form that reports use."""
    bare = [s.untrained and arm == 0 for arm in range(s.arms)]
    seeds = tuple(range(s.seeds))
    return {f"arm {i}": Runs(v[:1] if bare[i] else v, () if bare[i] else seeds) for i, v in enumerate(values)}


@dataclass(frozen=True)
class Found:
    """Decisions of many studies, [studies, arms - 1]: corrected p, and whether arms differ in these runs only.

    ``before`` is p of the unpooled method after Holm's correction over the arms.
    """

    p: Floats
    runs_only: NDArray[np.bool_]
    before: Floats

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Whether each difference is significant over seeds."""
        return self.p < LEVEL


def _square(residual: Floats, df: int) -> Floats:
    return np.asarray((residual**2).sum(axis=(1, 2)) / df)


def _holm(p: Floats) -> Floats:
    order = np.argsort(p, axis=1)
    steps = np.take_along_axis(p, order, 1) * (p.shape[1] - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(steps, axis=1), 1), 1)
    return adjusted


def decided(s: Setting, values: Floats) -> Found:
    """The decisions of studies with values [studies, arms, seeds, prompts]."""
    free, count = s.seeds - 1, s.prompts
    differences = values[:, 1:] - values[:, :1]
    by_run, by_example = differences.mean(axis=3), differences.mean(axis=2)
    effect = by_run.mean(axis=2)
    examples = by_example.var(axis=2, ddof=1) / count
    crossed = differences.var(axis=2).sum(axis=2) - count * by_run.var(axis=2)  # by run and example, over the seeds
    sampling = crossed / (free * (count - 1) * count)
    least = np.minimum(1.0, 2.0 ** (1 - np.count_nonzero(np.abs(by_example) > 1e-9, axis=2)))

    means = values.mean(axis=3)[:, 1 if s.untrained else 0 :]
    arms = means.shape[1]
    tests: list[list[Part]]
    own: list[Part]
    care: Floats | float
    within = means - means.mean(axis=2, keepdims=True)
    rest = within - within.mean(axis=1, keepdims=True)
    df = free * (arms - 1)
    if s.untrained:
        whole_df = np.full(len(values), float(free))
        if df:
            squares, all_squares = _square(rest, 1), _square(within, 1)
            whole_df = all_squares**2 / ((all_squares - squares) ** 2 / free + squares**2 / df)
        pooled: list[Part] = [((_square(within, free * arms) / s.seeds)[:, None], whole_df[:, None])]
        tests, own = [pooled], [((within**2).sum(axis=2) / free / s.seeds, free)]
        care = np.array([caution(each) for each in whole_df])[:, None]
    else:
        pool = ((_square(rest, df) / s.seeds)[:, None], heterogeneous_df(df, s.seeds))
        alone = (rest**2).sum(axis=2) / (free * (1 - 1 / arms)) / s.seeds
        tests = [[(2 * pool[0], pool[1])], [(alone[:, :1], free), pool]]
        own = [(alone[:, 1:], free), pool]
        care = caution(df)

    def p_of(runs: list[Part]) -> Floats:
        size, t_df = errors(runs, examples, sampling, count, care)
        return np.asarray(2 * special.stdtr(t_df, -np.abs(effect) / size))

    p = np.maximum(_holm(MARGIN * np.maximum(least, np.max([p_of(each) for each in tests], axis=0))), p_of(own))
    of_examples = 2 * special.stdtr(count - 1, -np.abs(effect) / np.sqrt(examples))
    runs_p = _holm(MARGIN * np.maximum(least, of_examples))

    seeds = by_run.var(axis=2, ddof=1) / s.seeds
    variance = np.max([seeds + examples - sampling, seeds, examples, sampling], axis=0)
    old_df = variance**2 / (seeds**2 / free + examples**2 / (count - 1) + sampling**2 / (free * (count - 1)))
    before = _holm(2 * special.stdtr(old_df, -np.abs(effect) / np.sqrt(variance)))
    return Found(p, (p >= LEVEL) & (runs_p < LEVEL), before)


@dataclass(frozen=True)
class Count:
    """How many studies claim anything, claim significance, and find the first other arm.

    ``least`` is the smallest corrected p of each study and ``first`` that of the first other arm; ``least_before`` and
    ``first_before`` are those of the unpooled method.
    """

    claimed: int
    significant: int
    found: int
    least: Floats
    first: Floats
    least_before: Floats
    first_before: Floats


def count(setting: Setting, studies: int, seed: int) -> Count:
    """Simulates studies of one setting."""
    rng = np.random.default_rng([seed, *map(ord, repr(setting))])
    step = max(1, 2_000_000 // (setting.arms * setting.seeds * setting.prompts))
    parts = [decided(setting, drawn(setting, min(step, studies - at), rng)) for at in range(0, studies, step)]
    p = np.concatenate([part.p for part in parts])
    significant = claims = p < LEVEL
    if not setting.run:  # "differs in these runs only" is false only if no run differs from another
        claims = claims | np.concatenate([part.runs_only for part in parts])
    before = np.concatenate([part.before for part in parts])
    return Count(
        int(claims.any(axis=1).sum()),
        int(significant.any(axis=1).sum()),
        int(significant[:, 0].sum()),
        p.min(axis=1),
        p[:, 0],
        before.min(axis=1),
        before[:, 0],
    )


def bounds(hits: int, of: int) -> tuple[float, float]:
    """The 95% interval of Clopper and Pearson."""
    low, high = stats.binomtest(hits, of).proportion_ci(0.95, "exact")
    return float(low), float(high)


GRID = [
    *(
        Setting(arms, seeds, prompts, run, binary, metrics)
        for arms, metrics, prompts in ((2, 1, 60), (4, 1, 120), (12, 1, 300))
        for seeds in (3, 5)
        for binary, runs in ((False, (0.2, 0.4)), (True, (0.0, 0.4)))
        for run in runs
    ),
    Setting(4, 3, 60, 0.2, True, metrics=7),
    Setting(12, 3, 60, 0.4, metrics=7),
    *(
        Setting(arms, seeds, 120, 0.4, uneven=whose)
        for arms, seeds in ((2, 3), (3, 3), (4, 3), (8, 3), (12, 5))
        for whose in ("reference", "arm")
    ),
    *(Setting(8, 3, 120, 0.4, True, uneven=whose) for whose in ("reference", "arm")),
    Setting(2, 3, 120, 0.4, untrained=True),
    Setting(9, 3, 120, 0.4, True, untrained=True),
    Setting(9, 5, 120, 0.0, True, untrained=True),
    Setting(5, 3, 120, 0.4, uneven="arm", untrained=True),
    *(Setting(8, 3, prompts, run, True, base=base) for prompts, run, base in ((60, 0.2, 0.95), (300, 0.0, 0.98))),
    *(Setting(2, 3, 300, run, sampled=sampled) for run, sampled in ((0.1, 0.0), (0.1, 1.0), (0.2, 0.0), (0.4, 1.0))),
    *(Setting(4, 3, 300, 0.2, sampled=1.0, uneven=whose) for whose in ("", "reference", "arm")),
    *(Setting(arms, 3, prompts, 0.2, True, uneven="reference") for arms, prompts in ((4, 60), (12, 300))),
]
#: Run SDs that studies of one design may have. The true one is unknown, so the worst sets the unpooled method's level.
RUNS = (0.0, 0.2, 0.4)
COMPARED = [
    Setting(arms, seeds, prompts, 0.0, True)
    for arms, seeds, prompts in ((4, 3, 120), (4, 5, 120), (8, 3, 120), (8, 5, 120), (12, 3, 300))
]
PLANNED = [
    (Setting(arms, seeds, prompts, run, sampled=sampled), effect)
    for arms, seeds, prompts, run, effect in (
        (2, 3, 120, 0.0, 0.25),
        (2, 3, 120, 0.1, 0.4),
        (2, 5, 120, 0.2, 0.4),
        (4, 3, 60, 0.1, 0.5),
        (4, 3, 300, 0.2, 0.7),
        (8, 3, 100, 0.05, 0.4),
        (8, 3, 100, 0.2, 0.7),
        (8, 5, 300, 0.1, 0.3),
        (12, 5, 100, 0.4, 1.1),
    )
    for sampled in (0.0, 0.5)
]


def planned(setting: Setting, effect: float) -> float:
    """The power that a study's plan states, from the true standard deviations."""
    s = setting
    noise = Noise.planned(
        prompt_sd=math.sqrt(1 - s.sampled),  # of the difference: both arms share half of each one's variance
        run_sd=s.run,
        sampling_sd=math.sqrt(2 * s.sampled),
        count=s.prompts,
        seeds=s.seeds,
        arms=s.arms,
    )
    return power(effect, noise, LEVEL / (s.arms - 1) / MARGIN)


def level_of(least: Floats, rate: float) -> float:
    """The corrected p below which a share ``rate`` of studies falls."""
    return float(np.sort(least)[min(len(least) - 1, round(rate * len(least)))])


def table(studies: int, seed: int, tell: Callable[[str], None]) -> Iterator[str]:
    """The lines of the three tables."""
    yield from (
        f"Share of {studies} simulated studies without any true difference whose report claims one (95% interval).",
        "",
        "| arms x metrics | seeds x prompts | run SD | metric | false claims |",
        "|---|---|---|---|---|",
    )
    for s in GRID:
        c = count(s, studies, seed)
        low, high = bounds(c.claimed, studies)
        line = f"| {s.arms} x {s.metrics} | {s.seeds} x {s.prompts} | {s.run:g} | {s.kind} |"
        line += f" {c.claimed / studies:.3f} [{low:.3f}, {high:.3f}] |"
        tell(line)
        yield line
    yield from (
        "",
        f"How often {studies} simulated studies find the one arm that differs (binary metric, mean 0.4), and how many"
        f' of {2 * studies} without a difference claim one. "Power" is that of this method. The {UNPOOLED} method is'
        " shown at the level at which it makes as many false claims in that setting, and at the level at which it makes"
        f" 5% in the worst of the run SDs {', '.join(f'{run:g}' for run in RUNS)}. The last two columns show both"
        " methods at the levels at which they make 5% in that very setting.",
        "",
        f"| arms | seeds x prompts | run SD | false claims | false claims, {UNPOOLED} | points | power |"
        f" {UNPOOLED}, as many false claims | {UNPOOLED}, 5% in the worst run SD | power at 5% here |"
        f" {UNPOOLED}, 5% here |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    )
    for design in COMPARED:
        nulls = {run: count(replace(design, run=run), 2 * studies, seed) for run in RUNS}
        worst = min(level_of(c.least_before, LEVEL) for c in nulls.values())
        for run in RUNS[:2]:
            none = nulls[run]
            for effect in (0.12, 0.2):
                some = count(replace(design, run=run, base=0.4, effect=effect), studies, seed)
                shares = [
                    some.found / studies,
                    np.mean(some.first_before < level_of(none.least_before, none.significant / 2 / studies)),
                    np.mean(some.first_before < worst),
                    np.mean(some.first < level_of(none.least, LEVEL)),
                    np.mean(some.first_before < level_of(none.least_before, LEVEL)),
                ]
                line = f"| {design.arms} | {design.seeds} x {design.prompts} | {run:g} |"
                line += f" {none.significant / 2 / studies:.3f} | {np.mean(none.least_before < LEVEL):.3f} |"
                line += f" {100 * effect:.0f} |" + "".join(f" {share:.2f} |" for share in shares)
                tell(line)
                yield line
    yield from (
        "",
        f"The power that a study states before its first run, and how often {studies} simulated studies with these"
        " standard deviations find the difference (both in SDs over prompts).",
        "",
        "| arms | seeds x prompts | run SD | sampled | difference | stated | found |",
        "|---|---|---|---|---|---|---|",
    )
    for s, effect in PLANNED:
        c = count(replace(s, effect=effect), studies, seed)
        line = f"| {s.arms} | {s.seeds} x {s.prompts} | {s.run:g} | {s.sampled:g} | {effect:g} |"
        line += f" {planned(s, effect):.2f} | {c.found / studies:.2f} |"
        tell(line)
        yield line


def main() -> None:
    """Prints the tables, and writes them to a file with ``--write``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help=f"file in which the text between {BEGIN} and {END} is replaced")
    args = parser.parse_args()
    lines = list(table(args.studies, args.seed, lambda line: print(line, flush=True)))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        write(args.write, head + "\n".join([BEGIN, *lines, ""]) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
