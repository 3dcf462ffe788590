"""How often a report makes any false claim, and how often it finds a true difference, in simulated studies.

    python benchmarks/family_wise_error.py --studies 2000 --write docs/statistics.md

Each study goes through the decisions of a real report (`halos_pl.study.decisions.compare`). A value is the sum of what
arm, prompt, arm and prompt, run, and run and prompt add; a binary one is drawn from the logistic function of such a
sum. The power stands beside that of cbdf31b, where each comparison estimated its own run variance.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from halos_pl.files import write
from halos_pl.study.decisions import compare, corrected
from halos_pl.study.power import Noise, power
from halos_pl.study.run_variance import Runs
from halos_pl.study.statistics import LEVEL, estimate

BEFORE = "cbdf31b"
BEGIN, END = "<!-- simulated -->", "<!-- end of what is simulated -->"


#: SD over prompts of the log odds that a binary metric is drawn from.
LATENT = 1.5


@dataclass(frozen=True)
class Setting:
    """One kind of study.

    Attributes:
        arms: with the reference arm.
        seeds, prompts, metrics: of the study.
        run: SD over runs, in SDs over prompts (of the log odds where the metric is binary).
        binary: whether values are 0 or 1.
        uneven: whose run SD is three times that of the other arms: ``reference``, ``arm`` or nobody's.
        untrained: the reference is a model without seeds.
        sampled: share of the variance over prompts that is drawn anew in each run, where the metric is not binary.
        base: mean of a binary metric.
        effect: true difference of the first other arm: a share, or in SDs over prompts.
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
        """What is special about it."""
        kind = f"binary, mean {self.base:g}" if self.binary else "continuous"
        uneven = f"; run SD of {'the reference' if self.uneven == 'reference' else 'one arm'} three times the others'"
        return kind + (uneven if self.uneven else "") + ("; untrained reference" if self.untrained else "")

    def run_sd(self, arm: int) -> float:
        """SD over runs of an arm."""
        one = {"": None, "reference": 0, "arm": 1}[self.uneven]
        return self.run if one is None or arm == one else self.run / 3


@lru_cache
def log_odds(share: float) -> float:
    """The mean of the log odds at which binary values have that mean."""
    normal = np.linspace(-4, 4, 401)
    weights = stats.norm.pdf(normal)

    def excess(odds: float) -> float:
        return float(weights @ special.expit(odds + LATENT * normal)) / float(weights.sum()) - share

    return float(optimize.brentq(excess, -20, 20))


def drawn(s: Setting, rng: np.random.Generator) -> dict[str, Runs]:
    """The values of one metric of one study."""
    common = rng.normal(size=s.prompts)
    arms: dict[str, Runs] = {}
    for number in range(s.arms):
        seeds = () if s.untrained and number == 0 else tuple(range(s.seeds))
        shape = (max(1, len(seeds)), 1)
        run = s.run_sd(number) * rng.normal(size=shape) if seeds else np.zeros(shape)
        prompts = math.sqrt(0.5) * (common + rng.normal(size=s.prompts))
        effect = s.effect if number == 1 else 0.0
        if s.binary:
            odds = log_odds(s.base + effect) + LATENT * (prompts + run)
            values = (rng.random((shape[0], s.prompts)) < special.expit(odds)).astype(np.float64)
        else:
            anew = rng.normal(size=(shape[0], s.prompts))
            values = effect + math.sqrt(1 - s.sampled) * prompts + run + math.sqrt(s.sampled) * anew
        arms[f"arm {number}"] = Runs(values, seeds)
    return arms


@dataclass
class Count:
    """Of so many studies: those that claim anything, that claim significance, that find the first other arm.

    ``least`` has the smallest corrected p of cbdf31b in each study, ``first`` that of the first other arm.
    """

    studies: int = 0
    claimed: int = 0
    significant: int = 0
    found: int = 0
    least: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def count(setting: Setting, studies: int, seed: int, beside: bool = False) -> Count:
    """Simulates studies of one setting, ``beside`` with p of cbdf31b as well."""
    rng, result = np.random.default_rng([seed, *map(ord, repr(setting))]), Count(studies)
    for _ in range(studies):
        told = []
        for metric in range(setting.metrics):
            arms = drawn(setting if metric == 0 else replace(setting, effect=0.0), rng)
            found = compare(str(metric), arms, "arm 0", planned=setting.seeds, primary=metric == 0)
            # That runs differ is false only where no run differs from another.
            told += [c for c in found if c.significant or (c.runs_only and not setting.run)]
            if beside and metric == 0:
                p = p_before(arms)
                result.least.append(float(p.min()))
                result.first.append(float(p[0]))
        result.claimed += bool(told)
        result.significant += any(c.significant for c in told)
        result.found += any(c.arm == "arm 1" and c.significant for c in told)
    return result


def p_before(arms: dict[str, Runs]) -> NDArray[np.float64]:
    """p of cbdf31b after Holm's correction over the arms, where each comparison estimates its own run variance.

    Its bootstrap over seeds and examples converges to the closed form of :func:`estimate`, which is used instead.
    """
    p = []
    for runs in list(arms.values())[1:]:
        e = estimate(runs.values - arms["arm 0"].values)
        p.append(float(2 * stats.t.sf(abs(e.value) / e.error, e.freedom)) if e.error else 1.0)
    return np.asarray(corrected(p, len(p), step_down=True))


def bounds(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of Clopper and Pearson."""
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
]
COMPARED = [
    Setting(arms, seeds, prompts, run, True)
    for arms, seeds, prompts in ((4, 3, 120), (8, 3, 120), (8, 5, 120), (12, 3, 300))
    for run in (0.0, 0.2)
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
        prompt_sd=math.sqrt(1 - s.sampled),  # of the difference: half of each arm's variance is common to both
        run_sd=s.run,
        sampling_sd=math.sqrt(2 * s.sampled),
        count=s.prompts,
        seeds=s.seeds,
        arms=s.arms,
    )
    return power(effect, noise, LEVEL / (s.arms - 1))


def table(studies: int, seed: int, tell: Callable[[str], None]) -> Iterator[str]:
    """The lines of the three tables."""
    yield from (
        f"Share of {studies} simulated studies without a difference whose report claims one (95 % interval).",
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
        f"How often the one arm that differs is significant (binary, {studies} studies), beside {BEFORE} at the level"
        " at which it makes as many false claims in that setting, and at that at which it makes 5 %.",
        "",
        "| arms | seeds x prompts | run SD | false claims | points | found |"
        f" {BEFORE}, as many | {BEFORE}, 5 % | false claims of {BEFORE} as it was |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for s in COMPARED:
        none = count(s, studies, seed, beside=True)
        least = np.sort(none.least)
        for effect in (0.12, 0.2):
            some = count(replace(s, base=0.4, effect=effect), studies, seed, beside=True)
            same, five = (
                float(np.mean(np.array(some.first) < least[max(0, round(rate * studies) - 1)]))
                for rate in (none.significant / studies, LEVEL)
            )
            line = (
                f"| {s.arms} | {s.seeds} x {s.prompts} | {s.run:g} | {none.significant / studies:.3f} |"
                f" {100 * effect:.0f} | {some.found / studies:.2f} | {same:.2f} | {five:.2f} |"
                f" {np.mean(least < LEVEL):.3f} |"
            )
            tell(line)
            yield line
    yield from (
        "",
        f"The power that a study states before its first run, and how often {studies} studies with these deviations"
        " find it.",
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
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help=f"file whose text between {BEGIN} and {END} is replaced")
    args = parser.parse_args()
    lines = list(table(args.studies, args.seed, lambda line: print(line, flush=True)))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        write(args.write, head + "\n".join([BEGIN, *lines, ""]) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
