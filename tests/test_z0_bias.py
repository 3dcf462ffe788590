"""The scripts that measure KTO's estimate of z0 by batch size: their values, their summary, and that they resume."""

from __future__ import annotations

import csv
import gzip
import importlib
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from types import ModuleType

import numpy as np
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
OPTIONS = ("--steps", "0", "2", "4", "--max_new_tokens", "4")


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """z0_bias and z0_summary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("z0_bias"), importlib.import_module("z0_summary")
        for name in ("z0_bias", "z0_summary", "z0_estimators"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def z0_bias(scripts: tuple[ModuleType, ModuleType]) -> ModuleType:
    return scripts[0]


@pytest.fixture(scope="module")
def z0_summary(scripts: tuple[ModuleType, ModuleType]) -> ModuleType:
    return scripts[1]


@pytest.fixture(scope="module")
def files(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run of 4 steps with a checkpoint after each, and its data."""
    folder = tmp_path_factory.mktemp("z0_bias")
    data = write_jsonl(folder / "data.jsonl", binary_rows(16))
    saving = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"
    often = ("--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_top_k=-1")
    run = folder / "kto" / "seed-5"
    halos(
        fit(tiny_folder, "kto", data, run, "--seed_everything=5", "--model.optimizer.init_args.lr=1e-2", saving, *often)
    )
    return str(run), data


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def measure(z0_bias: ModuleType, files: tuple[str, str], out: Path, *options: str) -> list[dict[str, str]]:
    z0_bias.main([files[0], *OPTIONS, "--out", str(out), *options])
    return table(out)


@pytest.fixture(scope="module")
def measured(z0_bias: ModuleType, files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "z0.csv"
    measure(z0_bias, files, out, "--blocks=4", "--samples=16")
    return out


def test_a_line_for_each_block(measured):
    lines = table(measured)
    assert {(line["data"], line["arm"], line["seed"]) for line in lines} == {("data.jsonl", "kto", "5")}
    places = [tuple(line[name] for name in ("step", "estimator", "batch")) for line in lines]
    kinds = [("samples", 1), ("mismatched", 4)]
    assert places == [(step, kind, str(i)) for step in "024" for kind, number in kinds for i in range(number)]
    start = [float(line["nats"]) for line in lines if line["step"] == "0"]
    assert start == pytest.approx([0.0] * len(start), abs=1e-6)  # policy and reference are equal
    assert all(float(line["nats"]) >= 0 for line in lines if line["estimator"] == "samples")


def test_a_block_is_the_batch_of_4_that_the_run_would_draw(measured, files, tiny_folder):
    run, data = files
    policy = load_run(run)
    module = FeedbackDataModule(train=data, batch_size=4, max_length=1024, seed=5)
    module.connect(tokenizer=policy.tokenizer, needs=Needs(mismatched=True, reference=True, undesirable=True))
    module.setup("fit")
    reference = Scorer(load_model(ModelSpec(str(tiny_folder))))
    lines = [line for line in table(measured) if (line["step"], line["estimator"]) == ("4", "mismatched")]
    for line, batch in zip(lines, module.train_dataloader(), strict=True):  # 16 rows: the first epoch
        rows = batch.select(batch.labels.mismatched_index)
        with torch.no_grad():
            ratio = (policy.scorer(rows) - reference(rows)).sum(1).mean()
        assert float(line["nats"]) == pytest.approx(float(ratio), abs=1e-4)
    assert len({line["nats"] for line in lines}) == 4


def test_an_interrupted_measurement_goes_on_where_it_was(z0_bias, measured, files, tmp_path, monkeypatch):
    """Values do not depend on the interruption, and nothing is measured twice."""
    text = measured.read_text()
    out = tmp_path / "z0.csv"
    kept = text.splitlines()[:7]
    out.write_text("\n".join(kept) + "\n/half/of,3,a li")
    assert measure(z0_bias, files, out, "--blocks=4", "--samples=16") == table(measured)
    before = out.read_bytes()
    monkeypatch.setattr(z0_bias, "prepared", lambda *_, **__: pytest.fail("a model was loaded"))
    measure(z0_bias, files, out, "--blocks=4", "--samples=16")
    assert out.read_bytes() == before


def test_more_batches_are_added_to_those_before(z0_bias, measured, files, tmp_path):
    out = tmp_path / "z0.csv"
    assert measure(z0_bias, files, out, "--blocks=1", "--samples=0")
    more = measure(z0_bias, files, out, "--blocks=4", "--samples=16")
    assert sorted(map(str, more)) == sorted(map(str, table(measured)))


def test_lines_of_other_settings_are_not_mixed(z0_bias, measured, files):
    before = measured.read_bytes()
    with pytest.raises(SystemExit, match="measured before with other weights, data or settings"):
        measure(z0_bias, files, measured, "--blocks=4", "--samples=16", "--max_new_tokens=5")
    assert measured.read_bytes() == before


@pytest.mark.parametrize("text", ["prompt,label\nwhy,1", "a note", "data,arm"])
def test_other_files_are_not_overwritten(z0_bias, tmp_path, text):
    """A killed process may leave a part of the header, which is no other file's."""
    out = tmp_path / "z0.csv"
    out.write_text(text)
    if text == "data,arm":
        z0_bias.Table(out)
        assert out.read_text() == f"{z0_bias.HEADER}\n"
        return
    with pytest.raises(SystemExit, match=r"not a table of z0_bias\.py"):
        z0_bias.main(["run", "--out", str(out)])
    assert out.read_text() == text


def test_batches_do_not_count_twice(z0_bias, measured, tmp_path):
    out = tmp_path / "z0.csv"
    text = measured.read_text()
    out.write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(SystemExit, match="measured twice"):
        z0_bias.main(["run", "--out", str(out)])


def test_a_diverged_policy_is_no_measurement(z0_bias, files, tmp_path, monkeypatch):
    monkeypatch.setattr(z0_bias, "estimate", lambda *_: (math.nan, 0.0))
    out = tmp_path / "z0.csv"
    with pytest.raises(SystemExit, match="diverged"):
        measure(z0_bias, files, out, "--blocks=1", "--samples=16")
    assert {line["estimator"] for line in table(out)} == {"samples"}


def test_what_is_no_checkpoint_of_a_run_is_refused(z0_bias, files, tiny_folder, tmp_path):
    with pytest.raises(SystemExit, match="not the folder of a run"):
        z0_bias.main([str(tiny_folder), "--steps=0", "--out", str(tmp_path / "z0.csv")])
    with pytest.raises(SystemExit, match=r"0 files \*step=7.ckpt"):
        z0_bias.main([files[0], "--steps=7", "--out", str(tmp_path / "z0.csv")])


# -- The summary -----------------------------------------------------------------------------------------------


def lines(
    z0_bias: ModuleType, estimator: str, nats: list[float], seed: int = 0, arm: str = "kto", step: int = 64
) -> list:
    return [z0_bias.Line("data", arm, seed, step, estimator, "", i, z, float(i)) for i, z in enumerate(nats)]


def test_the_summary_counts_clamped_batches_and_the_bias_they_add(z0_bias, z0_summary):
    table = [*lines(z0_bias, "samples", [1.0, 3.0]), *lines(z0_bias, "mismatched", [-3.0, -1.0, 2.0])]
    (summary,) = z0_summary.summaries(table, [4, 16]).values()  # there are no 4 blocks
    assert summary.mean == pytest.approx(-2 / 3)
    assert summary.spread == pytest.approx(math.sqrt(19 / 3))  # squares of -7/3, -1/3 and 8/3, divided by 2
    assert summary.clamped == pytest.approx(2 / 3)
    assert summary.used == summary.surplus == pytest.approx(2 / 3)
    assert summary.divergence == 2
    assert summary.bias == pytest.approx(2 / 3 - 2)
    assert summary.seconds == 1


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_larger_batches_are_composed_of_independent_blocks(z0_bias, z0_summary, k):
    """Each block as often as any other: the figures are those of all tuples of k blocks."""
    blocks = np.random.default_rng(3).normal(-0.3, 1.0, 6)
    found = z0_summary.summaries(lines(z0_bias, "mismatched", list(blocks)), [4 * k])
    (summary,) = found.values()
    every = np.array([np.mean(some) for some in itertools.product(blocks, repeat=k)])
    assert summary.mean == pytest.approx(every.mean())
    error = 5 / math.sqrt(z0_summary.DRAWS)
    assert summary.clamped == pytest.approx((every < 0).mean(), abs=0.5 * error)
    assert summary.used == pytest.approx(every.clip(min=0).mean(), abs=every.clip(min=0).std() * error + 1e-12)
    assert summary.seconds == k * 2.5
    assert math.isnan(summary.bias)  # no samples


def test_the_spread_of_composed_batches_is_that_of_independent_blocks(z0_bias, z0_summary):
    """Over many data sets: the variance between means of k independent blocks."""
    draws = np.random.default_rng(0).normal(size=(2000, 8))
    spreads = [z0_summary.summary(blocks, 0.0, 0.0, 4).spread for blocks in draws[:200]]
    assert np.mean(np.square(spreads)) == pytest.approx(draws[:, :4].mean(1).var(), rel=0.15)


def test_batches_that_are_no_sets_of_blocks_are_refused(z0_bias, z0_summary, measured):
    for size in ("2", "10"):
        with pytest.raises(SystemExit, match="blocks of 4 rows"):
            z0_summary.main([str(measured), "--sizes", size])


@pytest.mark.parametrize(
    ("values", "sign", "verdict"),
    [
        ([-3.0, -2.9, -3.1], -1, "holds"),
        ([-3.0, -2.9, -3.1], 1, "refuted"),
        ([-3.0, -0.1, -1.0], -1, "not decided"),  # one sign, but an interval of +-3.7 around -1.4
        ([-3.0, 0.1, -3.0], -1, "not decided"),
        ([-3.0, -2.9], -1, "not decided: 2 of 3 seeds"),
        ([math.nan] * 3, -1, "not decided"),
        ([-2.0] * 3, -1, "holds"),
    ],
)
def test_a_statement_needs_three_seeds_of_one_sign_and_an_interval_without_0(z0_summary, values, sign, verdict):
    assert z0_summary.verdict(values, sign) == verdict


def test_a_packed_table_gives_the_same_summary_and_decisions(z0_bias, z0_summary, tmp_path, capsys):
    table = []
    for seed in range(3):
        table += lines(z0_bias, "samples", [3.0, 3.1 + seed / 10], seed)
        table += lines(z0_bias, "mismatched", [-1.0] * 15 + [-2.0 - seed], seed)
    rows = [z0_bias.HEADER, *(",".join(map(str, astuple(line))) for line in table)]
    (tmp_path / "values.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "values.csv.gz").write_bytes(gzip.compress((tmp_path / "values.csv").read_bytes()))
    said = []
    for name in ("values.csv", "values.csv.gz"):
        z0_summary.main([str(tmp_path / name), "--figure", str(tmp_path / "z0.png")])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "kto, step 64, batches of 32, bias < 0: data: holds" in said[0]
    assert "data, step 64: KTO is KTO with z0 = 0: with batches of 4, 8, 16, 32, 64\n" in said[0]
    assert "dpo, step 64, batches of 32, mean < 0: data: not decided: 0 of 3 seeds" in said[0]
    assert (tmp_path / "z0.png").stat().st_size
