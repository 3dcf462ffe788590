"""``best`` is the checkpoint that the run's ModelCheckpoint has found best, wherever its files are by now."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit
from safetensors.torch import load_file

from halos_pl.batch import Needs
from halos_pl.cli.main import main
from halos_pl.cli.words import spelled
from halos_pl.policy.spec import ModelError, ModelSpec
from halos_pl.training.checkpoint_reading import CheckpointError, read_checkpoint
from halos_pl.training.checkpoint_search import find_checkpoint
from halos_pl.training.named_model import named_model


def checkpoint(path: Path, **states: dict[str, Any]) -> Path:
    """A small checkpoint of a run, with the states of callbacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"scorer.w": torch.zeros(1)}, "callbacks": states, "global_step": 1}, path)
    return path


def state(best: Path | str, monitor: str | None = "val/loss") -> dict[str, Any]:
    return {"monitor": monitor, "best_model_path": str(best), "best_model_score": torch.tensor(0.5)}


@pytest.mark.parametrize("inside", ["checkpoints/best.ckpt", "best/e=1-val/loss=0.5.ckpt", "checkpoints/s=1.ckpt"])
def test_the_folder_of_a_run_may_move_and_another_run_take_its_place(tmp_path: Path, inside: str) -> None:
    old, moved = tmp_path / "runs" / "x", tmp_path / "runs" / "x.1"
    best = checkpoint(old / inside)
    checkpoint(old / "checkpoints" / "last.ckpt", ModelCheckpoint=state(best))
    assert find_checkpoint(old, "best") == best
    old.rename(moved)
    other = checkpoint(old / inside)  # of the next run, by chance of the same name
    assert find_checkpoint(moved, "best") == moved / inside
    assert find_checkpoint(moved, "best") != other
    shutil.copytree(moved, tmp_path / "elsewhere")
    assert find_checkpoint(tmp_path / "elsewhere", "best") == tmp_path / "elsewhere" / inside


def test_a_relative_folder_and_one_outside_the_run(tmp_path: Path) -> None:
    run = tmp_path / "x"
    best = checkpoint(run / "checkpoints" / "b.ckpt")
    checkpoint(run / "checkpoints" / "last.ckpt", ModelCheckpoint=state("runs/then/checkpoints/b.ckpt"))
    assert find_checkpoint(run, "best") == best
    outside = checkpoint(tmp_path / "kept" / "c.ckpt")
    checkpoint(run / "checkpoints" / "last.ckpt", Mine=state(outside))  # of a class of the user's own
    assert find_checkpoint(run, "best") == outside


def test_where_none_is_best_or_several_are_that_is_said(tmp_path: Path) -> None:
    best = [checkpoint(tmp_path / "checkpoints" / f"{i}.ckpt") for i in range(2)]
    cases: dict[str, dict[str, Any]] = {
        "without a ModelCheckpoint": {},
        "monitors nothing": {"ModelCheckpoint": state(best[0], None)},
        "not saved any": {"ModelCheckpoint": state("")},
        rf"{best[0]} \(by val/loss\).*{best[1]} \(by kl\)": {"a": state(best[0]), "b": state(best[1], "kl")},
    }
    for said, states in cases.items():
        checkpoint(tmp_path / "checkpoints" / "last.ckpt", **states)
        with pytest.raises(CheckpointError, match=said):
            find_checkpoint(tmp_path, "best")
    # One that monitors nothing does not count beside one that does.
    checkpoint(tmp_path / "checkpoints" / "last.ckpt", a=state(best[0]), b=state(best[1], None))
    assert find_checkpoint(tmp_path, "best") == best[0]


def test_a_better_one_that_a_running_fit_has_found_since_its_last_checkpoint(tmp_path: Path) -> None:
    """ModelCheckpoint has removed the one that last.ckpt knows of."""
    folder = tmp_path / "checkpoints"
    checkpoint(folder / "last.ckpt", ModelCheckpoint=state(folder / "gone.ckpt"))
    better = checkpoint(folder / "better.ckpt", ModelCheckpoint=state(folder / "better.ckpt"))
    assert find_checkpoint(tmp_path, "best") == better
    better.unlink()
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt"):
        find_checkpoint(tmp_path, "best")


KEEP = (
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.callbacks.filename={step}-{val/loss:.4f}",
    "--trainer.callbacks.mode=max",  # so that of two epochs of two steps, which lower the loss, the first is the best
    "--trainer.max_epochs=2",
    "--model.warmup_ratio=0",
)


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--model.policy.lora={r: 2}",), marks=pytest.mark.slow),
        pytest.param(("--trainer.precision=bf16-true",), marks=pytest.mark.slow),
        pytest.param(("--trainer.callbacks.save_weights_only=true",), marks=pytest.mark.slow),
    ],
)
def test_the_weights_that_are_exported_are_those_of_the_best_step(
    tiny_folder: Path, tmp_path: Path, options: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    data = binary_data(tmp_path / "data.jsonl")
    run = tmp_path / "run"
    main(fit(tiny_folder, "sft", data, run, f"--data.validation={data}", *KEEP, *options))
    best = find_checkpoint(run, "best")
    assert best.is_relative_to(run)
    assert read_checkpoint(best)["global_step"] == 2
    caplog.clear()
    main(["export", str(run), str(tmp_path / "best"), "--checkpoint=best"])
    assert caplog.text.count("is the best checkpoint of") == 1
    main(["export", str(run), str(tmp_path / "last"), "--checkpoint", "last"])
    main(["export", str(run), str(tmp_path / "file"), "--ckpt_path", str(best)])
    exported = {name: load_file(tmp_path / name / "model.safetensors") for name in ("best", "last", "file")}
    same = {name: all(torch.equal(v, exported["best"][k]) for k, v in exported[name].items()) for name in exported}
    assert same == {"best": True, "last": False, "file": True}
    if not options:
        kept = read_checkpoint(best)["state_dict"]
        assert all(torch.equal(v, kept[f"scorer.model.{k}"]) for k, v in exported["best"].items())
        losses = {}
        for name in ("best", "last"):
            main(["test", f"--config={run}/config.yaml", f"--data.test={data}", f"--checkpoint={name}"])
            losses[name] = read_loss(run)
        assert losses["best"] > losses["last"]


def read_loss(run: Path) -> float:
    import json

    loss = float(json.loads((run / "test.json").read_text())["test/loss"])
    assert math.isfinite(loss)
    return loss


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("export r o --checkpoint best", "export r o --ckpt_path best"),
        ("export r o --checkpoint=a.ckpt", "export r o --ckpt_path=a.ckpt"),
        ("evaluate r --checkpoint best", "evaluate r --ckpt_path best"),
        ("test --config c.yaml --checkpoint best", "test --config c.yaml --ckpt_path best"),
        ("predict --checkpoint=runs/a/b.ckpt", "predict --ckpt_path=runs/a/b.ckpt"),
        ("fit --checkpoint last", "fit --ckpt_path last"),
        ("fit --checkpoint settings.yaml", "fit --checkpoint settings.yaml"),
        ("fit --checkpoint.keep 1", "fit --checkpoint.keep 1"),
        ("sample m --prompts best", "sample m --prompts best"),
        ("", ""),
    ],
)
def test_both_spellings(given: str, read: str) -> None:
    assert spelled(given.split()) == read.split()


def test_both_at_once_are_refused() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "r", "o", "--checkpoint=best", "--ckpt_path=last"])
    assert stopped.value.code == 2


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its weights would be exported, or measured, as those of this run."""
    for name in ("a", "b"):
        checkpoint(tmp_path / name / "checkpoints" / "s=1.ckpt")
        (tmp_path / name / "config.yaml").write_text("data: {}\n")
    kept = checkpoint(tmp_path / "kept" / "s=1.ckpt")  # outside of any run's folder
    monkeypatch.setattr(
        "halos_pl.training.named_model.module_of_run",
        lambda _: SimpleNamespace(
            models=SimpleNamespace(spec=ModelSpec("m")), objective=SimpleNamespace(needs=Needs())
        ),
    )
    for own in (tmp_path / "a" / "checkpoints" / "s=1.ckpt", kept):
        assert named_model(str(tmp_path / "a"), str(own)).ckpt_path == str(own)
    with pytest.raises(ModelError, match=rf"of the run {tmp_path / 'b'}, not of {tmp_path / 'a'}"):
        named_model(str(tmp_path / "a"), str(tmp_path / "b" / "checkpoints" / "s=1.ckpt"))
