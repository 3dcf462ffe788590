"""The records of ``halos predict``."""

from __future__ import annotations

from typing import Any

from halos_pl.training.parts import Part


def records_of(part: Part) -> list[dict[str, Any]]:
    """One record per row of a part: name, label, tokens, log-probs, r, z0 and u (nats), and value."""
    rows, outcomes = part.rows, part.result.outcomes
    columns: dict[str, list[Any]] = {
        "row": part.row_ids,
        "desirable": rows.labels.desirable.tolist(),
        "tokens": rows.mask.sum(dim=1).tolist(),
    }
    if rows.has_logps:
        columns["policy_logp"] = rows.policy_logps.sum(dim=1).tolist()
    if rows.reference_logps is not None:
        columns["reference_logp"] = rows.reference_logps.sum(dim=1).tolist()
    if outcomes is not None:
        columns |= {"r": outcomes.reward.tolist(), "z0": outcomes.reference_point.tolist()}
        columns |= {"u": outcomes.outcome.tolist(), "value": outcomes.value.tolist()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
