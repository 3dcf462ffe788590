"""What is no number stops a run, and reaches no file or logger.

Held-out figures of a diverged policy were missing without a word, AUROC was computed of NaN rewards, and ``predict``
wrote NaN. A negative clipping value, which Lightning takes for none, let a loss rise. trl#1476: NaN in the logs of
steps that lack a class of rows.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from policy_steps import batch, module
from run_halos import binary_data, fit, quiet_trainer, refused
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.batch import TokenBatch
from halos_pl.cli.main import main
from halos_pl.policy.finite import FiniteLogits
from halos_pl.policy.sampling import generate
from halos_pl.policy.spec import ModelError
from halos_pl.training.module import HALOModule
from halos_pl.training.non_finite import NonFiniteLossError, non_finite

TOKEN = 299  # in one row of the batch below, and nowhere else


def held_out() -> TokenBatch:
    rows = batch()
    for tokens in (*rows.prompts, *rows.completions):
        tokens[tokens == TOKEN] = 5
    # Also the one of a mismatched row: its log-probs make the reference point no number.
    rows.completions[3] = rows.completions[7] = torch.tensor([7, TOKEN, 9])
    return rows


class Break(Callback):
    """Puts ``value`` into the embedding of one token, before anything is measured."""

    def __init__(self, value: float) -> None:
        self.value = value

    def _break(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        with torch.no_grad():
            pl_module.policy.get_input_embeddings().weight[TOKEN] = self.value

    on_validation_start = on_test_start = on_predict_start = _break  # type: ignore[assignment]


def made(**options: Any) -> Any:
    return quiet_trainer(**{"max_epochs": 1, **options})


def loader(*batches: TokenBatch) -> Any:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("command", "value", "objective"),
    [
        ("validate", math.nan, "kto"),
        ("test", math.inf, "dpo"),
        ("predict", -math.inf, "kto"),
        *(
            pytest.param(command, value, objective, marks=pytest.mark.slow)
            for command in ("validate", "test", "predict")
            for value in (math.nan, math.inf)
            for objective in ("bco", "dpo")
        ),
    ],
)
def test_held_out_figures_that_are_not_finite_raise_and_name_the_row(tiny_folder, command, value, objective):
    model = module(tiny_folder, objective, prefix_sharing="never")
    trainer = made(callbacks=[Break(value)])
    with pytest.raises(NonFiniteLossError) as caught:
        getattr(trainer, command)(model, loader(held_out()))
    (named,) = (line for line in str(caught.value).splitlines() if line.startswith("rows with"))
    assert named.split(": ", 1)[1] == "file:3"
    assert not [key for key in trainer.callback_metrics if "auroc" in key]
    # A policy that is whole again has figures, without a trace of what came before.
    figures = made().validate(module(tiny_folder, objective, prefix_sharing="never"), loader(held_out()), verbose=False)
    assert all(map(math.isfinite, figures[0].values()))


@pytest.mark.filterwarnings("ignore")
def test_they_raise_within_a_fit_as_well(tiny_folder):
    trainer = made(callbacks=[Break(math.nan)])
    with pytest.raises(NonFiniteLossError, match="file:3"):
        trainer.fit(module(tiny_folder, prefix_sharing="never", lr=1e-3), loader(batch()), loader(held_out()))


@pytest.mark.slow
def test_the_figures_of_a_diverged_policy_are_an_error_of_each_command(tiny_folder, tmp_path, capfd):
    data = binary_data(tmp_path / "data.jsonl")
    words = fit(tiny_folder, "kto", data, tmp_path / "run", f"--data.test={data}", f"--data.predict={data}")
    main(words)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["scorer.model.model.norm.weight"].fill_(math.nan)
    torch.save(checkpoint, path)
    for command in ("test", "predict"):
        assert "data.jsonl:1" in refused(capfd, [command, *words[1:]])
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


# -- clipping -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("ranks", "named"), [(1, ": a.jsonl:3"), (2, " on rank 1: a.jsonl:3")])
def test_rows_of_a_rank_are_not_called_those_of_the_whole_step(training: bool, ranks: int, named: str) -> None:
    trainer = SimpleNamespace(world_size=ranks, global_rank=ranks - 1, ckpt_path=None, checkpoint_callbacks=[])
    module = SimpleNamespace(global_step=0, training=training, trainer=trainer)
    of = "step" if training else "batch"
    assert f"rows of the {of}{named}" in str(non_finite(module, "the loss is nan", ["a.jsonl:3"]))


@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan, -math.inf])
def test_clipping_that_would_be_none_is_refused(tiny_folder, value):
    for algorithm in ("norm", "value"):
        with pytest.raises(ValueError, match=r"trainer\.gradient_clip_val"):
            made(gradient_clip_val=value, gradient_clip_algorithm=algorithm).fit(module(tiny_folder), loader(batch()))


class Clip(Callback):
    def __init__(self, **values: Any) -> None:
        self.values = values

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        for name, value in self.values.items():
            setattr(trainer, name, value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("values", [{"gradient_clip_val": -1.0}, {"gradient_clip_algorithm": "both"}])
def test_clipping_that_a_callback_sets_is_looked_at(tiny_folder, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        made(gradient_clip_val=1.0, callbacks=[Clip(**values)]).fit(module(tiny_folder), loader(batch()))


@pytest.mark.filterwarnings("ignore")
def test_zero_and_infinity_do_not_clip(tiny_folder):
    found = []
    for value in (None, 0, math.inf):
        model = module(tiny_folder, lr=0.1)
        made(gradient_clip_val=value).fit(model, loader(batch()))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# -- loggers --------------------------------------------------------------------------------------------


class Kept(Logger):
    """A logger of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    name = version = "kept"  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step or 0, dict(metrics)))


class Bar(TQDMProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        self.shown.append(self.get_metrics(trainer, pl_module))


def one_class(desirable: bool) -> TokenBatch:
    rows = batch(mismatched=True)
    return rows.select(
        torch.tensor(
            [i for i in range(len(rows)) if rows.labels.desirable[i] == desirable or rows.labels.mismatched[i]]
        )
    )


@pytest.mark.filterwarnings("ignore")
def test_a_class_that_a_step_lacks_is_neither_nan_nor_an_older_value(tiny_folder):
    loggers, bar = [Kept(), Kept()], Bar()
    model: HALOModule = module(tiny_folder, lr=1e-3)
    trainer = made(logger=loggers, callbacks=[bar], enable_progress_bar=True, log_every_n_steps=1)
    trainer.fit(model, loader(batch(), one_class(True), one_class(False), batch()))
    for logger in loggers:
        lines = [line for _, line in logger.lines if "loss" in line]
        assert [("rewards/chosen" in line, "rewards/rejected" in line) for line in lines] == [
            (True, True),
            (True, False),
            (False, True),
            (True, True),
        ]
        assert all(value == value for line in lines for value in line.values())
    assert ["rewards/margins" in shown for shown in bar.shown] == [True, False, False, True]


def test_a_prediction_that_json_does_not_know_is_not_written(tmp_path: Path):
    from types import SimpleNamespace

    from halos_pl.training.callbacks import PredictionWriter

    trainer: Any = SimpleNamespace(default_root_dir=str(tmp_path), global_rank=0)
    with pytest.raises(ValueError, match="JSON"):
        PredictionWriter().write_on_batch_end(trainer, None, [{"r": math.nan}], None, None, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_sampled_from_what_is_no_number(tiny_folder: Path, value: float, temperature: float) -> None:
    """Greedy decoding took a token of it, and torch's sampler died without naming the prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    token = tokenizer("Z", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = value
    prompts = ["a b", "a Z b"]
    with pytest.raises(ModelError, match="of:2"):
        generate(model, tokenizer, prompts, max_new_tokens=2, temperature=temperature, names=["of:1", "of:2"])


def test_what_follows_an_answer_does_not_count() -> None:
    """A row that has ended goes on in the batch; so do its logits."""
    scores = torch.tensor([[math.nan, 0.0], [0.0, 1.0]])
    check = FiniteLogits(["a", "b"], start=1, ends=[1])
    assert check(torch.tensor([[0, 1], [0, 0]]), scores) is scores
    with pytest.raises(ModelError, match="a:"):
        check(torch.tensor([[1, 0], [0, 0]]), scores)
    check(torch.tensor([[0], [0]]), torch.tensor([[-math.inf, 0.0], [0.0, 1.0]]))
