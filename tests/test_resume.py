"""A run that is killed at any moment and goes on gives what the uninterrupted run gives, bit for bit."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from kills import checkpoint, equal, kill_at
from run_halos import KILLED, binary_data, fit, metrics, pair_data, refused, run
from transformers import LlamaConfig, LlamaForCausalLM

from halos_pl.cli.main import main
from halos_pl.common.files import part_of
from halos_pl.training.run_lock import RunLock
from halos_pl.training.run_log import RunCSVLogger

# 15 rows in steps of 4: three whole steps and a smaller one make an epoch of 4 steps; two epochs are 8 steps.
ROWS, EPOCH, STEPS = 15, 4, 8
# With this seed every step holds both classes of rows.
SEED = "--data.seed=47"
MOMENTS = ("after_step", "writing", "written", "after_checkpoint")
EVALUATED = ("after_step", "validating", "validated", "writing", "written", "after_checkpoint")
# All that decides which rows a step has and how they are judged, and a callback that logs columns of its own.
STUDY = (
    "--trainer.callbacks+=LearningRateMonitor",
    "--data.group_by_length=true",
    "--data.balance_classes=true",
    "--data.transforms=[{class_path: FlipLabels, init_args: {share: 0.2}}]",
)
SETUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # name: (objective, model, options)
    "kto": ("kto", "llama", ()),
    "bco": ("bco", "llama", ()),  # the running mean is state
    "auto": ("kto", "llama", ("--model.feedback.lambda_desirable=auto", "--model.feedback.rho=2")),  # so is the weight
    "dropout": ("kto", "gpt2", ("--model.policy.dropout=true",)),  # so is the random state
    "lora": ("kto", "llama", ("--model.policy.lora={r: 4, dropout: 0.1}",)),
    "dpo": ("dpo", "llama", ("--model.micro_batch_rows=2", "--model.lr_schedule=cosine")),
    "tr_dpo": ("tr_dpo", "llama", ()),  # so is a reference that moves
    "mnpo": ("mnpo", "llama", ()),  # so are the policies of earlier steps
    "tpo": ("tpo", "llama", ("--model.micro_batch_rows=2",)),  # with gold answers
    "study": ("kto", "llama", STUDY),
}
PAIRS = {"dpo", "tr_dpo", "mnpo"}


class Runs:
    """Fits of one set-up; the uninterrupted ones are made once."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.folder, self.models = folder, models
        self.number = itertools.count()
        self.binary = binary_data(folder / "binary.jsonl", ROWS)
        self.pairs = pair_data(folder / "pairs.jsonl", ROWS)
        self.triples = pair_data(folder / "triples.jsonl", ROWS, gold=True)
        self.whole: dict[tuple[str, ...], Path] = {}

    def words(self, setup: str, run_dir: Path, options: tuple[str, ...]) -> list[str]:
        objective, model, more = SETUPS[setup]
        data = self.triples if objective == "tpo" else self.pairs if objective in PAIRS else self.binary
        common = ("--trainer.max_epochs=2", "--checkpoint.every_n_steps=1", SEED, *more, *options)
        return fit(self.models[model], objective, data, run_dir, *common)

    def uninterrupted(self, setup: str, *options: str) -> Path:
        key = (setup, *options)
        if key not in self.whole:
            run_dir = self.folder / f"whole{len(self.whole)}"
            ended = run(self.words(setup, run_dir, options), self.folder)
            assert ended.status == 0, ended
            self.whole[key] = run_dir
        return self.whole[key]

    def killed(self, setup: str, step: int, moment: str, *options: str, run_dir: Path | None = None) -> Path:
        """A run that was killed; with ``run_dir``, one that went on from there before it was killed."""
        more = ("--ckpt_path=last",) if run_dir else ()
        run_dir = run_dir or self.folder / f"killed{next(self.number)}"
        ended = run([*self.words(setup, run_dir, options), *kill_at(step, moment), *more], self.folder)
        assert ended.status == KILLED, ended
        return run_dir

    def resumed(self, setup: str, run_dir: Path, *options: str) -> Path:
        ended = run([*self.words(setup, run_dir, options), "--ckpt_path=last"], self.folder)
        assert ended.status == 0, ended
        return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder, tiny_gpt2_folder) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"), {"llama": tiny_folder, "gpt2": tiny_gpt2_folder})


def assert_same_run(whole: Path, resumed: Path) -> None:
    """Every logged figure, and everything in the last checkpoint: weights, optimizer, schedule, random state.

    Except for the number of validation batches since the epoch began: Lightning 2.6 counts those of a validation that
    ended just before the checkpoint again. It uses the number only to notice that a validation was stopped.
    """
    first_lines = [(run / "metrics.csv").read_text().splitlines()[0] for run in (whole, resumed)]
    assert first_lines[0] == first_lines[1]
    a, b = metrics(whole), metrics(resumed)
    assert [row["step"] for row in b] == [row["step"] for row in a]
    assert equal(a, b, "metrics.csv") == []
    a, b = checkpoint(whole), checkpoint(resumed)
    for content in (a, b):
        del content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    assert equal(a, b) == []


DEFAULT: list[tuple[str, int, str, int]] = [
    ("study", EPOCH, "after_checkpoint", 2),  # after the last step of an epoch, before the next one has begun
    ("tpo", 3, "after_checkpoint", 0),
    ("dropout", 3, "written", 0),  # in the middle of an epoch; its line is in the log already
    ("tr_dpo", EPOCH + 1, "writing", 0),  # half a checkpoint lies beside the good one
]
EVERY = [case for case in itertools.product(SETUPS, range(2, STEPS + 1), MOMENTS, (0, 2)) if case not in DEFAULT]


def case(setup: str, step: int, moment: str, workers: int, *, slow: bool) -> Any:
    return pytest.param(setup, step, moment, workers, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(
    ("setup", "step", "moment", "workers"),
    [*(case(*c, slow=False) for c in DEFAULT), *(case(*c, slow=True) for c in EVERY)],
)
def test_a_killed_run_goes_on_exactly(runs, setup, step, moment, workers):
    whole = runs.uninterrupted(setup)  # without workers: what they make does not depend on them
    option = f"--data.num_workers={workers}"
    killed = runs.killed(setup, step, moment, option)
    reached = step if moment in ("written", "after_checkpoint") else step - 1
    assert checkpoint(killed)["global_step"] == reached
    beside = killed / "checkpoints" / "last.ckpt.part"
    assert beside.exists() is (moment == "writing")
    assert_same_run(whole, runs.resumed(setup, killed, option))
    assert not beside.exists()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_every_few_steps_and_two_kills(runs, workers):
    """Steps that were logged after the last checkpoint are taken, and logged, once more."""
    options = ("--checkpoint.every_n_steps=2", f"--data.num_workers={workers}")
    killed = runs.killed("bco", 3, "after_step", *options)
    assert [row["step"] for row in metrics(killed)] == ["0", "1"]
    killed = runs.killed("bco", EPOCH + 4, "after_step", *options, run_dir=killed)
    assert checkpoint(killed)["global_step"] == EPOCH + 2
    assert_same_run(runs.uninterrupted("bco", "--checkpoint.every_n_steps=2"), runs.resumed("bco", killed, *options))


QUICK = [(EPOCH, "validated")]
EACH = [c for c in itertools.product((2, EPOCH, EPOCH + 2, STEPS), EVALUATED) if c not in QUICK]


@pytest.mark.parametrize(("step", "moment"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in EACH)])
@pytest.mark.parametrize("interval", [2, pytest.param(1.0, marks=pytest.mark.slow)])
def test_an_evaluation_is_logged_once_whenever_the_run_is_killed(runs, step, moment, interval):
    """One that is due right after a step belongs to the step: its checkpoint is written behind it."""
    options = (f"--data.validation={runs.binary}", f"--trainer.val_check_interval={interval}")
    whole = runs.uninterrupted("bco", *options)
    evaluated = [int(row["step"]) + 1 for row in metrics(whole) if "val/loss" in row]
    assert evaluated == ([2, 4, 6, 8] if interval == 2 else [4, 8])
    if moment.startswith("validat") and step not in evaluated:
        pytest.skip("none is due then")
    killed = runs.killed("bco", step, moment, *options)
    assert_same_run(whole, runs.resumed("bco", killed, *options))


def test_figures_of_a_class_that_a_step_lacks_are_left_out(tiny_folder, tmp_path):
    """Not carried over from the step before, which would be another figure after a resumption."""
    data = binary_data(tmp_path / "data.jsonl", 12)  # the first of every three rows is undesirable
    main(fit(tiny_folder, "kto", data, tmp_path / "run", "--data.batch_size=3", "--data.shuffle=false"))
    assert all({"logps/chosen", "logps/rejected"} <= row.keys() for row in metrics(tmp_path / "run"))
    main(fit(tiny_folder, "kto", data, tmp_path / "one", "--data.batch_size=1", "--data.shuffle=false"))
    for i, row in enumerate(metrics(tmp_path / "one")):
        assert ("logps/rejected" in row) == ("rewards/rejected" in row) == (i % 3 == 0)
        assert ("logps/chosen" in row) == ("rewards/chosen" in row) == (i % 3 != 0)
        assert "rewards/margins" not in row


@pytest.mark.slow
def test_a_run_that_max_steps_ended_within_an_epoch_can_be_extended(runs):
    options = ("--model.lr_schedule=constant_with_warmup", "--model.warmup_ratio=0", "--checkpoint.every_n_steps=50")
    run_dir = runs.folder / "extended"
    ended = run([*runs.words("kto", run_dir, options), "--trainer.max_steps=2"], runs.folder)
    assert ended.status == 0, ended
    runs.resumed("kto", run_dir, *options)
    assert metrics(run_dir) == metrics(runs.uninterrupted("kto", *options))


# -- what is refused, and what is kept ------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
def test_nothing_to_go_on_from_is_an_error(tiny_folder, tmp_path, capfd):
    data = binary_data(tmp_path / "data.jsonl")
    run_dir = tmp_path / "runs" / "none"
    said = refused(capfd, fit(tiny_folder, "kto", data, run_dir, "--ckpt_path=last"))
    assert f"{run_dir}/checkpoints/last.ckpt does not exist" in said
    assert not run_dir.parent.exists()
    said = refused(capfd, fit(tiny_folder, "kto", data, run_dir, f"--ckpt_path={tmp_path}/some.ckpt"))
    assert f"{tmp_path}/some.ckpt does not exist" in said
    assert not run_dir.parent.exists()


def test_a_kill_while_the_first_checkpoint_is_written(runs, capfd):
    killed = runs.killed("kto", 1, "writing")
    said = refused(capfd, [*runs.words("kto", killed, ()), "--ckpt_path=last"])
    assert f"{killed}/checkpoints/last.ckpt does not exist" in said


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder) -> tuple[Path, list[str]]:
    """A finished run of 3 steps, and the words that made it."""
    folder = tmp_path_factory.mktemp("finished")
    words = fit(tiny_folder, "kto", binary_data(folder / "data.jsonl"), folder / "run")
    main(words)
    return folder / "run", words


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--data.train={other}", "training data"),
        ("--data.batch_size=3", "batch_size (saved 4, now 3)"),
        ("--data.seed=1", "seed (saved 0, now 1)"),
    ],
)
def test_going_on_with_other_data_or_batches_is_an_error(finished, tmp_path, capfd, change, named):
    run_dir, words = finished
    before = contents(run_dir)
    other = binary_data(tmp_path / "other.jsonl", seed=1)
    change = change.format(other=other, root=Path(__file__).resolve().parents[1])
    said = refused(capfd, [*words, "--ckpt_path=last", change])
    assert "other data or batches" in said
    assert named in said
    after = contents(run_dir)
    # The config has a test of its own, below.
    assert after | {"config.yaml": b""} == before | {"config.yaml": b""}


def test_a_refused_resumption_leaves_the_config_alone(finished, tmp_path, capfd):
    source, words = finished
    run_dir = tmp_path / "x"
    shutil.copytree(source, run_dir)
    refused(capfd, [*words, f"--run_dir={run_dir}", "--ckpt_path=last", "--data.batch_size=3"])
    assert contents(run_dir) == contents(source)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--config={root}/experiments/objectives/bco.yaml", "model.reference_point"),
        ("--config={root}/experiments/objectives/kto_no_reference_model.yaml", "model.reward"),
        ("--model.policy.lora={{r: 2}}", "model.policy.lora"),
    ],
)
def test_going_on_with_another_state_is_an_error(finished, tmp_path, capfd, change, named):
    source, words = finished
    run_dir = tmp_path / "x"
    shutil.copytree(source, run_dir)
    change = change.format(root=Path(__file__).resolve().parents[1])
    said = refused(capfd, [*words, f"--run_dir={run_dir}", "--ckpt_path=last", change])
    assert "last.ckpt" in said
    assert named in said


def test_the_same_data_under_another_name_are_the_same(finished, tmp_path):
    run_dir, words = finished
    again = tmp_path / "run"
    shutil.copytree(run_dir, again)
    shutil.copy(run_dir.parent / "data.jsonl", tmp_path / "renamed.jsonl")
    data = f"--data.train={tmp_path}/renamed.jsonl"
    main([*words, f"--run_dir={again}", data, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert [row["step"] for row in metrics(again)] == list("012345")


def _hold(folder: Path, held: Any) -> None:
    """Claims a folder as a fit does, until it is killed."""
    lock = RunLock(folder, "fit")  # the lock ends with this object
    lock.take()
    held.set()
    time.sleep(600)


def test_two_fits_do_not_write_to_one_folder(finished, tmp_path, capfd):
    """The second would move the first one's folder aside, and each would write into the other's."""
    source, words = finished
    shutil.copytree(source, tmp_path / "x")
    forked = multiprocessing.get_context("fork")  # a new interpreter would take seconds to import halos_pl
    held = forked.Event()
    other = forked.Process(target=_hold, args=(tmp_path / "x", held), daemon=True)
    other.start()
    assert held.wait(60)
    before = contents(tmp_path / "x")
    with pytest.raises(SystemExit):
        main([*words, f"--run_dir={tmp_path / 'x'}"])
    assert f"another halos fit is writing to {tmp_path / 'x'}" in capfd.readouterr().err
    assert contents(tmp_path / "x") == before
    other.kill()
    other.join()
    main([*words, f"--run_dir={tmp_path / 'x'}", "--trainer.max_steps=1"])
    assert (tmp_path / "x.1").is_dir()


def test_a_new_fit_moves_the_old_run_aside(finished, tmp_path):
    """Once, and once more; nothing is lost."""
    source, words = finished
    run_dir = tmp_path / "runs" / "x"
    shutil.copytree(source, run_dir)
    (run_dir / "notes.txt").write_text("mine")
    first = contents(run_dir)
    main([*words, f"--run_dir={run_dir}", "--trainer.max_steps=1"])
    assert contents(run_dir.with_name("x.1")) == first
    second = contents(run_dir)
    assert len(metrics(run_dir)) == 1
    main([*words, f"--run_dir={run_dir}", "--trainer.max_steps=2"])
    assert contents(run_dir.with_name("x.1")) == first
    assert contents(run_dir.with_name("x.2")) == second
    assert len(metrics(run_dir)) == 2
    assert sorted(p.name for p in run_dir.parent.iterdir()) == ["x", "x.1", "x.2"]


def test_a_refused_fit_leaves_the_old_run_in_its_place(finished, tmp_path, capfd):
    source, words = finished
    run_dir = tmp_path / "runs" / "x"
    shutil.copytree(source, run_dir)
    before = contents(run_dir)
    refused(capfd, [*words, f"--run_dir={run_dir}", f"--data.train={tmp_path}/none.jsonl"])
    assert [p.name for p in run_dir.parent.iterdir()] == ["x"]
    assert contents(run_dir) == before


def test_a_leftover_of_a_kill_does_not_disturb(finished, tmp_path):
    source, words = finished
    run_dir = tmp_path / "x"
    shutil.copytree(source, run_dir)
    for part in ("checkpoints/last.ckpt.part", part_of(run_dir / "metrics.csv").name):
        (run_dir / part).write_bytes(b"half of it")
    main([*words, f"--run_dir={run_dir}", "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert [row["step"] for row in metrics(run_dir)] == list("012345")
    assert not [p for p in run_dir.rglob("*.part")]


def test_the_config_of_a_resumed_run_begins_a_new_one(finished, tmp_path):
    source, words = finished
    run_dir = tmp_path / "x"
    shutil.copytree(source, run_dir)
    main([*words, f"--run_dir={run_dir}", "--ckpt_path=last", "--trainer.max_epochs=2"])
    main(["fit", f"--config={run_dir}/config.yaml", f"--run_dir={tmp_path}/y"])
    assert [row["step"] for row in metrics(tmp_path / "y")] == [row["step"] for row in metrics(run_dir)]
    assert metrics(tmp_path / "y")[0] == metrics(run_dir)[0]


# -- what a checkpoint holds ----------------------------------------------------------------------------


def test_the_frozen_reference_is_not_in_the_checkpoint(finished, tiny_folder):
    from transformers import AutoModelForCausalLM

    run_dir, _ = finished
    saved = checkpoint(run_dir)["state_dict"]  # torch.load(weights_only=True)
    policy = AutoModelForCausalLM.from_pretrained(tiny_folder)
    # A tied weight may be there once; nothing is there that is not the policy's.
    assert saved.keys() <= {f"scorer.model.{name}" for name in policy.state_dict()}
    assert saved.keys() >= {f"scorer.model.{name}" for name, _ in policy.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_base_weights_are_not_in_the_checkpoint(tiny_folder, tmp_path, tied):
    data = binary_data(tmp_path / "data.jsonl")
    options = ("--model.policy.lora={r: 2}", "--trainer.max_steps=1")
    folder = tiny_folder
    if tied:  # one weight has two names
        folder = shutil.copytree(tiny_folder, tmp_path / "tied")
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    main(fit(folder, "bco", data, tmp_path / "run", *options))
    saved = checkpoint(tmp_path / "run")["state_dict"]
    assert all("lora_" in name for name in saved if name.startswith("scorer."))
    assert {name for name in saved if not name.startswith("scorer.")} == {
        "objective.reference_point._extra_state",
    }
    assert sum("lora_" in name for name in saved) == 2 * 2 * 7  # A and B of 7 layers in each of 2 blocks


def test_a_line_of_metrics_that_was_cut_off_is_dropped_with_those_after_the_checkpoint(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss,step,z0\n1.0,0,0.5\n0.9,1,0.4\n0.8")
    logger = RunCSVLogger(str(tmp_path))
    logger.drop_from(1)
    assert [(row["loss"], row["step"]) for row in metrics(tmp_path)] == [("1.0", "0")]
    logger.log_metrics({"loss": 0.7, "val/loss": 0.6}, step=1)  # a new column: the file is written anew
    logger.save()
    assert [row.get("val/loss") for row in metrics(tmp_path)] == [None, "0.6"]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.csv"]


@pytest.mark.slow
def test_a_log_that_is_gone_is_said(finished, tmp_path):
    source, words = finished
    run_dir = tmp_path / "x"
    shutil.copytree(source, run_dir)
    (run_dir / "metrics.csv").unlink()
    with pytest.warns(UserWarning, match=rf"{run_dir}/metrics.csv has no lines for steps 0 to 2"):
        main([*words, f"--run_dir={run_dir}", "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert [row["step"] for row in metrics(run_dir)] == list("345")


DAMAGED_LINES = {
    "a zero byte": (lambda lines: [lines[0], b"\0" + lines[1], *lines[2:]], "line 2"),
    "no text": (lambda lines: [*lines[:2], b"\xe9" + lines[2], *lines[3:]], "line 3"),
    "more columns than names": (lambda lines: [lines[0], b"1,2,3," * 40 + b"\r\n", *lines[1:]], "line 2"),
    "cut off in its last number": (lambda lines: [*lines[:-1], lines[-1][:-4]], "line 4"),
    "no names": (lambda lines: lines[1:], "line 1"),
    "a binary file": (lambda lines: [b"\xff\xfe\0\1\r\n" * 40], "line 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_damaged_lines_of_metrics_are_dropped_and_named(finished, tmp_path, damage):
    source, words = finished
    run_dir, (change, place) = tmp_path / "x", DAMAGED_LINES[damage]
    shutil.copytree(source, run_dir)
    before = metrics(run_dir)
    path = run_dir / "metrics.csv"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.warns(UserWarning, match=rf"{path} is damaged at {place}"):
        main([*words, f"--run_dir={run_dir}", "--ckpt_path=last", "--trainer.max_epochs=2"])
    after = metrics(run_dir)
    assert [row["step"] for row in after][-3:] == list("345")
    assert all(row in before for row in after[:-3])
