"""A resumed run takes its settings, or refuses them by name with both values.

Lightning#12118, pytorch/examples#816: after a resumption with another learning rate the old one went on, under a
config.yaml that said the new one; another beta was taken without a word.
"""

from __future__ import annotations

import csv
import json
import shutil
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.states import TrainerFn
from run_halos import binary_data, fit, quiet_trainer, refused
from torch import Tensor, nn

from halos_pl.cli.main import main
from halos_pl.objective.feedback import Binary
from halos_pl.objective.halo import HALO
from halos_pl.objective.reference_points import MismatchedKL, RunningMean
from halos_pl.objective.rewards import LogRatio
from halos_pl.policy.loading import LoRASpec, ModelSpec
from halos_pl.policy.moving_reference import PastPolicies, SyncedCopy
from halos_pl.policy.reference import FrozenCopy
from halos_pl.training.module import HALOModule
from halos_pl.training.optim import Change, Schedule, guard
from halos_pl.training.resume import KeepSettings
from halos_pl.training.settings import described
from value_functions import Identity, Logistic, LogSigmoid, ValueFunction

# -- the optimizer and its schedule ---------------------------------------------------------------------

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


class Run:
    """Ten steps of an optimizer on one weight, or what is left of them."""

    def __init__(
        self, kind: Any = torch.optim.AdamW, *, name: str = "linear", warmup: int = 2, steps: int = 10, **options: Any
    ) -> None:
        self.weight = nn.Parameter(torch.ones(3))
        self.optimizer = kind([self.weight], **options)
        self.changes: list[Change] = []
        guard(self.optimizer, self.changes.extend)
        self.schedule = Schedule(self.optimizer, name, warmup_steps=warmup, steps=steps)

    def go(self, number: int) -> list[float]:
        """The learning rates of the steps that it takes."""
        used = []
        for _ in range(number):
            used.append(float(self.optimizer.param_groups[0]["lr"]))
            self.weight.grad = torch.ones(3)
            self.optimizer.step()
            self.schedule.step()
        return used

    def saved(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.optimizer.state_dict(), self.schedule.state_dict()

    def resume(self, saved: tuple[dict[str, Any], dict[str, Any]]) -> Run:
        self.optimizer.load_state_dict(saved[0])
        self.schedule.load_state_dict(saved[1])
        return self


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(
    "change", [{}, {"lr": 1e-5}, {"warmup": 6}, {"name": "cosine"}, {"name": "linear"}, {"steps": 14}]
)
@pytest.mark.parametrize("at", [1, 4, 10])
def test_each_step_has_the_learning_rate_of_a_run_with_the_new_settings(name, change, at):
    before = {**ADAMW, "name": name}
    first, whole, rest = Run(**before), Run(**{**before, **change}), Run(**{**before, **change})
    first.go(at)
    expected = whole.go(14)[at:]
    assert rest.resume(first.saved()).go(14 - at) == expected
    assert rest.schedule.get_last_lr() == whole.schedule.get_last_lr()


def test_a_learning_rate_that_is_a_tensor():
    first, rest = (Run(lr=torch.tensor(lr)) for lr in (0.5, 0.25))
    first.go(4)
    assert rest.resume(first.saved()).go(1) == [0.25 * 6 / 8]
    assert isinstance(rest.optimizer.param_groups[0]["lr"], Tensor)


def test_an_unchanged_optimizer_goes_on_bit_by_bit():
    whole, first, rest = (Run(**ADAMW) for _ in range(3))
    whole.go(10)
    first.go(4)
    rest.weight.data = first.weight.data.clone()
    rest.resume(first.saved()).go(6)
    assert rest.changes == []
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize(
    ("kind", "before", "now", "key"),
    [
        (torch.optim.AdamW, ADAMW, {"weight_decay": 0.0}, "weight_decay"),
        (torch.optim.AdamW, ADAMW, {"betas": (0.5, 0.99)}, "betas"),
        (torch.optim.AdamW, ADAMW, {"eps": 1e-6}, "eps"),
        (torch.optim.AdamW, ADAMW, {"fused": True}, "fused"),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"momentum": 0.8}, "momentum"),
        (torch.optim.RMSprop, {"lr": 0.1}, {"alpha": 0.9}, "alpha"),
    ],
)
def test_a_setting_of_the_optimizer_takes_effect_and_is_told(kind, before, now, key):
    first, rest = Run(kind, **before), Run(kind, **{**before, **now})
    first.go(3)
    rest.resume(first.saved())
    assert rest.optimizer.param_groups[0][key] == now[key]
    assert [change.key for change in rest.changes] == [f"model.optimizer.{key}"]
    rest.go(1)


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ((torch.optim.Adam, {"lr": 0.1}), (torch.optim.AdamW, {"lr": 0.1}), "Adam"),
        ((torch.optim.AdamW, {"lr": 0.1}), (torch.optim.NAdam, {"lr": 0.1}), "NAdam"),
        ((torch.optim.AdamW, {"lr": 0.1}), (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}), "amsgrad"),
        ((torch.optim.SGD, {"lr": 0.1}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "momentum"),
        ((torch.optim.RMSprop, {"lr": 0.1}), (torch.optim.RMSprop, {"lr": 0.1, "centered": True}), "centered"),
        ((torch.optim.SGD, {"lr": 0.1}), (torch.optim.SGD, {"lr": 0.1, "maximize": True}), "maximize"),
    ],
)
def test_another_optimizer_is_refused(one, other, named):
    first, rest = (Run(kind, **options) for kind, options in (one, other))
    first.go(2)
    with pytest.raises(ValueError, match=named):
        rest.resume(first.saved())


def test_a_checkpoint_from_before_the_settings_were_kept():
    first = Run(**ADAMW)
    first.go(3)
    optimizer, schedule = first.saved()
    older = {k: v for k, v in optimizer.items() if k not in ("class", "settings")}, {**schedule}
    older[1].pop("shape")
    rest = Run(**{**ADAMW, "lr": 1e-5})
    whole = Run(**{**ADAMW, "lr": 1e-5})
    assert rest.resume(older).go(3) == whole.go(6)[3:]
    assert [change.key for change in rest.changes] == ["model.optimizer.lr"]
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        Run(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1).resume(older)


class Counting(torch.optim.SGD):
    """Keeps state among its settings, as Prodigy and schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["k"] = 0

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["k"] += 1
        return super().step(closure)


def test_what_an_optimizer_keeps_among_its_settings_is_state():
    first, rest = Run(Counting, lr=0.1), Run(Counting, lr=0.2)
    first.go(3)
    rest.resume(first.saved())
    assert rest.optimizer.param_groups[0]["k"] == 3
    assert [change.key for change in rest.changes] == ["model.optimizer.lr"]


# -- the module -----------------------------------------------------------------------------------------


class Hidden(ValueFunction):
    """Keeps its arguments under other names."""

    def __init__(self, *, width: float = 1.0, table: tuple[float, ...] = (1.0, 2.0)) -> None:
        super().__init__()
        self._w = 2 * width
        self.register_buffer("entries", torch.tensor(table))

    def forward(self, u: Tensor) -> Tensor:
        return self._w * u


def kto(**changes: Any) -> HALOModule:
    parts: dict[str, Any] = {
        "policy": ModelSpec("somewhere"),
        "reward": LogRatio(),
        "reference_point": MismatchedKL(),
        "value_function": Logistic(beta=0.1),
        "feedback": Binary(),
        "reflect_undesirable": True,
        "loss_offset": 1.0,
    }
    return HALOModule(**{**parts, **changes})


def trainer(**options: Any) -> Trainer:
    made: Trainer = quiet_trainer(**options)
    made.state.fn = TrainerFn.FITTING
    return made


def compare(before: HALOModule, now: HALOModule, of: Trainer | None = None, to: Trainer | None = None) -> None:
    saved = {"settings": before.record.state(of or trainer())}
    now.record.compare(saved, to or trainer(), start_matters=True)


def extra(weight: float) -> list[Any]:
    halo = HALO(
        reward=LogRatio(),
        reference_point=MismatchedKL(),
        value_function=LogSigmoid(beta=weight),
        feedback=Binary(),
        reflect_undesirable=False,
    )
    return [halo]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("before", "now", "key", "values"),
    [
        ({}, {"value_function": Logistic(beta=5.0)}, "model.value_function.beta", ("0.1", "5.0")),
        ({}, {"value_function": Identity(beta=0.1)}, "model.value_function", ("Logistic", "Identity")),
        ({}, {"reward": LogRatio(length_normalised=True)}, "model.reward.length_normalised", ("False", "True")),
        ({}, {"feedback": Binary(lambda_undesirable=2.0)}, "model.feedback.lambda_undesirable", ("1.0", "2.0")),
        ({}, {"feedback": Binary(denominator="tokens")}, "model.feedback.denominator", ("rows", "tokens")),
        ({}, {"reflect_undesirable": False}, "model.reflect_undesirable", ("True", "False")),
        ({}, {"loss_offset": 0.0}, "model.loss_offset", ("1.0", "0.0")),
        ({}, {"reference_point": RunningMean()}, "model.reference_point", ("MismatchedKL", "RunningMean")),
        (
            {"reference_point": RunningMean(of=MismatchedKL())},
            {"reference_point": RunningMean(of=MismatchedKL(clamp=False))},
            "model.reference_point.of.clamp",
            ("True", "False"),
        ),
        ({"extra_terms": extra(0.1)}, {"extra_terms": extra(0.2)}, "model.extra_terms.0", ("0.1", "0.2")),
        ({"extra_terms": extra(0.1)}, {"extra_terms": []}, "model.extra_terms", ("HALO", "null")),
        (
            {"reference_model": SyncedCopy(every=2)},
            {"reference_model": SyncedCopy(every=3)},
            "model.reference_model.every",
            ("2", "3"),
        ),
        (
            {"reference_model": PastPolicies(every=2, keep=2, start=0.5)},
            {"reference_model": PastPolicies(every=2, keep=3, start=0.5)},
            "model.reference_model.keep",
            ("2", "3"),
        ),
        ({}, {"policy": ModelSpec("somewhere", dtype="bfloat16")}, "model.policy.dtype", ("float32", "bfloat16")),
        ({}, {"policy": ModelSpec("somewhere", dropout=True)}, "model.policy.dropout", ("False", "True")),
        ({}, {"policy": ModelSpec("somewhere", lora=LoRASpec())}, "model.policy.lora", ("null", "LoRASpec")),
        (
            {"policy": ModelSpec("somewhere", lora=LoRASpec())},
            {"policy": ModelSpec("somewhere", lora=LoRASpec(alpha=8))},
            "model.policy.lora.alpha",
            ("32", "8"),
        ),
        ({"value_function": Hidden()}, {"value_function": Hidden(width=2.0)}, "value_function._w", ("2.0", "4.0")),
        ({"value_function": Hidden()}, {"value_function": Hidden(table=(1.0, 3.0))}, "entries", ("2.0", "3.0")),
    ],
)
def test_what_makes_another_loss_or_model_is_refused(before, now, key, values):
    with pytest.raises(ValueError, match="trained with other settings") as caught:
        compare(kto(**before), kto(**now))
    said = str(caught.value)
    assert key in said
    assert all(value in said for value in values)
    assert "\n" not in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("now", "key"),
    [
        ({"prefix_sharing": "never"}, "model.prefix_sharing"),
        ({"micro_batch_rows": 2}, "model.micro_batch_rows"),
        ({"lr_schedule": "cosine"}, "model.lr_schedule"),
        ({"warmup_ratio": 0.5}, "model.warmup_ratio"),
        ({"master_weights": False}, "model.master_weights"),
        ({"policy": ModelSpec("somewhere", gradient_checkpointing=True)}, "model.policy.gradient_checkpointing"),
        ({"policy": ModelSpec("somewhere", attn_implementation="eager")}, "model.policy.attn_implementation"),
        ({"policy": ModelSpec("elsewhere")}, "model.policy.path"),
    ],
)
def test_what_may_change_is_noted(now, key):
    module = kto(**now)
    compare(kto(), module)
    assert [change.key for change in module.record.changes] == [key]
    # Said the same in another way, nothing has changed.
    module = kto(reference_model=FrozenCopy(), extra_terms=[])
    compare(kto(), module)
    assert module.record.changes == []


@pytest.mark.filterwarnings("ignore")
def test_settings_of_the_trainer():
    with pytest.raises(ValueError, match=r"trainer\.precision is bf16-mixed, and was 32-true"):
        compare(kto(), kto(), to=trainer(precision="bf16-mixed"))
    module = kto()
    compare(kto(), module, to=trainer(max_steps=7, gradient_clip_val=0.5))
    assert {c.key: (c.before, c.now) for c in module.record.changes} == {
        "trainer.max_steps": (-1, 7),
        "trainer.gradient_clip_val": (None, 0.5),
    }


@pytest.mark.filterwarnings("ignore")
def test_other_weights_under_the_same_name_are_refused():
    """They are the reference still, though the policy's come from the checkpoint."""
    before, now = kto(), kto()
    before.record.start, now.record.start = torch.linspace(0, 1, 1000), torch.linspace(0, 1, 1000) * 1.01
    with pytest.raises(ValueError, match=r"model\.policy\.path"):
        compare(before, now)
    now.record.start = before.record.start * (1 + 1e-6)  # an adapter that was merged on another machine
    compare(before, now)


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_may_measure_with_another_objective(capfd):
    of, to = trainer(), trainer()
    to.state.fn = TrainerFn.TESTING
    compare(kto(), kto(value_function=Logistic(beta=5.0)), of, to)
    with pytest.raises(ValueError, match=r"model\.policy\.lora"):
        compare(kto(), kto(policy=ModelSpec("somewhere", lora=LoRASpec())), of, to)


@pytest.mark.filterwarnings("ignore")
def test_a_callback_whose_state_holds_its_arguments_keeps_those_of_this_run(tmp_path):
    """EarlyStopping's holds its patience, so another one was not used, under a config.yaml that said it."""

    def fit_with(patience: int, epochs: int, path: Path | None = None) -> Any:
        early = EarlyStopping("x", patience=patience, check_finite=False, strict=False)
        run = quiet_trainer(
            max_epochs=epochs,
            limit_train_batches=1,
            limit_val_batches=0,
            callbacks=[KeepSettings({}, "config.yaml"), early],
            default_root_dir=tmp_path,
        )
        run.fit(BoringModel(), ckpt_path=path)
        run.save_checkpoint(tmp_path / "some.ckpt")
        return early

    fit_with(2, 1)
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)["callbacks"]
    assert [state["patience"] for key, state in saved.items() if key.startswith("EarlyStopping")] == [2]
    assert fit_with(5, 2, tmp_path / "some.ckpt").patience == 5


# -- the command line -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("settings")
    words = fit(tiny_folder, "kto", binary_data(folder / "data.jsonl"), folder / "run")
    main([*words, "--model.lr_schedule=constant_with_warmup", "--model.warmup_ratio=0"])
    return SimpleNamespace(run=folder / "run", words=[*words, "--trainer.max_epochs=2", "--model.warmup_ratio=0"])


def resuming(finished: SimpleNamespace, folder: Path, *options: str) -> list[str]:
    """The words that resume a copy of the run."""
    shutil.copytree(finished.run, folder)
    return [*finished.words, f"--run_dir={folder}", "--ckpt_path=last", *options]


def test_another_learning_rate_is_used_said_and_kept(finished, tmp_path):
    schedule = "--model.lr_schedule=constant_with_warmup"
    monitor = "--trainer.callbacks+=LearningRateMonitor"
    run = tmp_path / "x"
    main(resuming(finished, run, schedule, "--model.optimizer.init_args.lr=1e-5", monitor))
    with (run / "metrics.csv").open() as file:
        used = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row.get("lr-AdamW")]
    assert used == [1e-5] * 3
    configs = [yaml.safe_load((run / name).read_text()) for name in ("config.yaml", "config.1.yaml")]
    assert [config["model"]["optimizer"]["init_args"]["lr"] for config in configs] == [1e-5, 1e-3]
    (change,) = json.loads((run / "summary.json").read_text())["resumed"]
    assert change["step"] == 3
    assert change["changed"]["model.optimizer.lr"] == [1e-3, 1e-5]
    assert change["changed"]["trainer.max_epochs"] == [1, 2]
    # It is kept by later resumptions, and not noted again.
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["settings"]
    assert [entry["step"] for entry in saved["history"]] == [3]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model.value_function.init_args.beta=5.0", "model.value_function.beta is 5.0, and was 0.1"),
        pytest.param("--trainer.precision=bf16-mixed", "trainer.precision", marks=pytest.mark.slow),
        pytest.param("--seed_everything=3", "seed_everything", marks=pytest.mark.slow),
        pytest.param("--data.max_length=9", "data.max_length: 1024 -> 9", marks=pytest.mark.slow),
        ("--trainer.max_steps=2", "trainer.max_steps is 2"),
        pytest.param(
            "--data.transforms=[{class_path: FlipLabels, init_args: {share: 0.4}}]",
            "data.transforms",
            marks=pytest.mark.slow,
        ),
        pytest.param("--data.control_tokens={desirable: a, undesirable: b}", "training data", marks=pytest.mark.slow),
        pytest.param(
            "--model.optimizer={class_path: torch.optim.Adam, init_args: {lr: 1e-3}}",
            "model.optimizer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_change_that_is_refused_leaves_the_run_as_it_was(finished, tmp_path, capfd, option, named):
    said = refused(capfd, resuming(finished, tmp_path / "x", option))
    assert named in said
    assert len(said) < 700
    for name in ("config.yaml", "metrics.csv", "summary.json"):
        assert (tmp_path / "x" / name).read_bytes() == (finished.run / name).read_bytes()


@pytest.mark.slow
def test_an_older_checkpoint_is_compared_with_its_config(finished, tmp_path, capfd):
    older = SimpleNamespace(run=tmp_path / "older", words=finished.words)
    shutil.copytree(finished.run, older.run)
    path = older.run / "checkpoints" / "last.ckpt"
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != "settings"}, path)
    said = refused(capfd, resuming(older, tmp_path / "x", "--model.value_function.init_args.beta=5.0"))
    assert "model.value_function.beta is 5.0, and was 0.1" in said
    main(resuming(older, tmp_path / "y"))


@pytest.mark.parametrize(
    ("value", "told"), [(1.0, "1.0"), (1, "1"), (0.1 + 0.2, "0.3"), (2e-5, "2e-05"), (1e9, "1e+09"), (None, "null")]
)
def test_a_share_is_not_told_as_a_number_of_steps(value: Any, told: str) -> None:
    assert str(Change("trainer.limit_train_batches", 6, value)) == f"trainer.limit_train_batches: 6 -> {told}"


def test_settings_of_types_that_are_not_written_in_python_are_kept() -> None:
    """As of ``trainer.strategy {class_path: DDPStrategy}``, which has a timeout; a fit with it was refused."""
    assert described({"timeout": timedelta(minutes=30)}) == {"timeout": "0:30:00"}
    assert described(count())["class_path"] == "itertools.count"
