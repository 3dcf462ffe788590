"""The suite as pytest items: one for each target and clause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from halos_pl.conformance.check import check_halo, clauses
from halos_pl.conformance.report import Definition, Report
from halos_pl.conformance.target import as_target

if TYPE_CHECKING:
    import pytest


def parametrize_with_checks(
    targets: Sequence[object],
    *,
    definition: Definition = "icml",
    expected_failures: Mapping[str, str] | None = None,
    max_examples: int = 60,
) -> pytest.MarkDecorator:
    """A decorator that runs a test function once for each clause of each target.

    >>> @parametrize_with_checks([MyValueFunction(), MyReward()])             # doctest: +SKIP
    ... def test_plugins(check):
    ...     check()

    The function receives ``check``, which raises AssertionError with the witness if the clause fails. A clause
    that is expected to fail, or that is only reported, is marked xfail when it does. Each target is checked once.

    Args:
        targets: as for ``check_halo``.
        definition: as for ``check_halo``.
        expected_failures: as for ``check_halo``, for all targets.
        max_examples: as for ``check_halo``.
    """
    import pytest

    items = []
    expected = expected_failures or {}
    objects = [as_target(target) for target in targets]
    names = [[clause.name for clause in clauses(target, definition)] for target in objects]
    unknown = set(expected).difference(*names)
    if unknown:
        raise ValueError(f"expected_failures: no target has a clause {min(unknown)!r}")
    kinds = [type(target).__name__ for target in objects]
    for number, (target, of_target, kind) in enumerate(zip(objects, names, kinds, strict=True)):

        @cache
        def report(target: Any = target, of_target: Sequence[str] = tuple(of_target)) -> Report:
            return check_halo(
                target,
                definition=definition,
                expected_failures={clause: why for clause, why in expected.items() if clause in of_target},
                on_fail="report",
                max_examples=max_examples,
            )

        name = f"{kind}{number}" if kinds.count(kind) > 1 else kind
        items += [pytest.param(_item(report, clause), id=f"{name}-{clause}") for clause in of_target]
    return pytest.mark.parametrize("check", items)


def _item(report: Callable[[], Report], name: str) -> Callable[[], None]:
    def check() -> None:
        import pytest

        clause = next(c for c in report().clauses if c.clause == name)
        if clause.status == "expected" or (clause.status == "failed" and not clause.required):
            pytest.xfail(f"{clause.reason}: {clause.witness}")
        assert clause.status == "passed", f"{report().target}, {name}: {clause.witness}"

    return check
