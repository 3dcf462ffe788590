"""The power of a study with the planned seeds and prompts, before its first run."""

from __future__ import annotations

import csv
import gzip
import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halos_pl.common.messages import counted
from halos_pl.evaluation.metrics import RATIOS, is_share
from halos_pl.study.comparison import ratio
from halos_pl.study.power import FARTHEST, Noise, detectable, power
from halos_pl.study.run_variance import Runs, run_variance
from halos_pl.study.standard_error import MARGIN, heterogeneous_df
from halos_pl.study.statistics import LEVEL

if TYPE_CHECKING:
    from halos_pl.study.spec import Study

#: Differences of shares whose power is stated.
POINTS = (0.12, 0.2)
#: The largest SD over prompts of the difference of two shares: both 0.5 and independent.
WORST = math.sqrt(0.5)
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
    if settings:
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
    for source, prompt_sd, run_sd, sampling_sd in assumptions:
        noise = Noise.planned(
            prompt_sd=prompt_sd, run_sd=run_sd, sampling_sd=sampling_sd, count=examples, seeds=seeds, arms=arms
        )
        level = LEVEL / comparisons / MARGIN
        size = detectable(noise, level)
        deviations = f"prompt_sd {prompt_sd:.2g}, run_sd {run_sd:.2g}"
        deviations += f", sampling_sd {sampling_sd:.2g}" if sampling_sd else ""
        powers = [f"{power(p, noise, level):.2f} for {100 * p:.0f} points" for p in POINTS if is_share(metric)]
        if size is None or (is_share(metric) and size > 1) or (metric in RATIOS and size > FARTHEST):
            powers.append("never 0.80, whatever the difference")
        elif metric in RATIOS:
            powers.append(f"0.80 for a factor of {ratio(math.exp(size))}")
        else:
            powers.append(
                f"0.80 for {f'{100 * size:.0f} points' if is_share(metric) else f'a difference of {size:.2g}'}"
            )
        lines.append(f"  {deviations} ({source}): {', '.join(powers)}")
    if not study.power:
        lines.append("  for sharper figures, set power: {prompt_sd, run_sd} or {values} from a pilot study")
    return lines
