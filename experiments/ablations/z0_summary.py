"""Bias, spread, clamp rate and cost of KTO's estimate of z0 by batch size, from the values of z0_bias.py.

    python experiments/ablations/z0_summary.py BATCHES.csv[.gz] [--sizes 4 8 16 32 64] [--figure z0.png]
        [--write docs/findings/z0.md]

A batch of 4k rows is composed of k of a run's blocks, and its estimate is the mean of theirs: each row keeps a
completion of another prompt. ``halos fit`` draws these completions from the whole batch instead of the block, which
leaves the law of each row as it is. Clamp rate and mean of max(0, estimate) are averages over 4000 random draws of k
blocks with replacement, the spread is that of a block divided by sqrt(k). Prints the table, and the decisions that the
header of ablations/z0.yaml announces.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from computed import replace_computed
from numpy.typing import NDArray
from scipy.stats import t as student
from z0_bias import BLOCK, MISMATCHED, SAMPLES, Line, lines_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Random batches for each batch size.
DRAWS = 4000


class Place(NamedTuple):
    """A run at a step."""

    data: str
    arm: str
    step: int
    seed: int


@dataclass(frozen=True)
class Summary:
    """KTO's estimate on batches of one size at one place; nats and CPU seconds.

    Attributes:
        mean: Mean before the clamp, an estimate of E_q[r].
        spread: Standard deviation over batches, before the clamp.
        clamped: Share of batches with a negative estimate.
        used: Mean of max(0, estimate), which training uses.
        surplus: ``used`` - max(0, ``mean``): the upward bias that the clamp adds.
        divergence: KL(policy || reference) of sampled answers; NaN if there are none.
        bias: ``used`` - ``divergence``.
        seconds: Median cost.
    """

    mean: float
    spread: float
    clamped: float
    used: float
    surplus: float
    divergence: float
    bias: float
    seconds: float


def composed(blocks: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Estimates of batches of ``k`` blocks; the blocks themselves for 1.

    Blocks are drawn with replacement: the mean of k different ones of n has a variance that is too small by the factor
    (n - k) / (n - 1).
    """
    if k == 1:
        return blocks
    drawn = np.random.default_rng(0).integers(len(blocks), size=(DRAWS, k))
    means: NDArray[np.float64] = blocks[drawn].mean(axis=1)
    return means


def summary(blocks: NDArray[np.float64], seconds: float, divergence: float, k: int) -> Summary:
    """Of batches of ``k`` blocks, from the estimates of at least two blocks, and the cost of one."""
    z = composed(blocks, k)
    mean, used = float(blocks.mean()), float(z.clip(min=0).mean())
    return Summary(
        mean=mean,
        spread=float(blocks.std(ddof=1)) / math.sqrt(k),
        clamped=float((z < 0).mean()),
        used=used,
        surplus=used - max(0.0, float(z.mean())),
        divergence=divergence,
        bias=used - divergence,
        seconds=k * seconds,
    )


Summaries = Mapping[tuple[Place, int], Summary]


def summaries(lines: Iterable[Line], sizes: Sequence[int]) -> Summaries:
    """The summary of each run, step and batch size for which there are enough blocks.

    Raises:
        ValueError: a size is no multiple of a block's.
    """
    if wrong := [size for size in sizes if size < BLOCK or size % BLOCK]:
        raise ValueError(f"--sizes {wrong[0]}: batches are composed of blocks of {BLOCK} rows")
    nats: dict[tuple[Place, str], list[Line]] = defaultdict(list)
    for line in lines:
        nats[Place(line.data, line.arm, line.step, line.seed), line.estimator].append(line)
    found = {}
    for (place, estimator), mine in nats.items():
        if estimator != MISMATCHED or len(mine) < 2:
            continue
        sampled = [line.nats for line in nats.get((place, SAMPLES), [])]
        divergence = float(np.mean(sampled)) if sampled else math.nan
        blocks, seconds = np.array([line.nats for line in mine]), float(np.median([line.seconds for line in mine]))
        for size in sizes:
            if size <= BLOCK * len(mine):
                found[place, size] = summary(blocks, seconds, divergence, size // BLOCK)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of the 95% t interval, NaN for a single value."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, math.nan
    return mean, float(student.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)


Groups = dict[tuple[str, str, int], dict[int, list[Summary]]]


def over_seeds(found: Summaries) -> Groups:
    """The summaries of all seeds, by data, arm and step, and then by batch size."""
    groups: Groups = defaultdict(lambda: defaultdict(list))
    for (place, size), each in sorted(found.items()):
        groups[place.data, place.arm, place.step][size].append(each)
    return groups


def mean_of(seeds: Sequence[Summary], name: str) -> float:
    return float(np.mean([getattr(each, name) for each in seeds]))


def told(value: float, form: str) -> str:
    """A number, or a dash for NaN."""
    return "–" if math.isnan(value) else format(value, form)


def with_interval(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return told(mean, "+.2f") + ("" if math.isnan(half) else f" ± {half:.2f}")


def markdown(found: Summaries) -> Iterator[str]:
    """A row for each data set, arm and step: means over seeds, by batch size, and the interval of the bias."""
    sizes = sorted({size for _, size in found})
    by_size = " / ".join(map(str, sizes))
    yield (
        "| data | arm | step | seeds | mean before the clamp | KL"
        + "".join(f" | {name}, batches of {by_size}" for name in ("SD", "clamped", "mean used", "bias (95%)"))
        + " | cost of a row, s |"
    )
    yield f"|{'---|' * 11}"
    for (data, arm, step), by in over_seeds(found).items():
        first = next(iter(by.values()))
        cells = [data, arm, str(step), str(len(first))]
        cells += [told(mean_of(first, name), ".2f") for name in ("mean", "divergence")]
        for name, digits in (("spread", 2), ("clamped", 3), ("used", 3)):
            cells.append(" / ".join(f"{mean_of(seeds, name):.{digits}f}" for seeds in by.values()))
        cells.append(" / ".join(with_interval([each.bias for each in seeds]) for seeds in by.values()))
        cells.append(f"{mean_of(first, 'seconds') / next(iter(by)):.2f}")
        yield f"| {' | '.join(cells)} |"


#: Statements of ablations/z0.yaml: name, arm, batch size, quantity and its sign, at step 64.
STATEMENTS = (
    ("primary, H1", "kto", 32, "bias", -1),
    ("H2", "kto", 32, "mean", -1),
    ("H2", "dpo", 32, "mean", -1),
    ("H2", "sft", 32, "mean", 1),
    ("H3", "kto", 4, "bias", -1),
    ("H3", "kto", 64, "bias", -1),
)
STEP, SEEDS, ALMOST_ALL = 64, 3, 0.95


def verdict(values: Sequence[float], sign: int) -> str:
    """Whether all values, one of each seed, have a sign and their 95% interval excludes 0."""
    if len(values) < SEEDS:
        return f"not decided: {len(values)} of {SEEDS} seeds"
    mean, half = interval(values)
    if not abs(mean) > half or len({value > 0 for value in values}) > 1:
        return "not decided"
    return "holds" if mean * sign > 0 else "refuted"


def decisions(found: Summaries) -> Iterator[str]:
    """A line for each pre-registered statement, then one for each data set and step of KTO."""
    groups = over_seeds(found)
    sets = list(dict.fromkeys(data for data, *_ in groups))
    for name, arm, size, quantity, sign in STATEMENTS:
        of_sets = []
        for data in sets:
            values = [getattr(each, quantity) for each in groups.get((data, arm, STEP), {}).get(size, [])]
            by_seed = ", ".join(told(value, "+.2f") for value in values)
            shown = f" ({with_interval(values)}; seeds {by_seed})" if values else ""
            of_sets.append(f"{data}: {verdict(values, sign)}{shown}")
        yield f"- {name}: {arm}, step {STEP}, batches of {size}, {quantity} {'<>'[sign > 0]} 0: {'; '.join(of_sets)}"
    for (data, arm, step), by in groups.items():
        if arm == "kto" and step:
            seeds = len(next(iter(by.values())))
            sizes = [size for size, some in by.items() if min(each.clamped for each in some) >= ALMOST_ALL]
            what = f"with batches of {', '.join(map(str, sizes))}" if sizes else "with no batch size"
            if seeds < SEEDS:
                what = f"not decided: {seeds} of {SEEDS} seeds"
            yield f"- {data}, step {step}: KTO is KTO with z0 = 0: {what}"


def draw(found: Summaries, path: Path) -> None:
    """Above, the mean before the clamp and the divergence along the runs; below, what training uses, by batch size."""
    groups = over_seeds(found)
    sets = list(dict.fromkeys(data for data, *_ in groups))
    arms = list(dict.fromkeys(arm for _, arm, _ in groups))
    last = max(step for *_, step in groups)
    figure, axes = plt.subplots(2, len(sets), figsize=(4.5 * len(sets), 7), layout="constrained", squeeze=False)
    for column, data in enumerate(sets):
        above, below = axes[:, column]
        for number, arm in enumerate(arms):
            colour = f"C{number}"
            along = {key[2]: next(iter(by.values())) for key, by in groups.items() if key[:2] == (data, arm)}
            for name, style, what in (("divergence", "--", "KL"), ("mean", "-", "mean log-ratio")):
                means = [mean_of(seeds, name) for seeds in along.values()]
                above.plot(list(along), means, style, color=colour, label=f"{arm}: {what}")
                for step, seeds in along.items():
                    above.plot([step] * len(seeds), [getattr(each, name) for each in seeds], ".", color=colour)
            if not (by_size := groups.get((data, arm, last))):
                continue
            used = [mean_of(seeds, "used") for seeds in by_size.values()]
            below.plot(list(by_size), used, "o-", color=colour, label=f"{arm}: mean used")
            kl = mean_of(next(iter(by_size.values())), "divergence")
            below.axhline(kl, linestyle="--", color=colour, label=f"{arm}: KL")
            below.set_xscale("log")
            below.set_xticks(list(by_size), [str(size) for size in by_size])
            below.minorticks_off()
        above.axhline(0, color="grey", linewidth=0.8)
        above.set(title=data, xlabel="optimizer step", ylabel="nats, before the clamp")
        below.set(xlabel="rows of a batch", ylabel=f"nats after step {last}")
        for axis in (above, below):
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def read(path: Path) -> list[Line]:
    """The values of a file.

    Raises:
        ValueError: if it is no table of z0_bias.py.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        text = file.read()
    try:
        return lines_of(text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("values", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="rows of a batch")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--write", type=Path, help="page whose computed part to replace")
    args: Any = parser.parse_args(words)
    try:
        found = summaries(read(args.values), args.sizes)
    except (OSError, ValueError) as error:
        sys.exit(f"z0_summary: {error}")
    computed = [*markdown(found), "", *decisions(found)]
    print("\n".join(computed))
    if args.write:
        replace_computed(args.write, computed)
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
