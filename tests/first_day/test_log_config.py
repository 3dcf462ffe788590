"""Loggers get the whole resolved config, never NaN, and a missing package is one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugins.own_log import Recorder
from run_halos import binary_data, fit

from halos_pl.cli.main import main
from halos_pl.training import log_config


def test_any_logger_gets_the_resolved_config_and_numbers_only(tiny_folder: Path, tmp_path: Path) -> None:
    Recorder.made.clear()
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 12), tmp_path / "run", "--data.batch_size=1")
    csv = ["--trainer.logger+=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/own"]
    main([*words, "--data.shuffle=false", "--trainer.logger+=plugins.own_log.Recorder", *csv])
    config = Recorder.made[-1].config  # each step has one class of rows only
    assert config["model"]["value_function"]["init_args"]["beta"] == 0.1
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-3
    assert config["data"]["batch_size"] == 1
    assert config["seed_everything"] == 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"] == resolved["model"]
    (kept,) = (tmp_path / "own").rglob("hparams.yaml")
    assert yaml.safe_load(kept.read_text())["model"] == resolved["model"]
    lines = Recorder.made[-1].lines
    assert len(lines) == 12
    assert all(math.isfinite(value) for _, line in lines for value in line.values())
    assert not (tmp_path / "run" / "hparams.yaml").exists()  # config.yaml is that


def test_a_logger_in_the_folder_of_an_earlier_run_writes_to_the_new_one(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 8), run, "--trainer.max_steps=1")
    words += ["--trainer.logger+=plugins.own_log.Opened", f"--trainer.logger.folder={run}/own"]
    for number in range(2):
        main(words)
        assert [path.name for path in (run / "own").iterdir()] == ["opened"], number
    assert (tmp_path / "run.1" / "own" / "opened").read_text() == (run / "own" / "opened").read_text() == "written"


class _Board:
    """Takes the place of TensorBoardLogger where tensorboard is not installed."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, Any], dict[str, float] | None, int | None]] = []

    def log_hyperparams(self, params: dict[str, Any], metrics: Any = None, step: int | None = None) -> None:
        self.calls.append((params, metrics, step))


def test_tensorboard_gets_a_flat_config_and_the_last_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch

    monkeypatch.setattr(log_config, "TensorBoardLogger", _Board)
    board = _Board()
    value_function = {"class_path": "Logistic", "init_args": {"beta": 0.1}}
    config = {"model": {"value_function": value_function}, "data": {"train": ["a"]}}
    figures = {"loss": torch.tensor(0.5), "val/kl": torch.tensor(math.nan)}
    trainer: Any = SimpleNamespace(loggers=[board], callback_metrics=figures, global_step=3)
    callback = log_config.LogConfig(config)
    module: Any = None
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    callback.on_train_end(trainer, module)
    flat = {"model.value_function": "Logistic", "model.value_function.beta": 0.1, "data.train": ["a"]}
    assert board.calls == [(flat, {}, None), (flat, {"loss": 0.5}, 2)]


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "lightning.pytorch.loggers.WandbLogger"])
def test_a_package_that_is_missing_is_named_in_a_line(
    tiny_folder: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    monkeypatch.setattr(log_config, "find_spec", lambda name: None)
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl"), tmp_path / "run")
    options = [f"--trainer.logger+={logger}", f"--trainer.logger.save_dir={tmp_path}/own"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, *options])
    assert stopped.value.code in (1, 2)
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert any("pip install" in line and logger.rpartition(".")[2] in line for line in said), said
    assert len(said) <= 3, said
    assert not (tmp_path / "run").exists()
