"""Re-analyses Table 2 of the KTO paper: how large are its benchmarks, and which of its differences exceed chance?

    python experiments/paper/table_2.py [--write docs/findings/table_2.md]

Prints every number on that page. Nothing is trained: the input is the published table (Ethayarajh et al. 2024, arXiv
v4) and the numbers of questions in the authors' evaluation script. A figure is a percentage of n questions that one
model answered correctly. Unpaired tests treat two models' answers as independent; paired ones need to know how often
just one of the two is right, which the paper does not say, so they are computed for a range of assumptions.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from scipy import stats

from halos_pl.common.files import write
from halos_pl.study.decisions import corrected

BEGIN, END = "<!-- computed -->", "<!-- end of what is computed -->"
LEVEL, POWER = 0.05, 0.8
#: Questions by benchmark. Of each of BBH's tasks the authors draw some; HumanEval's problems are each sampled often.
TASKS, EACH, SAMPLES = 27, 40, 20
QUESTIONS = {"MMLU": 14042, "GSM8K": 200, "HumanEval": 164, "BBH": TASKS * EACH}
#: Benchmarks whose figures are counts of right answers. HumanEval's are means of several samples.
COUNTED = ("MMLU", "GSM8K", "BBH")
KTO, NO_Z0, ONE_Y = "KTO", "KTO, no z0", "KTO, one y per x"
#: Percent, in the order of ``QUESTIONS``; None: not in our sources. Those of the concave arm are KTO's minus the
#: differences that the paper's text states.
FIGURES: dict[str, tuple[float | None, ...]] = {
    KTO: (58.6, 53.5, 30.9, 52.6),
    ONE_Y: (58.0, 50.0, 30.7, 49.9),
    NO_Z0: (58.5, 49.5, 30.7, 49.0),
    "KTO, concave": (None, 42.5, None, 43.2),
    "KTO, risk-neutral": (None, None, None, 6.1),
    "KTO, no reference model": (57.5, 47.5, 29.5, 51.6),
    "DPO": (58.2, 40.0, 30.1, 44.1),
    "ORPO": (57.1, 36.5, 29.5, 47.5),
    "SFT": (57.2, 39.0, 30.1, 46.3),
}
#: The comparisons of KTO with each other arm on each benchmark, those without a figure included.
FAMILY = (len(FIGURES) - 1) * len(QUESTIONS)
#: Assumed correlations, over questions, of whether two models are right.
CORRELATIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def figure(arm: str, benchmark: str) -> float | None:
    """A figure of the table, in percent."""
    return FIGURES[arm][list(QUESTIONS).index(benchmark)]


def comparisons() -> Iterator[tuple[str, str, float, float]]:
    """Benchmark, other arm, KTO's share and the other's, for all figures that we have."""
    for place, benchmark in enumerate(QUESTIONS):
        mine = FIGURES[KTO][place]
        assert mine is not None
        for arm, row in FIGURES.items():
            other = row[place]
            if arm != KTO and other is not None:
                yield benchmark, arm, mine / 100, other / 100


def printed(correct: int, n: int) -> str:
    """A share in percent as the table prints it."""
    return f"{100 * correct / n:.1f}"


def fits(percent: float, n: int) -> bool:
    """Whether some number of right answers out of n is printed as this figure."""
    near = round(percent * n / 100)
    return any(printed(k, n) == f"{percent:.1f}" for k in (near - 1, near, near + 1))


def share_of_halves(n: int, low: float = 30, high: float = 60) -> float:
    """The share of the possible numbers of right answers, from ``low`` to ``high`` percent, that are printed as a
    multiple of 0.5."""
    shown = [printed(k, n) for k in range(math.ceil(low * n / 100), math.floor(high * n / 100) + 1)]
    return sum(each.endswith((".0", ".5")) for each in shown) / len(shown)


def error(p: float, n: int) -> float:
    """Standard error of a share."""
    return math.sqrt(p * (1 - p) / n)


def unpaired(p: float, q: float, n: int) -> tuple[float, float]:
    """Standard error of p - q for independent answers to n questions each, and the two-sided p of a z test."""
    size = math.hypot(error(p, n), error(q, n))
    return size, float(2 * stats.norm.sf(abs(p - q) / size))


def discordance(p: float, q: float, correlation: float) -> float:
    """The share of questions that just one of two models answers correctly, at a correlation of their answers.

    At the largest correlation that p and q allow, it is |p - q|: one model is right wherever the other is.
    """
    shared = correlation * math.sqrt(p * (1 - p) * q * (1 - q))
    return max(p * (1 - q) + q * (1 - p) - 2 * shared, abs(p - q))


def mcnemar(more: int, discordant: int) -> float:
    """Exact two-sided p of a paired comparison (McNemar).

    Args:
        more: the number of right answers that one model has more than the other.
        discordant: the number of questions that just one of them answers correctly.

    Raises:
        ValueError: if the two numbers are impossible together.
    """
    if discordant < more or (discordant - more) % 2:
        raise ValueError(f"{more} more right answers are impossible with {discordant} questions that one model got")
    return min(1.0, float(2 * stats.binom.cdf((discordant - more) // 2, discordant, 0.5)))


def paired(p: float, q: float, n: int, correlation: float) -> tuple[int, float]:
    """Number of discordant questions at a correlation, and the p of McNemar's test."""
    more = abs(round(p * n) - round(q * n))
    discordant = more + 2 * round((discordance(p, q, correlation) * n - more) / 2)
    return discordant, mcnemar(more, discordant)


def largest_discordance(one: int, other: int, n: int, level: float) -> tuple[int | None, bool]:
    """How much two models may disagree while the difference of their numbers of right answers stays significant.

    Returns:
        The largest number of discordant questions with p below ``level`` (None if even the smallest possible number
        gives no such p), and whether it is the largest possible number.
    """
    more, most = abs(one - other), min(one + other, 2 * n - one - other)
    largest = None
    for discordant in range(more, most + 1, 2):
        if mcnemar(more, discordant) >= level:
            return largest, False
        largest = discordant
    return largest, True


def power(difference: float, n: int, level: float, correlation: float = 0.0, p: float = 0.5) -> float:
    """The probability that a z test finds a true difference of two shares near p."""
    shift = difference / math.sqrt(2 * (1 - correlation) * p * (1 - p) / n)
    bound = stats.norm.isf(level / 2)
    return float(stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift))


def detectable(n: int, level: float, correlation: float = 0.0, p: float = 0.5) -> float:
    """The difference of two shares near p that a z test finds with 80% power."""
    reach = float(stats.norm.isf(level / 2) + stats.norm.ppf(POWER))
    return reach * math.sqrt(2 * (1 - correlation) * p * (1 - p) / n)


def p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}" if p >= 1e-9 else "< 1e-9"


def table(head: str, rows: list[list[str]]) -> Iterator[str]:
    yield f"| {head} |"
    yield f"|{'---|' * (head.count('|') + 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def figures() -> Iterator[str]:
    yield "The figures, in percent, with the standard error that n questions give:"
    yield ""
    rows = []
    for arm in FIGURES:
        cells = [arm]
        for benchmark, n in QUESTIONS.items():
            value = figure(arm, benchmark)
            cells.append("–" if value is None else f"{value:.1f} ± {100 * error(value / 100, n):.1f}")
        rows.append(cells)
    yield from table("arm | " + " | ".join(f"{name}, n = {n}" for name, n in QUESTIONS.items()), rows)


def sizes() -> Iterator[str]:
    known = [value for arm in FIGURES if (value := figure(arm, "GSM8K")) is not None]
    halves = sum((2 * value).is_integer() for value in known)
    smallest = next(n for n in count(1) if all(fits(value, n) for value in known))
    yield f"{halves} of {len(known)} GSM8K figures are multiples of 0.5. {smallest} is the smallest number of questions"
    yield "that can give all of them. How likely is it that all are multiples of 0.5, if there were n questions?"
    yield ""
    rows = []
    for n in (200, 400, 500, 1000, 1319):
        share = share_of_halves(n)
        possible = all(fits(value, n) for value in known)
        rows.append([str(n), f"{share:.2f}", f"{share ** len(known):.1g}" if possible else "impossible"])
    yield from table(f"n | share of figures that are multiples of 0.5 | chance for {len(known)} figures", rows)
    single = sorted({v for arm in FIGURES if (v := figure(arm, "HumanEval")) is not None})
    impossible = ", ".join(str(value) for value in single if not fits(value, QUESTIONS["HumanEval"]))
    yield f"HumanEval: {impossible} are not shares of {QUESTIONS['HumanEval']} problems, so each problem was sampled"
    samples = SAMPLES * QUESTIONS["HumanEval"]
    yield f"more than once; {sum(fits(value, samples) for value in single)} of these {len(single)} are shares of"
    yield f"{samples}, that is, of {SAMPLES} samples each (the standard error over problems is then at most that of the"
    yield f"table). BBH: {TASKS} tasks of {EACH} questions; with {QUESTIONS['BBH']}, as with MMLU's"
    yield f"{QUESTIONS['MMLU']}, any figure with one decimal is possible, so the figures do not show n."
    assert all(fits(tenths / 10, QUESTIONS[name]) for name in ("BBH", "MMLU") for tenths in range(1001))
    yield ""


def unpaired_lines() -> Iterator[str]:
    found = list(comparisons())
    tests = [unpaired(p, q, QUESTIONS[benchmark]) for benchmark, _, p, q in found]
    adjusted = corrected([p for _, p in tests], FAMILY, step_down=True)
    yield f"KTO minus each other arm, in points, as if answers were independent. Holm: over {FAMILY} comparisons, of"
    yield f"which {FAMILY - len(found)} have no figure and count with p = 1, which can only raise the others' p:"
    yield ""
    reach = float(stats.norm.isf(LEVEL / 2))
    rows = []
    for (benchmark, arm, p, q), (size, value), holm in zip(found, tests, adjusted, strict=True):
        gap = 100 * (p - q)
        interval = f"[{gap - 100 * reach * size:+.1f}, {gap + 100 * reach * size:+.1f}]"
        rows.append([benchmark, arm, f"{gap:+.1f}", f"{100 * size:.1f}", interval, p_text(value), p_text(holm)])
    yield from table("benchmark | KTO minus | difference | SE | 95% interval | p | Holm", rows)
    alone, after = (sum(p < LEVEL for p in ps) for ps in ([p for _, p in tests], adjusted))
    names = [f"{arm} ({benchmark})" for (benchmark, arm, _, _), p in zip(found, adjusted, strict=True) if p < LEVEL]
    yield f"Below {LEVEL}: {alone} of {len(found)} before the correction, {after} after it:"
    yield f"{'; '.join(names)}."
    yield ""


def paired_lines() -> Iterator[str]:
    found = [each for each in comparisons() if each[0] in COUNTED]
    yield "The same with paired answers (McNemar's exact test), by the assumed correlation of whether two models are"
    yield f"right, for the {len(found)} comparisons whose figures are counts. The p of KTO against no z0, and how many"
    yield f"comparisons are below {LEVEL} (Holm as above; all others count with p = 1):"
    yield ""
    rows = []
    for correlation in CORRELATIONS:
        tests = [paired(p, q, QUESTIONS[benchmark], correlation) for benchmark, _, p, q in found]
        adjusted = corrected([p for _, p in tests], FAMILY, step_down=True)
        of_z0 = {
            benchmark: (discordant / QUESTIONS[benchmark], p, holm)
            for (benchmark, arm, _, _), (discordant, p), holm in zip(found, tests, adjusted, strict=True)
            if arm == NO_Z0
        }
        cells = [f"{correlation:g}" if correlation < 1 else "largest possible"]
        for benchmark in COUNTED:
            share, p, holm = of_z0[benchmark]
            cells.append(f"{p_text(p)} (Holm {p_text(holm)}; {100 * share:.1f}% discordant)")
        cells += [str(sum(p < LEVEL for _, p in tests)), str(sum(p < LEVEL for p in adjusted))]
        rows.append(cells)
    head = " | ".join(f"no z0, {benchmark}" for benchmark in COUNTED)
    yield from table(f"correlation | {head} | below {LEVEL} | below {LEVEL} after Holm", rows)
    yield "How much two models may disagree before a difference stops being significant: the largest share of questions"
    yield f"that just one of them answers correctly, for p < {LEVEL} and for p < {LEVEL}/{FAMILY}:"
    yield ""
    rows = []
    for benchmark, arm, p, q in found:
        if benchmark == "MMLU":  # rounding alone is worth 7 of its questions
            continue
        n = QUESTIONS[benchmark]
        one, other = round(p * n), round(q * n)
        cells = []
        for level in (LEVEL, LEVEL / FAMILY):
            largest, whatever = largest_discordance(one, other, n, level)
            cells.append("any" if whatever else "none" if largest is None else f"{100 * largest / n:.1f}%")
        rows.append([benchmark, arm, str(one - other), f"{100 * discordance(p, q, 0):.1f}%", *cells])
    head = f"p < {LEVEL} | p < {LEVEL}/{FAMILY}"
    yield from table(f"benchmark | KTO minus | right answers more | discordant if independent | {head}", rows)


def power_lines() -> Iterator[str]:
    gap = (figure(KTO, "GSM8K") or 0) - (figure(NO_Z0, "GSM8K") or 0)
    yield f"The difference, in points, that a comparison of two shares near 50% finds with {100 * POWER:.0f}% power,"
    yield f"and the power for {gap:.1f} points, the difference that z0 makes on GSM8K:"
    yield ""
    rows = []
    names = {
        164: "HumanEval",
        200: "GSM8K here",
        1080: "BBH here",
        1319: "all of GSM8K",
        6511: "all of BBH",
        14042: "MMLU",
    }
    for n, name in names.items():
        cells = [f"{100 * detectable(n, level, r):.1f}" for level, r in ((LEVEL, 0), (LEVEL / FAMILY, 0), (LEVEL, 0.5))]
        cells.append(f"{power(gap / 100, n, LEVEL):.2f}")
        rows.append([f"{n} ({name})", *cells])
    head = f"5% level | level {LEVEL}/{FAMILY} | 5% level, correlation 0.5 | power for {gap:.1f} points"
    yield from table(f"questions | {head}", rows)
    needed = [next(n for n in count(100) if power(gap / 100, n, LEVEL, r) >= POWER) for r in (0.0, 0.5)]
    yield f"{gap:.1f} points need {needed[0]} questions ({needed[1]} at a correlation of 0.5)."


def lines() -> Iterator[str]:
    """The computed part of the page."""
    for part in (figures(), sizes(), unpaired_lines(), paired_lines(), power_lines()):
        yield from part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help=f"page in which the text between {BEGIN} and {END} is replaced")
    args = parser.parse_args()
    computed = list(lines())
    print("\n".join(computed))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        write(args.write, head + "\n".join([BEGIN, "", *computed, ""]) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
