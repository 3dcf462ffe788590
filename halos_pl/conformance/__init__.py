"""The definition of human-aware losses as a test suite: is this loss, or this part of a loss, a HALO?

>>> from halos_pl.conformance import check_halo
>>> print(check_halo(Logistic(), on_fail="report"))                          # doctest: +SKIP

The code under check is executed. See :func:`check_halo`, and ``halos check --help`` for the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halos_pl.conformance.check import check_halo
from halos_pl.conformance.pytest_entry import parametrize_with_checks
from halos_pl.conformance.report import CheckFailed, ClauseResult, Report

if TYPE_CHECKING:
    from halos_pl.conformance import strategies

__all__ = ["CheckFailed", "ClauseResult", "Report", "check_halo", "parametrize_with_checks", "strategies"]


def __getattr__(name: str) -> Any:
    if name == "strategies":  # needs Hypothesis, which no other part of the package loads
        return import_module("halos_pl.conformance.strategies")
    raise AttributeError(f"halos_pl.conformance has no {name!r}; it has {', '.join(__all__)}")
