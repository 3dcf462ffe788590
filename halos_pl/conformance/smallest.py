"""The smallest step that shows a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from random import Random

from halos_pl.batch import Needs
from halos_pl.conformance.steps import CHOICES, Classes, Step, fitted_to, large_steps
from halos_pl.conformance.witness import Raised


@lru_cache(maxsize=8)
def _drawn(count: int) -> tuple[Step, ...]:
    """Always the same steps; drawing them with Hypothesis would take longer than most clauses do."""
    draw = Random(0)
    # First a single row of either label, alone and with a mismatched row, with a score near -1,000 or 1,000: random
    # draws may not reach these sizes.
    labels: tuple[Classes, ...] = ("desirable", "undesirable")
    single = [
        Step(seed=1 + (k + n) % 2, classes=label, mismatched=n, scores="extreme")
        for k, label in enumerate(labels)
        for n in (0, 1)
    ]
    drawn = [step for _ in range(0, count, _BLOCK) for step in _block(draw)]
    return (*single, *drawn)[:count]


# A block of this many steps has every size and kind equally often (a Latin hypercube), however few are drawn.
_BLOCK = 12


def _block(draw: Random) -> list[Step]:
    columns = {}
    for name, values in CHOICES.items():
        rounds, rest = divmod(_BLOCK, len(values))
        columns[name] = draw.sample([*(list(values) * rounds if rounds else ()), *draw.sample(values, rest)], _BLOCK)
    return [Step(**{name: column[i] for name, column in columns.items()}) for i in range(_BLOCK)]


def smallest(
    fault: Callable[[Step], str | None], needs: Needs, *, mismatched: bool | None = None, examples: int = 60
) -> str | None:
    """The witness of the smallest faulty step; None if ``fault`` finds none.

    The steps are drawn once for all clauses, and a few fixed large ones are added; Hypothesis runs only if a drawn
    step shows a fault, to shrink it.
    """

    def witness_at(step: Step) -> str | None:
        try:
            return fault(step)
        except (Exception, SystemExit) as error:
            return Raised.by(error)

    fitted = (fitted_to(step, needs, mismatched) for step in _drawn(examples))
    first = next(((step, witness) for step in fitted if (witness := witness_at(step)) is not None), None)
    if first is None:
        tried = ((step, witness_at(step)) for step in large_steps(needs, mismatched=mismatched))
        wrong = next(((step, witness) for step, witness in tried if witness is not None), None)
        return wrong and _halved(witness_at, *wrong)
    try:
        from halos_pl.conformance.strategies import shrunk
    except ModuleNotFoundError:  # Hypothesis is not installed: the same verdict, with a larger witness
        return _halved(witness_at, *first)
    return shrunk(witness_at, first[1], needs, mismatched=mismatched, examples=examples)


def _halved(witness_at: Callable[[Step], str | None], step: Step, witness: str) -> str:
    """The witness after halving the step in some way as often as possible."""
    for name in ("units", "tokens", "mismatched"):
        while (size := getattr(step, name)) > 1:
            smaller = replace(step, **{name: size // 2})
            other = witness_at(smaller)
            if other is None:
                break
            step, witness = smaller, other
    return witness
