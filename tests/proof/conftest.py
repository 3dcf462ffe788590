"""Fixtures of the tests of the prover and its checker."""

from __future__ import annotations

import pytest

from halos_pl.proof import agreement


@pytest.fixture
def fewer_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are compared with their certificates at 600 outcomes, not at 10,000."""
    monkeypatch.setattr(agreement, "POINTS", 600)
    monkeypatch.setattr(agreement, "FEWER", 60)
