"""Finding 1: at equal rho, does the value function change the KL? Prints every number of docs/findings/rho.md.

    python experiments/ablations/rho_finding.py FOLDER [FOLDER ...] [--plot FILE] [--write PAGE]
    python experiments/ablations/rho_finding.py --rates FOLDER

A FOLDER has the report of ``ablations/rho``, ``rho_beta_1`` or ``rho_unclipped``, finished or not: the script reads its
``values.csv.gz``. Hypothesis, metric and decision rule are in the head of rho.yaml. ``--rates`` prints the learning
rates that the report of ``ablations/rho_rates`` gives for both.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean

import numpy as np
from computed import replace_computed
from numpy.typing import NDArray
from scipy import stats

from halos_pl.study import digits, tables
from halos_pl.study.read import load_study
from halos_pl.study.recorded import read_recorded
from halos_pl.study.results import Results
from halos_pl.study.run_variance import Runs, run_variance
from halos_pl.study.spec import StudyError

Values = NDArray[np.float64]
BASELINE, METRIC = "logistic", "kl_held_out"
#: Largest ratio of KL divergences that counts as equivalent, largest deviation from the target rho, and error rate.
MARGIN, OFF, LEVEL = 1.1, 0.1, 0.05


@dataclass(frozen=True)
class Arm:
    """An arm: a value function at a target of rho.

    Attributes:
        function: name of the value function.
        target: target of rho.
        achieved: for each seed, the geometric mean of rho over the steps after the first.
        runs: KL divergence [seeds, examples], nats.
        clipped: share of the runs' steps whose gradient was clipped; None if that was not recorded.
    """

    function: str
    target: float
    achieved: tuple[float, ...]
    runs: Runs
    clipped: float | None = None

    @property
    def mean_rho(self) -> float:
        return geometric_mean(self.achieved)

    @property
    def on_target(self) -> bool:
        return abs(self.mean_rho / self.target - 1) <= OFF

    @property
    def log_kl(self) -> Values:
        """Log of each run's mean KL divergence [seeds]."""
        means: Values = self.runs.values.mean(axis=1)
        return np.log(means)


@dataclass(frozen=True)
class Contrast:
    """A value function against the logistic one, on the log of the KL divergence, averaged over rho.

    Attributes:
        function: name of the value function.
        ratio, low, high: the ratio of KL divergences, and its interval at the level of one decision.
        power: chance to find equivalence if the true ratio is 1.
        decision: ``equivalent``, ``different`` or ``not decidable at this size``.
    """

    function: str
    ratio: float
    low: float
    high: float
    power: float
    decision: str


def contrast(function: str, pairs: Sequence[tuple[Arm, Arm]], variance: float, freedom: float, tests: int) -> Contrast:
    """The contrast of a value function with the logistic one, over runs and examples.

    The interval has level 1 - 2 LEVEL / tests, so it lies within the margin exactly if both one-sided tests at
    LEVEL / tests reject (Schuirmann 1987).

    Args:
        function: its name.
        pairs: its arm and the logistic arm, for each rho that both have.
        variance, freedom: variance of a run's log mean without the effect of the seed, and its degrees of freedom.
        tests: number of value functions that are tested.
    """
    each = []
    for mine, base in pairs:
        seeds = tuple(sorted({*mine.runs.seeds} & {*base.runs.seeds}))
        a, b = mine.runs.logs, base.runs.logs
        assert a is not None
        assert b is not None
        each.append((a.on(seeds) - b.on(seeds)).mean(axis=0))
    by_example = np.mean(each, axis=0)
    runs = sum(1 / len(m.runs.seeds) + 1 / len(b.runs.seeds) for m, b in pairs) / len(pairs) ** 2
    parts = np.array([variance * runs, by_example.var(ddof=1) / len(by_example)])
    error = math.sqrt(parts.sum())
    df = parts.sum() ** 2 / float((parts**2 / np.array([freedom, len(by_example) - 1])).sum())
    reach = float(stats.t.ppf(1 - LEVEL / tests, df)) * error
    mean, margin = float(by_example.mean()), math.log(MARGIN)
    low, high = mean - reach, mean + reach
    power = max(0.0, 2 * float(stats.t.cdf((margin - reach) / error, df)) - 1)
    decision = "not decidable at this size"
    if -margin < low and high < margin:
        decision = "equivalent"
    elif low > 0 or high < 0:
        decision = "different"
    return Contrast(function, math.exp(mean), math.exp(low), math.exp(high), power, decision)


def _levels(names: Sequence[object]) -> Values:
    """An indicator column for each level."""
    return np.array([[name == each for each in dict.fromkeys(names)] for name in names], float)


class Finding:
    """The finding for one study.

    Args:
        arms: its arms, those off their target included.
    """

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.arms = arms
        self.kept = [arm for arm in arms if arm.on_target]

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """The contrasts of all value functions that share a rho with the logistic one."""
        logs = {f"{arm.function} {arm.target}": Runs(arm.log_kl[:, None], arm.runs.seeds) for arm in self.kept}
        spread = run_variance(logs)
        if spread is None or not spread.paired_df:
            return []
        base = {arm.target: arm for arm in self.kept if arm.function == BASELINE}
        functions = list(dict.fromkeys(arm.function for arm in self.arms if arm.function != BASELINE))
        shared = {
            f: [(arm, base[arm.target]) for arm in self.kept if arm.function == f and arm.target in base]
            for f in functions
        }
        return [
            contrast(f, pairs, spread.paired, spread.paired_df, len(functions)) for f, pairs in shared.items() if pairs
        ]

    def explained(self) -> Mapping[str, float]:
        """Shares of the variance of log KL, seeds apart: by the targets of rho, by v after that, by their interaction,
        the rest.

        Sums of squares of nested least-squares fits. The targets are levels, as KL is not monotone in rho.
        """
        y = np.concatenate([arm.log_kl for arm in self.kept])
        seeds = [seed for arm in self.kept for seed in arm.runs.seeds]
        targets = [arm.target for arm in self.kept for _ in arm.runs.seeds]
        functions = [arm.function for arm in self.kept for _ in arm.runs.seeds]
        pairs = list(zip(targets, functions, strict=True))
        designs = [_levels(seeds)]
        for levels in (targets, functions, pairs):
            designs.append(np.hstack([designs[-1], _levels(levels)]))
        rest = [float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum()) for x in designs]
        names = ("rho", "value function", "their interaction")
        return {name: (rest[i] - rest[i + 1]) / rest[0] for i, name in enumerate(names)} | {"rest": rest[-1] / rest[0]}

    @property
    def decision(self) -> str:
        """The decision on the hypothesis."""
        decisions = [each.decision for each in self.contrasts]
        functions = {arm.function for arm in self.arms} - {BASELINE}
        if "different" in decisions:
            return "refuted"
        if decisions and len(decisions) == len(functions) and set(decisions) == {"equivalent"}:
            return "holds"
        return "not decidable at this size"

    def lines(self) -> Iterator[str]:
        for each in self.contrasts:
            yield f"- power, {each.function}: {each.power:.2f} to find equivalence within a factor of {MARGIN}"
        if self.contrasts:
            yield ""
        yield "| value function | target rho | achieved | steps with a clipped gradient | KL, nats | |"
        yield "|---|---|---|---|---|---|"
        for arm in self.arms:
            kl = ", ".join(f"{math.exp(each):.3g}" for each in arm.log_kl)
            off = "" if arm.on_target else f"excluded: {100 * (arm.mean_rho / arm.target - 1):+.0f} %"
            clipped = "–" if arm.clipped is None else f"{100 * arm.clipped:.0f} %"
            yield f"| {arm.function} | {arm.target:g} | {arm.mean_rho:.3g} | {clipped} | {kl} | {off} |"
        if self.kept:
            explained = self.explained().items()
            shares = ", ".join(f"{name} {digits.number(100 * share, 1)} %" for name, share in explained)
            yield ""
            yield f"- variance of log KL, seeds apart: {shares}"
        for each in self.contrasts:
            yield (
                f"- {each.function} / {BASELINE}: KL ratio {each.ratio:.3f} [{each.low:.3f}, {each.high:.3f}]:"
                f" {each.decision}"
            )
        if any(arm.function == BASELINE for arm in self.arms):
            yield f"- hypothesis: {self.decision}"


def read_arms(folder: Path) -> list[Arm]:
    """The arms of a study's folder that have finished runs.

    Raises:
        StudyError: if the folder has no values, or an arm is not a value function at a rho.
    """
    study = load_study(folder / "study.yaml")
    results = Results(study, folder, read_recorded(study, folder))
    arms = []
    for arm in results.study.arms:
        name = re.fullmatch(r"(.+) rho=([\d.]+)", arm.name)
        if name is None:
            raise StudyError(f"{folder}: arm {arm.name!r} is not named as 'FUNCTION rho=NUMBER'")
        seeds = results.seeds(arm)
        values = results.values(METRIC, arm, seeds)
        if values is None:
            continue
        curves = map(tables.balance, results.figures(arm, tables.RHO))
        achieved = [each for each in curves if each is not None]
        if len(achieved) < len(seeds):
            raise StudyError(f"{folder}: a run of arm {arm.name!r} has no {tables.RHO}")
        shares = tables.clipped(results.figures(arm, "trained"))
        clipped = float(np.mean(shares)) if len(shares) == len(seeds) else None
        arms.append(Arm(name[1], float(name[2]), tuple(achieved), Runs(values, seeds), clipped))
    if not arms:
        raise StudyError(f"{folder}: no finished run")
    return arms


def rate_at(rates: Sequence[float], kl: Sequence[float], target: float = 1.0) -> float:
    """The rate with a KL divergence of ``target`` nats, on a line through two neighbours on log scales.

    Args:
        rates: learning rates in ascending order.
        kl: KL divergence at each, nats.
        target: outside the range of ``kl``, the line goes through the two nearest rates.
    """
    x, y = np.log(rates), np.log(kl)
    i = int(np.clip(np.searchsorted(y, math.log(target)), 1, len(y) - 1))
    slope = (x[i] - x[i - 1]) / (y[i] - y[i - 1])
    return math.exp(x[i] + slope * (math.log(target) - y[i]))


def rate_lines(folder: Path) -> Iterator[str]:
    """For each value function and beta, the KL divergence at each rate, and the rate for 1 nat.

    Raises:
        StudyError: if the folder has no values, or an arm is not named after its rate.
    """
    study = load_study(folder / "study.yaml")
    results = Results(study, folder, read_recorded(study, folder))
    found: dict[str, dict[float, float]] = {}
    for arm in results.study.arms:
        name, _, rate = arm.name.partition(" lr=")
        values = results.values(METRIC, arm, results.seeds(arm))
        if not rate:
            raise StudyError(f"{folder}: arm {arm.name!r} is not named as 'FUNCTION beta=NUMBER lr=NUMBER'")
        if values is not None:
            found.setdefault(name, {})[float(rate)] = float(values.mean())
    yield "| value function | KL, nats, at each rate | rate for 1 nat |"
    yield "|---|---|---|"
    for name, by_rate in found.items():
        kl = ", ".join(f"{rate:g}: {by_rate[rate]:.3g}" for rate in sorted(by_rate))
        best = f"{rate_at(sorted(by_rate), [by_rate[r] for r in sorted(by_rate)]):.2e}" if len(by_rate) > 1 else ""
        yield f"| {name} | {kl} | {best} |"


def plot(findings: Mapping[str, Finding], path: Path) -> None:
    """KL against achieved rho, a panel per study and a point per run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter

    figure = Figure(figsize=(4.2 * len(findings), 3.6), layout="constrained")
    functions = list(dict.fromkeys(arm.function for finding in findings.values() for arm in finding.arms))
    axes = figure.subplots(1, len(findings), squeeze=False)[0]
    for axis, (title, finding) in zip(axes, findings.items(), strict=True):
        for number, function in enumerate(functions):
            arms = [arm for arm in finding.arms if arm.function == function]
            x = [rho for arm in arms for rho in arm.achieved]
            y = [math.exp(each) for arm in arms for each in arm.log_kl]
            axis.plot(x, y, "osD^v"[number % 5], color=f"C{number}", label=function, markersize=5, alpha=0.8)
        axis.set(
            xscale="log", yscale="log", xlabel="achieved rho", ylabel="KL on held-out completions, nats", title=title
        )
        axis.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8]))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(color="0.92")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--rates", action="store_true", help="print learning rates instead")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--write", type=Path, help="page whose computed part to replace")
    args = parser.parse_args(words)
    findings, computed = {}, []
    for folder in args.folders:
        try:
            if args.rates:
                print("\n".join(rate_lines(folder)))
                continue
            findings[folder.name] = finding = Finding(read_arms(folder))
        except (OSError, StudyError) as error:
            sys.exit(f"rho_finding: {error}")
        computed += [f"### {folder.name}", "", *finding.lines(), ""]
    if args.rates:
        return
    print("\n".join(computed))
    if args.write:
        replace_computed(args.write, computed[:-1])
    if args.plot:
        plot(findings, args.plot)


if __name__ == "__main__":
    main()
