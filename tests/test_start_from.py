"""A fit that starts from another run's checkpoint continues its weights and, if asked, its optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import fit, pair_data, refused

from halos_pl.cli.main import main

CONSTANT = ["--model.lr_schedule=constant_with_warmup", "--model.warmup_ratio=0", "--data.batch_size=6"]


def _weights(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def _start(checkpoint: Path, **arguments: Any) -> str:
    callback = {"class_path": "halos_pl.training.start_from.StartFrom"}
    return f"--trainer.callbacks+={json.dumps(callback | {'init_args': {'checkpoint': str(checkpoint), **arguments}})}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_data(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "humanline_dpo"])
def test_two_fits_train_like_one_if_the_optimizer_is_carried(
    tiny_folder: Path, data: Path, tmp_path: Path, objective: str, dtype: str
) -> None:
    """Each step sees all pairs, so only the order of the rows differs: the weights agree within rounding.

    The reference is the model before the first fit, or continues to follow the policy.
    """
    options = [*CONSTANT, "--model.policy.lora={r: 2}", f"--model.policy.dtype={dtype}"]

    def run(name: str, epochs: int, *more: str) -> dict[str, Any]:
        main(fit(tiny_folder, objective, data, tmp_path / name, *options, f"--trainer.max_epochs={epochs}", *more))
        return _weights(tmp_path / name)

    one = run("one", 4)
    run("first", 2)
    checkpoint = tmp_path / "first/checkpoints/last.ckpt"
    carried = run("carried", 2, _start(checkpoint))
    fresh = run("fresh", 2, _start(checkpoint, optimizer=False))

    def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
        return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)

    assert distance(one, carried) < distance(one, fresh) / 20
    assert distance(one, carried) < 1e-5


def test_the_schedule_is_that_of_the_new_fit(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """The first schedule ends near 0. SGD has no other state, so carrying it must not change the second fit."""
    words = ["--data.batch_size=2", "--model.warmup_ratio=0", "--model.optimizer=torch.optim.SGD"]
    words += ["--model.optimizer.init_args.lr=0.1", "--model.policy.lora={r: 2}"]
    main(fit(tiny_folder, "dpo", data, tmp_path / "first", *words))
    checkpoint = tmp_path / "first/checkpoints/last.ckpt"
    for name, carried in (("carried", True), ("fresh", False)):
        main(fit(tiny_folder, "dpo", data, tmp_path / name, *words, _start(checkpoint, optimizer=carried)))
    carried, fresh = _weights(tmp_path / "carried"), _weights(tmp_path / "fresh")
    assert all(torch.equal(carried[name], fresh[name]) for name in fresh)
    assert any(not torch.equal(fresh[name], value) for name, value in _weights(tmp_path / "first").items())


def test_a_checkpoint_of_another_policy_is_refused(
    tiny_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(fit(tiny_folder, "dpo", data, tmp_path / "one", "--model.policy.lora={r: 2}"))
    words = fit(tiny_folder, "dpo", data, tmp_path / "two", "--model.policy.lora={r: 4}")
    start = _start(tmp_path / "one/checkpoints/last.ckpt")
    assert "lora_A" in refused(capfd, [*words, start])
    assert "no.ckpt" in refused(capfd, [*words, _start(tmp_path / "no.ckpt")])
