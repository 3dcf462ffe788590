"""Loss, z0, gradient and weights of every objective, and the tokens of every schema, are those that were kept.

Other tests hold an objective to its formula. This one holds a redesign to what was computed before it: names and tests
change together, these numbers do not. On the machine that wrote them they are equal bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden_fits import CELLS, FILES, SCHEMAS, WAYS, machine, step, tokens

from halos_pl.data.schemas import SCHEMAS as KNOWN

GOLDEN: dict[str, dict[str, Any]] = {kind: json.loads(path.read_text("utf-8")) for kind, path in FILES.items()}
STEPS = {name: value for name, value in GOLDEN["steps"].items() if name != "machine"}
SAME_MACHINE = GOLDEN["steps"]["machine"] == machine()
# Of each way on one rank one objective; the whole grid is slow.
SAMPLE = {
    f"{name}/{way}" for name, way in zip(("kto", "dpo", "bco", "grpo"), (w for w in WAYS if w != "ranks"), strict=True)
}


def test_golden_values_are_those_of_objectives_and_of_every_schema() -> None:
    """Objectives that were added since the file was written have none until it is written anew."""
    assert set(STEPS) <= set(CELLS)
    assert set(GOLDEN["tokens"]) == set(SCHEMAS) == set(KNOWN)


@pytest.mark.parametrize("cell", [pytest.param(c, marks=[] if c in SAMPLE else pytest.mark.slow) for c in STEPS])
def test_three_steps(cell: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    wanted = STEPS[cell]
    if wanted is None:  # a reference that cannot be stored, say
        with pytest.raises(SystemExit):
            step(cell, tiny_folder, tmp_path)
        return
    found = step(cell, tiny_folder, tmp_path)
    if SAME_MACHINE:
        assert found == wanted
    assert found["rows"] == wanted["rows"]
    for name in ("loss", "gradient", "moved"):
        assert found[name] == pytest.approx(wanted[name], rel=5e-6, abs=5e-6), name
    if None in wanted["z0"]:  # nothing has a reference point
        assert found["z0"] == wanted["z0"]
    else:
        assert found["z0"] == pytest.approx(wanted["z0"], rel=5e-6, abs=5e-6)


def test_token_ids(tiny_folder: Path, tmp_path: Path) -> None:
    found = tokens(tiny_folder, tmp_path)
    for schema, rows in GOLDEN["tokens"].items():
        assert rows
        assert found[schema] == rows, schema
