"""Callbacks of Lightning's that a fit can use do what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks.timer import Interval
from run_halos import binary_data, fit, metrics
from safetensors.torch import load_file

import halos_pl.common.yaml_files  # noqa: F401
from halos_pl.cli.main import main


def test_an_enumeration_of_texts_is_written_as_a_text() -> None:
    """As the default of Timer's ``interval``, which ended a fit before it began."""
    assert yaml.safe_load(yaml.safe_dump({"interval": Interval.step})) == {"interval": "step"}


@pytest.mark.slow
def test_a_timer_ends_a_fit(tiny_folder: Path, tmp_path: Path) -> None:
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl"), tmp_path / "run", "--trainer.max_epochs=1000")
    main([*words, "--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:00:01"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] < 3000


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_an_average_of_the_weights_is_what_a_run_ends_with(lora: bool, tiny_folder: Path, tmp_path: Path) -> None:
    """With a decay of 1 it stays at the start, whatever is trained."""
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl"), tmp_path / "run")
    options = ["--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=1.0", "--trainer.max_epochs=2"]
    main([*words, *options, *(["--model.policy.lora={r: 4}"] if lora else [])])
    assert abs(float(metrics(tmp_path / "run")[-1]["rewards/margins"])) > 1e-4  # what was trained has moved
    main(["export", str(tmp_path / "run"), str(tmp_path / "model")])
    start, end = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "model"))
    assert all(torch.allclose(value, end[name], atol=1e-6) for name, value in start.items())
