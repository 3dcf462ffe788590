"""All ranks of a fit end when one is told to stop, with a checkpoint of all of them (Lightning's handler hangs)."""

from __future__ import annotations

import pytest
from run_halos import binary_data, fit, metrics, run_ranks
from stopping import saved, signal_at

OPTIONS = ("--trainer.max_epochs=2", "--data.seed=47")


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        pytest.param(1, "on_before_zero_grad", marks=pytest.mark.slow),
        pytest.param(0, "on_before_zero_grad", marks=pytest.mark.slow),
        pytest.param(None, "on_before_zero_grad", marks=pytest.mark.slow),
        pytest.param(1, "on_validation_batch_start", marks=pytest.mark.slow),
        pytest.param(1, "on_train_epoch_start", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_end_when_one_is_told_to(tiny_folder, tmp_path, rank, moment):
    data = binary_data(tmp_path / "data.jsonl", 15)
    validation = (f"--data.validation={data}",) if "validation" in moment else ()
    words = fit(tiny_folder, "bco", data, tmp_path / "parts", *OPTIONS, *validation)
    step = 2 if "zero_grad" in moment else 4
    send = signal_at("SIGTERM", moment, step, **({} if rank is None else {"rank": rank}))
    ended = run_ranks([*words, *send], tmp_path)
    assert [each.status for each in ended] == [143, 143], ended
    assert not any("Traceback" in each for each in ended), ended
    assert saved(tmp_path / "parts")["global_step"] == max(3, step)
    assert [e.status for e in run_ranks([*words, "--ckpt_path=last"], tmp_path)] == [0, 0]
    assert [row["step"] for row in metrics(tmp_path / "parts") if "loss" in row] == list("01234567")
