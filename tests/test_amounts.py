"""What a run says it was trained on is what its steps have seen, also after a resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit

from halos_pl.batch import TokenBatch
from halos_pl.cli.main import main
from halos_pl.labels import Labels
from halos_pl.training import amounts
from halos_pl.training.amounts import Amounts

CPU = torch.device("cpu")


def batch() -> TokenBatch:
    """Three rows, of which the last is mismatched; two share a prompt."""
    ids = [torch.zeros(n, dtype=torch.long) for n in (7, 4, 3, 5, 9)]
    labels = Labels(desirable=torch.tensor([True, False, True]), mismatched=torch.tensor([False, False, True]))
    return TokenBatch(
        prompts=ids[:2], completions=ids[2:], prompt=torch.tensor([0, 0, 1]), labels=labels, row_ids=["a", "b", "c"]
    )


def test_rows_count_whole_and_mismatched_ones_do_not() -> None:
    counts = Amounts()
    counts.begin(resumed=False)
    for _ in range(2):
        counts.add(batch())
    assert counts.of_all(CPU) == {"rows": 4, "tokens": 2 * (7 + 3 + 7 + 5)}


def test_what_a_checkpoint_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of one that an older version wrote, and of one of several ranks, which has the counts of the first alone."""
    older = Amounts()
    older.begin(resumed=True)
    older.add(batch())
    assert older.of_all(CPU) is None
    one = Amounts()
    one.add(batch())
    again = Amounts()
    again.load(one.state())
    again.begin(resumed=True)
    again.add(batch())
    assert again.of_all(CPU) == {"rows": 4, "tokens": 44}
    monkeypatch.setattr(amounts, "world_size", lambda: 2)
    several = Amounts()
    several.load(one.state())
    assert one.state()["known"] is False
    several.load(one.state())
    assert several.of_all(CPU) is None
    # What is unknown stays unknown.
    monkeypatch.undo()
    last = Amounts()
    last.load(several.state())
    last.begin(resumed=True)
    assert last.of_all(CPU) is None


def test_a_run_that_was_resumed_counts_all_its_steps(tiny_folder: Path, tmp_path: Path) -> None:
    data = binary_data(tmp_path / "data.jsonl", 24)

    def trained(run: str, *steps: int) -> dict[str, Any]:
        for number, last in enumerate(steps):
            resume = ["--ckpt_path=last"] if number else []
            main(fit(tiny_folder, "kto", data, tmp_path / run, f"--trainer.max_steps={last}", *resume))
        found: dict[str, Any] = json.loads((tmp_path / run / "summary.json").read_text())
        return found

    whole, resumed = trained("whole", 4), trained("resumed", 2, 4)
    assert whole["trained"] == resumed["trained"]
    assert whole["trained"]["rows"] == 16  # four steps of four rows, however z0 is estimated
    assert whole["trained"]["tokens"] > 16 * 2
