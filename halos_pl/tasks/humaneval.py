"""HumanEval for lm-eval: programs from completions, and pass@1 by running them in the sandbox."""

from __future__ import annotations

from typing import Any

from halos_pl.tasks.sandbox import passes


def programs(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The prompt of each problem followed by each completion."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def programs_in_block(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """As :func:`programs`, with each completion cut at the end of its code block."""
    return programs([[text.partition("```")[0] for text in texts] for texts in resps], docs)


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    """Share of a problem's programs that pass its tests.

    Args:
        references: The tests, one item.
        predictions: The programs, one list.
    """
    (tests,), (candidates,) = references, predictions
    return sum(passes(f"{program}\n{tests}") for program in candidates) / len(candidates)


pass_at_1.__name__ = "pass@1"  # lm-eval's name of the metric
