"""The script that measures KTO's estimate of z0 by batch size: its values, its summary, and that it resumes."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from run_halos import fit, write_jsonl

from halos_pl.batch import Needs
from halos_pl.cli.main import main as halos
from halos_pl.data import FeedbackDataModule
from halos_pl.policy.loading import ModelSpec, load_model
from halos_pl.policy.scorer import Scorer
from halos_pl.testing import binary_rows
from halos_pl.training.trained import load_run

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "ablations"
OPTIONS = ("--checkpoints", "start", "epoch=0-step=2.ckpt", "last", "--sizes", "4", "8", "--max_new_tokens", "4")


@pytest.fixture(scope="module")
def z0_bias() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("z0_bias", FOLDER / "z0_bias.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "z0_bias", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def files(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run of 3 steps with a checkpoint after 2, and its data."""
    folder = tmp_path_factory.mktemp("z0_bias")
    data = write_jsonl(folder / "data.jsonl", binary_rows(12))
    saving = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    often = ("--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.save_top_k=-1")
    halos(fit(tiny_folder, "kto", data, folder / "run", "--model.optimizer.init_args.lr=1e-2", saving, *often))
    return str(folder / "run"), data


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def measure(z0_bias: ModuleType, files: tuple[str, str], out: Path, *options: str) -> list[dict[str, str]]:
    run, data = files
    z0_bias.main([run, "--data", data, *OPTIONS, "--out", str(out), *options])
    return table(out)


@pytest.fixture(scope="module")
def measured(z0_bias: ModuleType, files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "z0.csv"
    measure(z0_bias, files, out, "--batches=3", "--samples=16")
    return out


def test_a_line_for_each_batch(measured, files):
    run, data = files
    lines = table(measured)
    assert {(line["run"], line["data"]) for line in lines} == {(run, data)}
    places = [tuple(line[name] for name in ("step", "estimator", "size", "batch")) for line in lines]
    kinds = [("samples", "8", 2), ("mismatched", "4", 3), ("mismatched", "8", 3)]
    assert places == [(step, *kind, str(i)) for step in "023" for *kind, number in kinds for i in range(number)]
    start = [float(line["nats"]) for line in lines if line["step"] == "0"]
    assert start == pytest.approx([0.0] * len(start), abs=1e-6)  # policy and reference are equal
    assert all(float(line["nats"]) >= 0 for line in lines if line["estimator"] == "samples")


def test_a_value_is_the_mean_log_ratio_of_the_batch_that_fit_would_draw(measured, files, tiny_folder):
    run, data = files
    policy = load_run(run)
    module = FeedbackDataModule(train=data, batch_size=4, max_length=1024, seed=0)
    module.connect(tokenizer=policy.tokenizer, needs=Needs(mismatched=True, reference=True, undesirable=True))
    module.setup("fit")
    reference = Scorer(load_model(ModelSpec(str(tiny_folder))))
    lines = [
        line for line in table(measured) if (line["step"], line["estimator"], line["size"]) == ("3", "mismatched", "4")
    ]
    for line, batch in zip(lines, module.train_dataloader(), strict=True):  # 12 rows: the first epoch
        rows = batch.select(batch.labels.mismatched_index)
        with torch.no_grad():
            ratio = (policy.scorer(rows) - reference(rows)).sum(1).mean()
        assert float(line["nats"]) == pytest.approx(float(ratio), abs=1e-4)
    assert len({line["nats"] for line in lines}) == 3


def test_an_interrupted_measurement_goes_on_where_it_was(z0_bias, measured, files, tmp_path, monkeypatch):
    """Values do not depend on the interruption, and nothing is measured twice."""
    text = measured.read_text()
    out = tmp_path / "z0.csv"
    kept = text.splitlines()[:9]
    out.write_text("\n".join(kept) + "\n/half/of,3,a li")
    assert measure(z0_bias, files, out, "--batches=3", "--samples=16") == table(measured)
    before = out.read_bytes()
    monkeypatch.setattr(z0_bias, "prepared", lambda *_, **__: pytest.fail("a model was loaded"))
    measure(z0_bias, files, out, "--batches=3", "--samples=16")
    assert out.read_bytes() == before


def test_more_batches_are_added_to_those_before(z0_bias, measured, files, tmp_path):
    out = tmp_path / "z0.csv"
    assert measure(z0_bias, files, out, "--batches=1", "--samples=8")
    more = measure(z0_bias, files, out, "--batches=3", "--samples=16")
    assert sorted(map(str, more)) == sorted(map(str, table(measured)))


@pytest.mark.parametrize("options", [("--seed=1",), ("--max_new_tokens=5",)])
def test_lines_of_other_settings_are_not_mixed(z0_bias, measured, files, options):
    before = measured.read_bytes()
    with pytest.raises(SystemExit, match="measured before with other weights, data or settings"):
        measure(z0_bias, files, measured, "--batches=3", "--samples=16", *options)
    assert measured.read_bytes() == before


@pytest.mark.parametrize("text", ["prompt,label\nwhy,1", "a note", "run,step"])
def test_other_files_are_not_overwritten(z0_bias, tmp_path, text):
    """A killed process may leave a part of the header, which is no other file's."""
    out = tmp_path / "z0.csv"
    out.write_text(text)
    if text == "run,step":
        z0_bias.Table(out)
        assert out.read_text().startswith("run,step,data,")
        return
    with pytest.raises(SystemExit, match="not a table of this script"):
        z0_bias.main(["--out", str(out)])
    assert out.read_text() == text


def test_batches_do_not_count_twice(z0_bias, measured, tmp_path):
    out = tmp_path / "z0.csv"
    text = measured.read_text()
    out.write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(SystemExit, match="measured twice"):
        z0_bias.main(["--out", str(out)])


def test_a_diverged_policy_is_no_measurement(z0_bias, files, tmp_path, monkeypatch):
    monkeypatch.setattr(z0_bias, "estimate", lambda *_: math.nan)
    out = tmp_path / "z0.csv"
    with pytest.raises(SystemExit, match="diverged"):
        measure(z0_bias, files, out, "--batches=1", "--samples=8")
    assert {line["estimator"] for line in table(out)} == {"samples"}


def test_a_model_that_is_no_run_is_refused(z0_bias, files, tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match="not the folder of a run"):
        z0_bias.main([str(tiny_folder), "--data", files[1], "--out", str(tmp_path / "z0.csv")])


def lines(z0_bias: ModuleType, estimator: str, size: int, nats: list[float]) -> list:
    return [z0_bias.Line("run", 4, "data", estimator, size, "", i, z, float(i)) for i, z in enumerate(nats)]


def test_the_summary_counts_clamped_batches_and_the_bias_they_add(z0_bias):
    table = [*lines(z0_bias, "samples", 8, [1.0, 3.0]), *lines(z0_bias, "mismatched", 4, [-3.0, -1.0, 2.0])]
    (summary,) = z0_bias.summaries(table).values()
    assert summary.batches == 3
    assert summary.mean == pytest.approx(-2 / 3)
    assert summary.spread == pytest.approx(math.sqrt(19 / 3))  # squares of -7/3, -1/3 and 8/3, divided by 2
    assert summary.error == pytest.approx(math.sqrt(19 / 9))
    assert summary.clamped == pytest.approx(2 / 3)
    assert summary.used == summary.surplus == pytest.approx(2 / 3)
    assert summary.divergence == 2
    assert summary.bias == pytest.approx(2 / 3 - 2)
    assert summary.bias_error == pytest.approx(math.sqrt(4 / 9 + 1))  # of 0, 0, 2 and of 1, 3
    assert summary.seconds == 1


def test_without_samples_there_is_no_bias(z0_bias):
    (summary,) = z0_bias.summaries(lines(z0_bias, "mismatched", 4, [1.0, 2.0])).values()
    assert math.isnan(summary.bias)
    assert summary.surplus == pytest.approx(0)
