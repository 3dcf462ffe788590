"""Checkpoints: a diverged step is never written, a damaged file never trained on, and no code in a file ever run.

Reported of others as Lightning#5188 (a run's own last.ckpt), Lightning#19728 and h2o-llmstudio#214 (full disk while
saving), metatrain#507 and Lightning#578 (exporting the best checkpoint).
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from run_halos import binary_data, fit, full_disk, metrics, pair_data, refused

import halos_pl.training.module
from halos_pl.cli.export import export
from halos_pl.cli.main import main
from halos_pl.evaluation.evaluate import evaluate
from halos_pl.evaluation.files import MEASURED
from halos_pl.policy.loading import ModelSpec, load_model
from halos_pl.training.checkpoint_files import CheckpointFiles
from halos_pl.training.checkpoint_reading import CheckpointError, read_checkpoint
from halos_pl.training.non_finite import NonFiniteWeightsError, check_finite

ONCE = ("--checkpoint.every_n_steps=1", "--model.warmup_ratio=0", "--model.lr_schedule=constant_with_warmup")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder) -> tuple[Path, list[str]]:
    """A run of 3 steps, each of them saved, and the words that made it."""
    folder = tmp_path_factory.mktemp("finished")
    words = fit(tiny_folder, "kto", binary_data(folder / "data.jsonl"), folder / "run", *ONCE)
    main(words)
    return folder / "run", words


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def saved(run: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return found


# -- what is written ------------------------------------------------------------------------------------


def test_the_last_two_are_kept(finished):
    last, previous = (saved(finished[0], name) for name in ("last", "previous"))
    assert (last["global_step"], previous["global_step"]) == (3, 2)
    assert sorted(p.name for p in (finished[0] / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.slow
def test_one_is_kept_where_that_is_wanted(finished, tmp_path):
    main([*finished[1], f"--run_dir={tmp_path}/one", "--checkpoint.keep=1"])
    assert [p.name for p in (tmp_path / "one" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_without_hard_links_the_last_two_are_kept_all_the_same(finished, tmp_path, monkeypatch):
    def link(*_: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", link)
    main([*finished[1], f"--run_dir={tmp_path}/x"])
    assert [saved(tmp_path / "x", name)["global_step"] for name in ("last", "previous")] == [3, 2]
    # A kill between the two renamings leaves the older name alone.
    (tmp_path / "x/checkpoints/last.ckpt").unlink()
    main([*finished[1], f"--run_dir={tmp_path}/x", "--ckpt_path=last"])
    assert [row["step"] for row in metrics(tmp_path / "x")] == ["0", "1", "2"]
    assert saved(tmp_path / "x")["global_step"] == 3


@pytest.mark.parametrize("steps", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_diverged_step_is_not_saved(finished, tmp_path, capfd, monkeypatch, steps):
    """Neither over the good checkpoint nor, as the last step, in silence."""
    step = halos_pl.training.module.HALOModule.optimizer_step

    def diverging(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if self.global_step == 2:
            next(self.policy.parameters()).data[0, 0] = float("inf")

    monkeypatch.setattr(halos_pl.training.module.HALOModule, "optimizer_step", diverging)
    words = [*finished[1], f"--run_dir={tmp_path}/x", f"--trainer.max_steps={steps}", "--trainer.max_epochs=2"]
    said = refused(capfd, words)
    assert "embed_tokens.weight" in said
    assert f"{tmp_path}/x/checkpoints/last.ckpt (optimizer step 2)" in said
    assert f"{tmp_path}/x/checkpoints/previous.ckpt (optimizer step 1)" in said
    for name, at in (("last", 2), ("previous", 1)):
        good = saved(tmp_path / "x", name)
        assert good["global_step"] == at
        assert all(weight.isfinite().all() for weight in good["state_dict"].values())
    assert not (tmp_path / "x" / "summary.json").exists()


@pytest.mark.parametrize("rate", ["1e12", *(pytest.param(r, marks=pytest.mark.slow) for r in ("1e20", "1e38", "1e39"))])
def test_a_learning_rate_that_breaks_the_only_step_is_an_error(finished, tmp_path, capfd, rate):
    """Also where the weights are finite, and what is computed with them is not."""
    more = ("--trainer.max_steps=1", f"--model.optimizer.init_args.lr={rate}", "--checkpoint.every_n_steps=50")
    assert "checkpoint: none" in refused(capfd, [*finished[1], f"--run_dir={tmp_path}/x", *more])
    assert not list((tmp_path / "x" / "checkpoints").iterdir())
    assert not (tmp_path / "x" / "summary.json").exists()


def test_finite_weights_that_give_no_finite_loss_are_not_called_good(finished, tmp_path, capfd, monkeypatch):
    step = halos_pl.training.module.HALOModule.optimizer_step

    def diverging(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if self.global_step == 1:
            for weight in self.policy.parameters():
                weight.data *= 1e12

    monkeypatch.setattr(halos_pl.training.module.HALOModule, "optimizer_step", diverging)
    said = refused(capfd, [*finished[1], f"--run_dir={tmp_path}/x"])
    assert f"last good checkpoint: {tmp_path}/x/checkpoints/previous.ckpt (optimizer step 1)" in said
    assert "last.ckpt" not in said


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ["weight", "optimizer", "reference"])
def test_what_is_trained_must_be_finite(place, dtype, bad):
    tensors = {name: torch.full((5, 3), 6e4, dtype=dtype) for name in ("weight", "optimizer", "reference")}
    mask = torch.full((2,), float("-inf"))  # which is not trained
    checkpoint: dict[str, Any] = {
        "global_step": 7,
        "state_dict": {"scorer.w": tensors["weight"], "scorer.mask": mask, "extra": {"n": 1}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": tensors["optimizer"]}}}],
        "reference_model": {"w": tensors["reference"]},
    }
    check_finite(checkpoint, {"scorer.w"}, "none")  # though the norm is infinite in float16
    tensors[place][4, 2] = bad
    named = {"weight": "scorer.w", "optimizer": "exp_avg", "reference": "reference_model.w"}[place]
    with pytest.raises(NonFiniteWeightsError, match=named):
        check_finite(checkpoint, {"scorer.w"}, "none")
    tensors[place][4, 2] = 0
    checkpoint["state_dict"]["scorer.mask"] = torch.tensor([0, float("nan")])
    with pytest.raises(NonFiniteWeightsError, match=r"scorer\.mask"):
        check_finite(checkpoint, {"scorer.w"}, "none")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    """A full disk, as far as one process can have one for itself: no file may grow beyond a size."""
    path, files = tmp_path / "checkpoints" / "last.ckpt", CheckpointFiles()
    files.save_checkpoint({"state_dict": {"scorer.w": torch.zeros(4)}}, path)
    before = path.read_bytes()
    with full_disk(20_000), pytest.raises(OSError, match=r"last\.ckpt cannot be written") as caught:
        files.save_checkpoint({"state_dict": {"scorer.w": torch.zeros(100_000)}}, path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.usefixtures("no_model")
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(run, finished, capfd):
    best = run / "best.ckpt"
    shutil.move(run / "checkpoints" / "last.ckpt", best)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("no folder")
    said = refused(capfd, [*finished[1], f"--run_dir={run}", f"--ckpt_path={best}"])
    assert f"{run}/checkpoints" in said
    assert "\n" not in said


def test_nothing_goes_through_the_folder_for_temporary_files(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    CheckpointFiles().save_checkpoint(saved(finished[0]), tmp_path / "x" / "last.ckpt")
    assert read_checkpoint(tmp_path / "x" / "last.ckpt")["global_step"] == 3


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed(run, finished):
    for name in ("last.ckpt.part", "epoch=1.ckpt.part"):
        (run / "checkpoints" / name).write_bytes(b"half")
    main([*finished[1], f"--run_dir={run}", "--ckpt_path=last"])
    assert not list(run.rglob("*.part"))


# -- what is read ---------------------------------------------------------------------------------------


class Code:
    """Pickled, it is a call that leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "of another program")


def zeroed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40960:45056] = bytes(4096)
    path.write_bytes(content)


def with_code(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "more": Code(path.parent / "executed")}, path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flipped,
    "a zeroed page": zeroed,
    "cut": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "appended to": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "twice": lambda path: path.write_bytes(path.read_bytes() * 2),
    "another zip": other_zip,
    "a bare state dict": lambda path: torch.save({"model.embed_tokens.weight": torch.zeros(2)}, path),
    "a list": lambda path: torch.save([torch.zeros(2)], path),
    "another module's": lambda path: torch.save({"state_dict": {"layer.weight": torch.zeros(2)}, "loops": {}}, path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "executed"))),
    "code inside": with_code,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_not_read(run, kind):
    path = run / "checkpoints" / "last.ckpt"
    DAMAGE[kind](path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    said = str(caught.value)
    assert said.startswith(f"{path} ")
    assert "\n" not in said
    assert f"--ckpt_path {run}/checkpoints/previous.ckpt" in said
    assert not (path.parent / "executed").exists()


@pytest.mark.parametrize(
    ("command", "kind"),
    [("fit", "a flipped bit"), ("export", "code inside"), ("evaluate", "code inside")]
    + [
        pytest.param(command, kind, marks=pytest.mark.slow)
        for command in ("fit", "test", "validate", "predict", "export", "evaluate")
        for kind in ("a flipped bit", "code inside", "cut", "text")
    ],
)
def test_no_command_uses_a_damaged_checkpoint(run, tmp_path, capfd, command, kind):
    path = run / "checkpoints" / "last.ckpt"
    DAMAGE[kind](path)
    data = tmp_path / "data.jsonl"
    binary_data(data)
    if command == "export":
        words = ["export", str(run), str(tmp_path / "out")]
    elif command == "evaluate":
        words = ["evaluate", str(run), f'--held_out=["{data}"]']
    else:
        option = {"validate": "validation", "fit": "train"}.get(command, command)
        words = [command, f"--config={run}/config.yaml", f"--run_dir={run}", f"--data.{option}={data}"]
        words.append("--ckpt_path=last")
    said = refused(capfd, words)
    assert f"{path} " in said
    assert f"--ckpt_path {run}/checkpoints/previous.ckpt" in said
    assert "\n" not in said
    assert not (path.parent / "executed").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["fit", pytest.param("test", marks=pytest.mark.slow)])
def test_loading_with_code_is_refused(run, capfd, command):
    with_code(run / "checkpoints" / "last.ckpt")
    words = [command, f"--config={run}/config.yaml", f"--run_dir={run}", "--ckpt_path=last", "--weights_only=false"]
    assert "weights_only" in refused(capfd, words)
    assert not (run / "checkpoints" / "executed").exists()


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_no_damage_changes_what_is_read(tmp_path, seed):
    """Bits flipped anywhere, and where checksums do not reach: in names, sizes and places of the archive's entries."""
    draw, path = random.Random(seed), tmp_path / "last.ckpt"
    torch.manual_seed(seed)
    weights = {f"scorer.{i}": torch.randn(8, 8) for i in range(6)}
    good = {"state_dict": weights, "global_step": 3, "loops": {"a": [1, 2]}}
    CheckpointFiles().save_checkpoint(good, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        heads, directory = [entry.header_offset for entry in archive.infolist()], archive.start_dir
    refused = 0
    for number in range(300):
        changed = bytearray(content)
        kind = draw.choice(["bit", "directory", "head", "pickle", "page", "swap", "end"])
        if kind == "page":
            start = draw.randrange(0, len(content), 256)
            changed[start : start + 256] = bytes(256)
        elif kind == "swap":
            a, b = (draw.randrange(0, len(content) - 64, 64) for _ in range(2))
            changed[a : a + 64], changed[b : b + 64] = content[b : b + 64], content[a : a + 64]
        elif kind == "end":
            changed = changed[: draw.randrange(len(content))] if draw.random() < 0.5 else changed + draw.randbytes(9)
        else:
            place = {
                "bit": draw.randrange(len(content)),
                "directory": draw.randrange(directory, len(content)),
                "head": draw.choice(heads) + draw.randrange(48),
                "pickle": draw.randrange(heads[1]),
            }[kind]
            changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        os.utime(path, ns=(number, number))
        try:
            found = read_checkpoint(path)
        except CheckpointError:
            refused += 1
            continue
        # Such as a bit of a time stamp: nothing that is read.
        assert found.keys() == good.keys()
        assert (found["global_step"], found["loops"]) == (3, {"a": [1, 2]})
        assert found["state_dict"].keys() == weights.keys()
        assert all(torch.equal(found["state_dict"][k], v) for k, v in weights.items())
    assert refused > 100


def test_going_on_from_the_one_before_gives_the_same_run(run, finished):
    """And does not put the damaged file in its place."""
    flipped(run / "checkpoints" / "last.ckpt")
    damaged = (run / "checkpoints" / "last.ckpt").read_bytes()
    main([*finished[1], f"--run_dir={run}", f"--ckpt_path={run}/checkpoints/previous.ckpt"])
    assert metrics(run) == metrics(finished[0])
    assert saved(run, "previous")["global_step"] == 2
    whole, again = saved(finished[0]), saved(run)
    assert all(torch.equal(again["state_dict"][k], v) for k, v in whole["state_dict"].items())
    assert (run / "checkpoints" / "last.ckpt").read_bytes() != damaged


# -- callbacks and plug-ins -----------------------------------------------------------------------------


class Forgetful(Callback):
    """Its state could be saved, but not loaded again."""

    def state_dict(self) -> dict[str, Any]:
        return {"folder": Path("x")}


def test_a_callback_whose_state_could_not_be_loaded_is_refused_before_training(finished, tmp_path, capfd):
    words = [*finished[1], f"--run_dir={tmp_path}/x", f"--trainer.callbacks+={__name__}.Forgetful"]
    said = refused(capfd, words)
    assert "Forgetful" in said
    assert "Path" in said
    assert not (tmp_path / "x" / "metrics.csv").exists()


@pytest.mark.slow
def test_another_way_of_writing_checkpoints_is_refused(finished, tmp_path, capfd):
    words = [*finished[1], f"--run_dir={tmp_path}/x", "--trainer.plugins=AsyncCheckpointIO"]
    assert "AsyncCheckpointIO" in refused(capfd, words)


KEPT = (
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.callbacks.filename=best",
    "--trainer.callbacks+=EarlyStopping",
    "--trainer.callbacks.monitor=val/loss",
    "--trainer.val_check_interval=2",
)


@pytest.mark.slow
def test_the_best_checkpoint_is_verified_and_goes_on(finished, tmp_path, capfd):
    """A ModelCheckpoint's file is written and read as the run's own are; callbacks' states come back."""
    folder, words = finished
    words = [*words, f"--run_dir={tmp_path}/x", f"--data.validation={folder.parent}/data.jsonl", *KEPT]
    main(words)
    best = tmp_path / "x" / "checkpoints" / "best.ckpt"
    states = saved(tmp_path / "x")["callbacks"]
    (state,) = (state for name, state in states.items() if name.startswith("ModelCheckpoint"))
    assert Path(state["best_model_path"]) == best
    before = metrics(tmp_path / "x")
    assert read_checkpoint(best)["global_step"] == 2
    export(str(tmp_path / "x"), str(tmp_path / "out"), ckpt_path="best")
    exported = load_model(ModelSpec(str(tmp_path / "out"))).state_dict()
    kept = {k.removeprefix("scorer.model."): v for k, v in read_checkpoint(best)["state_dict"].items()}
    assert all(torch.equal(exported[name], v) for name, v in kept.items() if name in exported)
    assert not torch.equal(kept["lm_head.weight"], saved(tmp_path / "x")["state_dict"]["scorer.model.lm_head.weight"])
    evaluate(str(tmp_path / "x"), held_out=[str(pair_data(tmp_path / "pairs.jsonl"))], ckpt_path="best")
    assert json.loads((tmp_path / "x" / MEASURED).read_text())["evaluate"]["ckpt_path"] == "best"
    main([*words, f"--ckpt_path={best}"])
    assert metrics(tmp_path / "x") == before
    assert saved(tmp_path / "x")["global_step"] == 3
    shutil.move(tmp_path / "x", tmp_path / "y")
    best = tmp_path / "y" / "checkpoints" / "best.ckpt"
    flipped(best)
    said = refused(capfd, [*words, f"--run_dir={tmp_path}/y", "--ckpt_path=best"])
    assert f"{best} " in said
    assert f"--ckpt_path {tmp_path}/y/checkpoints/last.ckpt" in said


# -- which one is measured ------------------------------------------------------------------------------


def test_without_its_last_checkpoint_a_run_is_measured_by_the_one_before(run, finished, capfd, no_model):
    """Not by the model that it began with."""
    (run / "checkpoints/last.ckpt").unlink()
    (run / "checkpoints/previous.ckpt").write_bytes(b"")
    words = ["test", *finished[1][1:], f"--run_dir={run}", f"--data.test={finished[1][4].partition('=')[2]}"]
    words = [word for word in words if not word.startswith("--checkpoint")]
    assert "previous.ckpt is empty" in refused(capfd, words)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *(("fit", "folder"), ("test", "pipe"), ("export", "link")),
        *(
            pytest.param(command, kind, marks=pytest.mark.slow)
            for command in ("fit", "test", "export")
            for kind in ("folder", "pipe", "link")
        ),
    ],
)
def test_what_is_no_regular_file_is_no_checkpoint(run, finished, tmp_path, capfd, no_model, command, kind):
    last = run / "checkpoints/last.ckpt"
    last.unlink()
    (run / "checkpoints/previous.ckpt").unlink()
    {"folder": last.mkdir, "pipe": lambda: os.mkfifo(last), "link": lambda: last.symlink_to("gone")}[kind]()
    words = [command, *finished[1][1:], f"--run_dir={run}", *(["--ckpt_path=last"] if command == "fit" else [])]
    if command == "test":
        words = [word for word in words if not word.startswith("--checkpoint")]
    if command == "export":
        words = ["export", str(run), str(tmp_path / "out")]
    assert str(last) in refused(capfd, words)


@pytest.mark.parametrize("how", ["cut", "whole numbers", "text"])
def test_weights_of_another_kind_are_not_exported(run, tmp_path, capfd, how):
    state = saved(run)
    name = next(name for name in state["state_dict"] if name.endswith("v_proj.weight"))
    value = state["state_dict"][name]
    state["state_dict"][name] = {"cut": value[:1].clone(), "whole numbers": value.int(), "text": "x"}[how]
    torch.save(state, run / "checkpoints/last.ckpt")
    assert name in refused(capfd, ["export", str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("loops", []),
        ("loops", {}),
        ("loops", {"fit_loop": {"epoch_progress": "x"}}),
        ("optimizer_states", []),
        ("optimizer_states", None),
        ("lr_schedulers", ["x"]),
    ],
)
def test_a_fit_does_not_go_on_from_entries_of_another_kind(run, entry, value):
    path = run / "checkpoints/last.ckpt"
    torch.save({**saved(run), entry: value}, path)
    with pytest.raises(CheckpointError, match=rf"{path}.*{entry}"):
        read_checkpoint(path, resume=True)


def test_nor_from_the_weights_alone(run, finished, capfd, no_model):
    torch.save({"state_dict": saved(run)["state_dict"]}, run / "checkpoints/last.ckpt")
    said = refused(capfd, [*finished[1], f"--run_dir={run}", "--ckpt_path=last"])
    assert str(run / "checkpoints/last.ckpt") in said
    assert "optimizer_states" in said
