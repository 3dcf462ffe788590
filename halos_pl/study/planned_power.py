"""The power of a study with the planned seeds and prompts, before its first run."""

from __future__ import annotations

import csv
import gzip
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halos_pl.common.messages import counted
from halos_pl.evaluation.metrics import RATIOS, is_share
from halos_pl.study.comparison import ratio
from halos_pl.study.power import FARTHEST, POWER, Noise, detectable, equivalence_power, power
from halos_pl.study.run_variance import Runs, run_variance
from halos_pl.study.standard_error import MARGIN, heterogeneous_df
from halos_pl.study.statistics import LEVEL

if TYPE_CHECKING:
    from halos_pl.study.spec import Study

#: Differences of shares whose power is stated.
POINTS = (0.12, 0.2)
#: The largest SD over prompts of the difference of two shares: both 0.5 and independent.
WORST = math.sqrt(0.5)
#: A study with a lower power for the difference that it names is hopeless.
HOPELESS = 0.5
#: The largest number of seeds that is proposed instead.
MOST_SEEDS = 20
#: The SD of runs assumed as the worst case: 0.4 of the SD of a share over prompts.
WORST_RUN = 0.2


def assumed(study: Study) -> list[tuple[str, float, float, float]]:
    """The standard deviations that the power is computed for: (source, of prompts, of runs, of sampling).

    Empty if nothing is known about them.

    Raises:
        ValueError: for values of an earlier study that do not determine them.
    """
    settings = study.power
    if "values" in settings:
        path = Path(settings["values"])
        return [(f"from {path}", *deviations_of(path, study.primary))]
    if "prompt_sd" in settings:
        return [("as stated", settings["prompt_sd"], settings["run_sd"], settings.get("sampling_sd", 0.0))]
    if is_share(study.primary):
        prompts = "worst case for a share"
        return [
            (f"{prompts}; runs do not vary", WORST, 0.0, 0.0),
            (f"{prompts}; runs vary with 0.4 of its SD", WORST, WORST_RUN, 0.0),
        ]
    return []


def deviations_of(path: Path, metric: str) -> tuple[float, float, float]:
    """SD over prompts, of runs and of sampling in an earlier study, averaged over its pairs of arms.

    Args:
        path: ``values.csv.gz`` of that study.
        metric: name of the metric; those in ``RATIOS`` are taken on the log scale.

    Raises:
        ValueError: if it cannot be read, or no two arms have two seeds in common.
    """
    values: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    try:
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if line["metric"] == metric and line["seed"]:
                    values[line["arm"], int(line["seed"])][line["example"]] = float(line["value"])
    except (OSError, EOFError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as the values of a study: {error or type(error).__name__}") from error
    if any(not math.isfinite(value) for by_example in values.values() for value in by_example.values()):
        raise ValueError(f"{path} has values of {metric} that are not finite")
    common = sorted(set.intersection(*map(set, values.values()))) if values else []
    arms: dict[str, Runs] = {}
    for name in {arm for arm, _ in values}:
        seeds = tuple(sorted(seed for arm, seed in values if arm == name))
        of_arm: Runs | None = Runs(np.array([[values[name, s][e] for e in common] for s in seeds]), seeds)
        if metric in RATIOS and of_arm is not None and common:
            of_arm = of_arm.logs
        if of_arm is not None and len(seeds) > 1:
            arms[name] = of_arm
    prompts, samplings = [], []
    for one, other in itertools.combinations(arms.values(), 2):
        seeds = tuple(sorted(set(one.seeds) & set(other.seeds)))
        if len(seeds) > 1 and len(common) > 1:
            difference = one.on(seeds) - other.on(seeds)
            rest = difference - difference.mean(axis=0) - difference.mean(axis=1, keepdims=True) + difference.mean()
            sampling = float((rest**2).sum()) / ((len(seeds) - 1) * (len(common) - 1))
            samplings.append(sampling)
            prompts.append(max(float(difference.mean(axis=0).var(ddof=1)) - sampling / len(seeds), 0.0))
    variance = run_variance(arms)
    if not prompts or variance is None:
        raise ValueError(f"{path} has no two arms with {metric} for two seeds in common")
    sampling = float(np.mean(samplings))
    runs = max(variance.paired - sampling / 2 / len(common), 0.0)
    deviations = math.sqrt(float(np.mean(prompts))), math.sqrt(runs), math.sqrt(sampling)
    rounding = 1e-12 * max(float(np.abs(of_arm.values).max()) for of_arm in arms.values())
    if max(deviations) <= rounding:
        raise ValueError(f"{path}: {metric} does not vary there, so the power cannot be computed from it")
    return deviations


def power_lines(study: Study, examples: int) -> list[str]:
    """The power of comparisons on the primary metric, one line per set of standard deviations.

    Args:
        study: the study.
        examples: prompts of the primary metric.

    Raises:
        ValueError: for values of an earlier study that do not determine it.
    """
    arms, seeds, metric = len(study.arms), len(study.seeds), study.primary
    comparisons = arms - 1
    size_of = f"{counted(arms, 'arm')} x {counted(seeds, 'seed')} x {counted(examples, 'prompt')}"
    head = f"power for {metric}, the primary metric, with {size_of}"
    if not comparisons:
        return [f"{head}: not computed, as the only arm is compared with the untrained model"]
    if seeds == 1:
        return [f"{head}: none, since no difference can be significant over one seed"]
    assumptions = assumed(study)
    if not assumptions:
        return [f"{head}: unknown; set power: {{prompt_sd, run_sd}}, or {{values: values.csv.gz of an earlier study}}"]
    df = heterogeneous_df((seeds - 1) * comparisons, seeds)
    lines = [f"{head}: t with {df:g} run degrees of freedom, level {LEVEL:g} / {comparisons}"]
    for assumption in assumptions:
        source, prompt_sd, run_sd, sampling_sd = assumption
        noise, level = planned_noise(assumption, arms, seeds, examples)
        size = detectable(noise, level)
        deviations = f"prompt_sd {prompt_sd:.2g}, run_sd {run_sd:.2g}"
        deviations += f", sampling_sd {sampling_sd:.2g}" if sampling_sd else ""
        powers = [f"{power(p, noise, level):.2f} for {_size(metric, p)}" for p in POINTS if is_share(metric)]
        powers = [f"{each.power:.2f} {each.what}" for each in _named(study, assumption, examples)] + powers
        if size is None or (is_share(metric) and size > 1) or (metric in RATIOS and size > FARTHEST):
            powers.append("never 0.80, whatever the difference")
        else:
            powers.append(f"0.80 for {_size(metric, size)}")
        lines.append(f"  {deviations} ({source}): {', '.join(powers)}")
    if not {"prompt_sd", "values"} & {*study.power}:
        lines.append("  for sharper figures, set power: {prompt_sd, run_sd} or {values} from a pilot study")
    return lines


def planned_noise(
    assumption: tuple[str, float, float, float], arms: int, seeds: int, examples: int
) -> tuple[Noise, float]:
    """The noise of a comparison in a study of that size, and the level of its test."""
    _, prompt_sd, run_sd, sampling_sd = assumption
    noise = Noise.planned(
        prompt_sd=prompt_sd, run_sd=run_sd, sampling_sd=sampling_sd, count=examples, seeds=seeds, arms=arms
    )
    return noise, LEVEL / (arms - 1) / MARGIN


def _size(metric: str, effect: float) -> str:
    """A difference on the scale of the test, in words."""
    if metric in RATIOS:
        return f"a factor of {ratio(math.exp(effect))}"
    return f"{100 * effect:.3g} points" if is_share(metric) else f"a difference of {effect:.2g}"


def hopeless(study: Study, examples: int) -> str | None:
    """One line if the study would probably miss the difference that it names, with what would help.

    Args:
        study: the study; one that names no difference, or whose variances are unknown, is not judged.
        examples: prompts of the primary metric.

    Raises:
        ValueError: for values of an earlier study that do not determine the power.
    """
    if len(study.arms) < 2:
        return None
    # The difference that is looked for, otherwise the margin; of assumed variances, the most favourable.
    found = [each for assumption in assumed(study) for each in _named(study, assumption, examples)[:1]]
    best = max(found, key=lambda each: each.power, default=None)
    if best is None or best.power >= HOPELESS:
        return None
    known = "" if {"prompt_sd", "values"} & {*study.power} else "; state power: {prompt_sd, run_sd} if you know them"
    size = f"{counted(best.arms, 'arm')} x {counted(best.seeds, 'seed')} x {counted(examples, 'prompt')}"
    return (
        f"the planned power is hopeless: on {study.primary}, {size} have a power of {best.power:.2f} {best.what}"
        f" ({best.assumption[0]}); it would be {best.help}{known}"
    )


def _named(study: Study, assumption: tuple[str, float, float, float], examples: int) -> list[_Planned]:
    """The power at the difference that the study looks for, and at its margin of equivalence; empty without both."""
    log = study.primary in RATIOS
    size = len(study.arms), len(study.seeds), examples
    named = (study.power.get("effect"), False), (study.equivalence, True)
    return [
        _Planned(study.primary, assumption, math.log(value) if log else float(value), margin, *size)
        for value, margin in named
        if value is not None
    ]


@dataclass(frozen=True)
class _Planned:
    """A study of some size, and how probably it decides on a difference.

    Attributes:
        metric: the primary metric.
        assumption: the standard deviations, as from :func:`assumed`.
        effect: the difference, on the scale of the test.
        margin: whether it is a margin, within which arms without a difference shall be called equivalent.
        arms, seeds, examples: the size.
    """

    metric: str
    assumption: tuple[str, float, float, float]
    effect: float
    margin: bool
    arms: int
    seeds: int
    examples: int

    @property
    def power(self) -> float:
        """0 for one seed, over which nothing can be significant, and for too few prompts."""
        noise, level = planned_noise(self.assumption, self.arms, self.seeds, self.examples)
        if self.seeds < 2 or 2.0 ** (1 - self.examples) >= level:
            return 0.0
        if self.margin:
            return equivalence_power(self.effect, noise, level, share=is_share(self.metric))
        return power(self.effect, noise, level)

    @property
    def what(self) -> str:
        """What the power is for."""
        size = _size(self.metric, self.effect)
        return f"to call equal arms equivalent within {size}" if self.margin else f"for {size}, the effect in question"

    @property
    def help(self) -> str:
        """The power with more seeds, more prompts and fewer arms, each alone: with as many as a good power takes."""
        larger = {
            "seed": [replace(self, seeds=n) for n in range(self.seeds + 1, max(self.seeds + 2, MOST_SEEDS + 1))],
            "prompt": [replace(self, examples=self.examples * 2**k) for k in range(1, 6)],
            "arm": [replace(self, arms=n) for n in range(self.arms - 1, 1, -1)],
        }
        parts = []
        for what, some in larger.items():
            if some:
                enough = next((each for each in some if each.power >= POWER), some[-1])
                number = {"seed": enough.seeds, "prompt": enough.examples, "arm": enough.arms}[what]
                parts.append(f"{enough.power:.2f} with {counted(number, what)}")
        return ", ".join(parts)
