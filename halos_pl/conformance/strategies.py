"""Hypothesis strategies for tests of plug-ins: outcomes, rows of a step, arguments of a class.

>>> @given(strategies.rows(Needs(pairs=True)))                             # doctest: +SKIP
... def test_my_reward(rows): ...
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.conformance.steps import CHOICES, Step, fitted_to
from value_functions import ValueFunction


def outcomes(largest: float = 1e4) -> st.SearchStrategy[float]:
    """Outcomes u in nats: 0, tiny, ordinary and huge ones of either sign, with |u| at most ``largest``."""
    size = st.one_of(
        st.sampled_from([0.0, 1e-12, 1e-6, 1.0, 100.0, largest]),
        st.floats(0.0, min(10.0, largest)),
        st.floats(0.0, largest),
        st.floats(-38, math.log10(largest)).map(lambda e: 10.0**e),
    )
    return st.builds(lambda sign, u: sign * min(u, largest), st.sampled_from([1, -1]), size)


def steps(needs: Needs | None = None, *, mismatched: bool | None = None) -> st.SearchStrategy[Step]:
    """Steps of rows, drawn for the clauses of the suite.

    Args:
        needs: needs that the rows must meet.
        mismatched: whether there may be mismatched rows that ``needs`` does not name; default: unless it names pairs.
    """
    return _any_step.map(lambda step: fitted_to(step, needs or Needs(), mismatched))


_any_step = st.builds(Step, **{name: st.sampled_from(values) for name, values in CHOICES.items()})


def rows(needs: Needs | None = None, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[LogProbBatch]:
    """Rows of a step: with padding, and with pairs, mismatched rows and whole prompts according to ``needs``."""
    return steps(needs).map(lambda step: step.rows(dtype))


def _of_annotation(annotation: Any, default: Any) -> st.SearchStrategy[Any]:
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return st.sampled_from(list(options))
    if annotation is bool:
        return st.booleans()
    if annotation in (float, int) or float in options or int in options:
        if isinstance(default, (int, float)) and not isinstance(default, bool) and default:
            # Multiples of the default keep its sign and stay in most ranges; at most 1 where it is.
            factors = st.sampled_from([1.0, 0.1, 0.5, 0.9, *([] if 0 < default < 1 and default > 0.5 else [2.0, 5.0])])
            scaled = factors.map(lambda f: default * f)
            return scaled.map(round) if annotation is int else scaled
        return st.sampled_from([0.5, 0.1, 1.0]) if annotation is not int else st.integers(1, 3)
    if isinstance(annotation, type) and issubclass(annotation, ValueFunction):
        from value_functions import Logistic

        return st.builds(Logistic, beta=st.sampled_from([0.1, 1.0]))
    return st.just(default)


def arguments(cls: type) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments for the constructor of ``cls``, drawn according to its annotations and defaults.

    Arguments that the constructor refuses with a ``ValueError`` are not drawn.
    """
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    each = {}
    for p in inspect.signature(cls).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        default = None if p.default is p.empty else p.default
        drawn = _of_annotation(hints.get(p.name, Any), default)
        each[p.name] = drawn if p.default is p.empty else st.one_of(st.just(default), drawn)

    def accepted(values: dict[str, Any]) -> bool:
        try:
            cls(**values)
        except ValueError:
            return False
        return True

    return st.fixed_dictionaries(each).filter(accepted)


def _settings(examples: int, *phases: Phase) -> settings:
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


class _FoundError(Exception):
    pass


def shrunk(
    fault: Callable[[Step], str | None], first: str, needs: Needs, *, mismatched: bool | None = None, examples: int = 60
) -> str:
    """The witness of the smallest faulty step that Hypothesis finds; ``first`` if it finds none.

    Args:
        fault: returns the witness of a faulty step, else None; never raises.
        first: the witness so far.
        needs, mismatched: as for :func:`steps`.
        examples: minimum number of steps to draw.
    """
    best: tuple[float, str] = (math.inf, first)
    tries, most = 0, min(150, 3 * examples)  # a count, not a time limit, so that the witness is the same on any machine

    @_settings(max(examples, 50), Phase.generate, Phase.shrink)
    @given(steps(needs, mismatched=mismatched))
    def run(step: Step) -> None:
        nonlocal tries, best
        tries += 1
        witness = fault(step) if tries <= most else None
        if witness is not None:
            size = (step.units * 2 + step.mismatched) * 10 + step.tokens + (step.scale != 1)
            best = min(best, (size, witness), key=lambda b: b[0])
            raise _FoundError

    with suppress(Exception):  # the fault itself, or the last try while it is shrunk
        run()
    return best[1]
