"""How the laws of the prover draw their examples."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, settings


def law(examples: int) -> Any:
    """As many examples, the same ones on every run; none is made smaller, as a proof of each takes long."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
