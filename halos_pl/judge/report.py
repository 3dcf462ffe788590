"""Reports of a judge's verdicts: JSON, and lines for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from halos_pl.common.messages import counted
from halos_pl.judge.estimates import Estimate, mean_of
from halos_pl.judge.panel import Grades
from halos_pl.judge.win_rates import JudgedPair, WinRate, follows_position, position_bias

#: Causes of a missing grade.
LOST = {"abstentions": "replies that name none, or several", "failures": "failed requests"}


def figures(report: Any) -> dict[str, Any]:
    """The fields of a report for JSON; NaN becomes null, and values by example are left out."""
    return {name: _plain(value) for name, value in asdict(report).items() if name != "preferences"}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def win_rate_lines(report: WinRate, name: str) -> list[str]:
    """A win rate, the pairs left out, and the judge's biases, one line each."""
    rate = report.rate
    if not rate.n:
        lines = [f"{name}: win rate unknown, as no pair has a verdict in both orders"]
    else:
        counts = f"{counted(report.wins, 'win')}, {counted(report.ties, 'tie')}, {report.losses} lost"
        counts += f"; {report.identical} with equal answers" if report.identical else ""
        number = report.wins + report.ties + report.losses
        n = f"{rate.n}" if number == rate.n else f"{counted(rate.n, 'example')} of {counted(number, 'pair')}"
        error = "unknown" if math.isnan(rate.error) else f"{rate.error:.3f}"
        lines = [f"{name}: win rate {rate.text()}, standard error {error} (n = {n}: {counts})"]
    return lines + judge_lines(report, name)


def judge_lines(report: WinRate, name: str) -> list[str]:
    """The pairs left out, and the judge's biases, one line each."""
    lines = []
    if report.left_out:
        causes = [f"{counted(report.abstentions, 'reply').replace('replys', 'replies')} named neither answer, or both"]
        causes += [f"{counted(report.failures, 'request')} failed"] * bool(report.failures)
        low, high = report.bounds
        lines.append(
            f"{name}: {counted(report.left_out, 'pair')} left out ({', '.join(causes)}); with them, the win rate"
            f" would be between {low:.3f} and {high:.3f}"
        )
    if report.position_bias.n:
        parts = [_position(report.position_bias, report.follows_position)]
        if report.consistency.n:
            parts.append(f"same winner when asked again {report.consistency.text(2)}")
        lines.append(f"{name}: judge: {'; '.join(parts)}")
    return lines


def _position(bias: Estimate, follows: Estimate) -> str:
    won = f"; {follows.text(2)} of pairs won by the same position in both orders" if follows.n else ""
    return f"position bias {_signed(bias)}{won}"


def position_line(pairs: Sequence[JudgedPair]) -> str:
    """The judge's preference for a position, over pairs that it has compared in both orders; empty without any."""
    bias = position_bias(pairs)
    return (
        f"{counted(bias.n, 'prompt')} compared in both orders: {_position(bias, follows_position(pairs))}"
        if bias.n
        else ""
    )


def _signed(e: Estimate) -> str:
    return f"{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}]"


def grade_figures(grades: Grades, examples: Sequence[str], scale: tuple[float, float]) -> dict[str, Any]:
    """The mean grade by example, the judge's consistency, and counts of replies without a grade."""
    by_example = grades_by_example(grades, examples)
    equal = [float(grades.grades[i] == again) for i, again in grades.again.items() if again is not None]
    failures = len(grades.errors)
    return {
        "grade": _plain(asdict(mean_of(list(by_example.values()), *scale))),
        "consistency": _plain(asdict(mean_of(equal))),
        "abstentions": sum(record["grade"] is None for record in grades.records if not record["repeat"]),
        "failures": failures,
    }


def grade_line(record: Mapping[str, Any], name: str) -> str:
    """A line on the figures of :func:`grade_figures`."""
    mean, again = record["grade"], record["consistency"]
    if not mean["n"]:
        line = f"{name}: grade unknown, as no reply has one"
    else:
        line = f"{name}: grade {mean['value']:.2f} [{mean['low']:.2f}, {mean['high']:.2f}] (n = {mean['n']})"
    lost = [f"{record[key]} {what}" for key, what in LOST.items() if record[key]]
    line += f"; without a grade: {' and '.join(lost)}" if lost else ""
    return f"{line}; same grade when asked again {again['value']:.2f}" if again["n"] else line


def grades_by_example(grades: Grades, examples: Sequence[str]) -> dict[str, float]:
    """The mean grade of each example that has one."""
    values: dict[str, list[float]] = {}
    for example, grade in zip(examples, grades.grades, strict=True):
        if grade is not None:
            values.setdefault(example, []).append(grade)
    return {example: sum(each) / len(each) for example, each in values.items()}
