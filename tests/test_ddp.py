"""Two processes train as one does: the same figures and the same weights, whatever rows fall on which rank."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from run_halos import KILLED, ROOT, binary_data, fit, free_port, metrics, pair_data, run, run_ranks
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from halos_pl.batch import Needs
from halos_pl.objective.build import load_objective
from halos_pl.policy.loading import ModelSpec, load_tokenizer
from halos_pl.training.checks import check_replicas, check_trainer, refused_strategy

SGD = ("--model.optimizer.class_path=torch.optim.SGD", "--model.optimizer.init_args={lr: 1.0, weight_decay: 0.0}")
# The rate is 1 from the first step on and nothing is clipped: weights before minus after are the gradient.
GRADIENT = (
    *SGD,
    "--trainer.max_steps=1",
    "--model.warmup_ratio=0",
    "--model.lr_schedule=constant_with_warmup",
    "--trainer.gradient_clip_val=null",
)


def objective_needs(name: str) -> Needs:
    return load_objective(ROOT / "experiments" / "objectives" / f"{name}.yaml").needs


def labelled(path: Path, labels: list[bool]) -> Path:
    """Binary feedback with these labels, in this order."""
    lines = [json.loads(line) for line in binary_data(path, len(labels)).read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"label": y}) + "\n" for row, y in zip(lines, labels, strict=True)))
    return path


def weights(run_dir: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


class Both:
    """The same fit in one process and in two."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.number = itertools.count()
        self.binary = binary_data(folder / "binary.jsonl", 13)
        self.pairs = pair_data(folder / "pairs.jsonl", 13)
        self.triples = pair_data(folder / "triples.jsonl", 13, gold=True)

    def __call__(
        self, objective: str, data: Path, *options: str, one: tuple[str, ...] = (), two: tuple[str, ...] = ()
    ) -> tuple[Path, Path]:
        number = next(self.number)
        first, second = self.folder / f"{number}" / "one", self.folder / f"{number}" / "two"
        first.parent.mkdir()
        words = (*options, *one)
        ended = [run(fit(self.model, objective, data, first, *words), self.folder)]
        ended += run_ranks(fit(self.model, objective, data, second, *options, *two), self.folder)
        for each in ended:
            assert each.status == 0, each
        return first, second


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_folder) -> Both:
    return Both(tmp_path_factory.mktemp("ddp"), tiny_folder)


def assert_same_figures(one: Path, two: Path, rel: float = 1e-6, least: float = 2e-5) -> None:
    """Every figure of every logged step: equal names, equal but for float32's rounding of sums.

    A reward is the difference of two sums of about 100 nats, of which float32 keeps 7 digits.
    """
    a, b = metrics(one), metrics(two)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        got, wanted = ({k: float(v) for k, v in row.items()} for row in (y, x))
        assert got == pytest.approx(wanted, rel=rel, abs=least)


def assert_same_weights(one: Path, two: Path, least: float = 1e-6) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-6, atol=least, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("objective", "two"),
    [
        ("kto", ()),
        pytest.param("dpo", ("--model.micro_batch_rows=2",), marks=pytest.mark.slow),
        pytest.param("bco", ("--model.micro_batch_rows=1",), marks=pytest.mark.slow),
        pytest.param("tpo", ("--model.micro_batch_rows=2",), marks=pytest.mark.slow),  # with gold answers
        ("aot_unpaired", ("--model.micro_batch_rows=2",)),  # rows of one rank are matched with those of the other
        pytest.param("aot", ("--model.micro_batch_rows=2",), marks=pytest.mark.slow),
        pytest.param("grpo", ("--model.micro_batch_rows=1",), marks=pytest.mark.slow),
        pytest.param("tr_dpo", (), marks=pytest.mark.slow),
        pytest.param("mnpo", (), marks=pytest.mark.slow),
        pytest.param("real", ("--model.micro_batch_rows=1",), marks=pytest.mark.slow),
        pytest.param("csft", (), marks=pytest.mark.slow),
        pytest.param("unlikelihood", (), marks=pytest.mark.slow),
        pytest.param("kto", ("--model.micro_batch_rows=1",), marks=pytest.mark.slow),
        pytest.param("kto_log_sigmoid", (), marks=pytest.mark.slow),
        pytest.param("kto_no_reference_model", (), marks=pytest.mark.slow),
        pytest.param("kto_zero_reference", (), marks=pytest.mark.slow),
        pytest.param("kto_one_y_per_x", (), marks=pytest.mark.slow),
        pytest.param("sft", ("--model.micro_batch_rows=1",), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(both, objective, two):
    """13 examples in steps of 5, 5 and 3, so the ranks have different numbers of rows; a held-out batch of one pair."""
    needs = objective_needs(objective)
    pairs = both.triples if needs.gold else both.pairs
    data = pairs if needs.pairs else both.binary
    held_out = (f"--data.validation={pairs}", "--data.eval_batch_size=4")
    options = ("--data.batch_size=5", *held_out, *SGD, "--trainer.gradient_clip_val=0.1")
    one, two_ = both(objective, data, *options, two=two)
    assert_same_figures(one, two_)
    assert {"val/loss", "val/logps/chosen"} <= metrics(two_)[-1].keys()
    if objective_needs(objective).reference:
        assert {"val/rewards/auroc", "val/rewards/accuracies"} <= metrics(two_)[-1].keys()
    assert_same_weights(one, two_)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two_)]
    assert summaries[0]["data"] == summaries[1]["data"]
    assert summaries[0]["reference_rows"] == summaries[1]["reference_rows"]
    assert summaries[0]["trained"] == summaries[1]["trained"] is not None
    assert summaries[0]["metrics"].keys() == summaries[1]["metrics"].keys()


def test_two_processes_set_rho_as_one(both: Both) -> None:
    """A weight that follows earlier steps is the same on all ranks, and with micro-batches."""
    auto = ("--model.feedback.lambda_desirable=auto", "--model.feedback.rho=2", *SGD, "--data.batch_size=5")
    one, two = both("kto", both.binary, *auto, two=("--model.micro_batch_rows=2",))
    assert_same_figures(one, two)
    assert_same_weights(one, two)
    reached = [float(row["outcome/rho"]) for row in metrics(two) if "outcome/rho" in row]
    assert reached
    assert reached == pytest.approx([2.0] * len(reached), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kto", "dpo"])
def test_three_processes_train_as_one(both: Both, objective: str, tmp_path: Path) -> None:
    """Shares of one or two examples, which the ranks take by tokens."""
    data = both.pairs if objective == "dpo" else both.binary
    options = ("--data.batch_size=5", *SGD, "--trainer.gradient_clip_val=0.1")
    ended = [run(fit(both.model, objective, data, tmp_path / "one", *options), tmp_path)]
    ended += run_ranks(fit(both.model, objective, data, tmp_path / "three", *options), tmp_path, ranks=3)
    assert [each.status for each in ended] == [0] * 4
    assert_same_figures(tmp_path / "one", tmp_path / "three")
    assert_same_weights(tmp_path / "one", tmp_path / "three")


def test_the_load_of_experts_is_that_of_all_ranks(both: Both, tmp_path: Path) -> None:
    """RouterLoss multiplies two means over the tokens of the step; the mean of the ranks' products would differ."""
    tokenizer = load_tokenizer(ModelSpec(str(both.model)))
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**size, vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    of_experts = Both(tmp_path, tmp_path / "model")
    router = '--model.extra_terms=[{"class_path": "RouterLoss", "init_args": {"weight": 10.0}}]'
    options = (router, "--data.batch_size=5", *SGD, "--trainer.gradient_clip_val=0.1")
    one, two = of_experts("kto", both.binary, *options, two=("--model.micro_batch_rows=2",))
    assert_same_figures(one, two)
    assert_same_weights(one, two)


@pytest.mark.parametrize(
    ("objective", "labels"),
    [
        ("kto", "DUDUUDDD"),  # two rows a step, one on each rank: now one class is elsewhere, now it is nowhere
        pytest.param("bco", "DUUDUUDD", marks=pytest.mark.slow),
        pytest.param("kto", "DDDDDDDD", marks=pytest.mark.slow),
        pytest.param("kto", "UUUUUUUU", marks=pytest.mark.slow),
        pytest.param("kto with NLL", "UUDUUDUU", marks=pytest.mark.slow),
    ],
)
def test_a_rank_without_a_row_of_some_class(both, tmp_path, objective, labels):
    data = labelled(tmp_path / "data.jsonl", [label == "D" for label in labels])
    objective, _, extra = objective.partition(" with ")
    more = (f"--model.extra_terms=[{{class_path: {extra}}}]",) if extra else ()
    options = ("--data.batch_size=2", "--data.shuffle=false", *SGD, "--trainer.gradient_clip_val=0.1", *more)
    one, two = both(objective, data, *options)
    assert_same_figures(one, two)
    assert_same_weights(one, two)


@pytest.mark.parametrize(
    ("objective", "two"),
    [
        ("kto", ("--model.micro_batch_rows=1",)),
        pytest.param("kto", (), marks=pytest.mark.slow),
        pytest.param("dpo", (), marks=pytest.mark.slow),
        pytest.param("bco", ("--model.micro_batch_rows=2",), marks=pytest.mark.slow),
        pytest.param("sft", (), marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_that_of_one_process(both, objective, two):
    """Neither averaged over the ranks a second time nor summed twice: read off one step of SGD at rate 1."""
    from transformers import AutoModelForCausalLM

    data = both.pairs if objective == "dpo" else both.binary
    one, two_ = both(objective, data, "--data.batch_size=5", *GRADIENT, two=two)
    start = AutoModelForCausalLM.from_pretrained(both.model).state_dict()
    a, b = weights(one), weights(two_)
    policy = [name for name in a if name.startswith("scorer.")]
    gradient = {name: a[name] - start[name.removeprefix("scorer.model.")] for name in policy}
    size = max(float(g.abs().max()) for g in gradient.values())
    assert size > 1e-2
    for name in policy:
        other = b[name] - start[name.removeprefix("scorer.model.")]
        # Weights of about 1 hold their difference to 1e-7.
        torch.testing.assert_close(other, gradient[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_killed_fit_of_two_ranks_goes_on_exactly(both):
    """Both ranks' random states are kept; with dropout in the adapter they matter."""
    options = ("--model.policy.lora={r: 2, dropout: 0.2}", "--data.batch_size=4", "--checkpoint.every_n_steps=1")
    kill = "plugins.kill_at.KillAt"
    killing = (f"--trainer.callbacks+={kill}", "--trainer.callbacks.step=2", "--trainer.callbacks.moment=after_step")

    def ranks(name: str, *more: str) -> list[int]:
        ended = run_ranks(fit(both.model, "bco", both.binary, both.folder / name, *options, *more), both.folder)
        return [each.status for each in ended]

    assert ranks("whole") == [0, 0]
    assert ranks("parts", *killing) == [KILLED, KILLED]
    assert ranks("parts", "--ckpt_path=last") == [0, 0]
    whole, parts = both.folder / "whole", both.folder / "parts"
    assert metrics(parts) == metrics(whole)
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name] for name, x in a.items())


@pytest.mark.parametrize(
    ("strategy", "ranks", "pairs", "batch_size"),
    [
        ("ddp", 2, 13, 4),  # the last batch has one pair
        pytest.param("fsdp2", 2, 13, 4, marks=pytest.mark.slow),
        pytest.param("ddp", 3, 4, 2, marks=pytest.mark.slow),  # each batch has fewer pairs than there are ranks
        pytest.param("fsdp2", 3, 4, 2, marks=pytest.mark.slow),
        pytest.param("ddp", 2, 2, 1, marks=pytest.mark.slow),  # one rank never has a row
        pytest.param("fsdp2", 2, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_ranks_test_and_predict_like_one_process(both, tmp_path, strategy, ranks, pairs, batch_size):
    run_dir, data = tmp_path / "run", pair_data(tmp_path / "held_out.jsonl", pairs)
    options = (f"--data.test={data}", "--trainer.max_steps=1", f"--data.eval_batch_size={batch_size}")
    options += ("--model.micro_batch_rows=2", *SGD) if strategy == "fsdp2" else SGD
    assert run(fit(both.model, "kto", both.binary, run_dir, *options), tmp_path).status == 0
    results = []
    for together in (False, True):
        for command in ("test", "predict"):
            words = [command, f"--config={run_dir}/config.yaml", "--ckpt_path=last"]
            every = run_ranks(words, tmp_path, ranks, strategy) if together else [run(words, tmp_path)]
            for ended in every:
                assert ended.status == 0, ended
        predictions = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
        assert not list(run_dir.glob("predictions.jsonl.*"))
        results.append((json.loads((run_dir / "test.json").read_text()), predictions))
    (figures, rows), (figures_of_ranks, rows_of_ranks) = results
    assert {"test/loss", "test/kl/token", "test/outcome/z0"} <= figures.keys()
    assert figures_of_ranks == pytest.approx(figures, rel=1e-6, abs=2e-5)
    names = [f"{data}:{line}#{which}" for line in range(1, pairs + 1) for which in ("chosen", "rejected")]
    assert [row.pop("row") for row in rows] == names
    assert [row.pop("row") for row in rows_of_ranks] == names  # in the order of the data
    for one, other in zip(rows, rows_of_ranks, strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=2e-5)


@pytest.mark.slow
def test_the_command_starts_its_second_process_itself(both, tmp_path):
    words = fit(both.model, "kto", both.binary, tmp_path / "run", "--data.batch_size=5", "--trainer.devices=2")
    words.append("--trainer.strategy=ddp")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-m", "halos_pl", *words], env=env, cwd=tmp_path, timeout=120, check=False)
    assert ended.returncode == 0
    alone = run(fit(both.model, "kto", both.binary, tmp_path / "alone", "--data.batch_size=5"), tmp_path)
    assert alone.status == 0, alone
    assert_same_figures(tmp_path / "alone", tmp_path / "run")


def trainer_of(strategy: Any, world_size: int = 1) -> Any:
    return SimpleNamespace(
        callbacks=[],
        strategy=strategy,
        world_size=world_size,
        accumulate_grad_batches=1,
        gradient_clip_val=None,
        gradient_clip_algorithm=None,
    )


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_other_sharding_is_refused(kind):
    strategy: Any = kind.__new__(kind)  # each needs a GPU, or a package, to be made
    with pytest.raises(ValueError, match=f"{kind.__name__} is not supported.*Use fsdp2"):
        check_trainer(trainer_of(strategy))


@pytest.mark.parametrize(
    ("names", "way_out"),
    [
        ("fsdp fsdp_cpu_offload lightning.pytorch.strategies.FSDPStrategy", "fsdp2"),
        ("deepspeed deepspeed_stage_3_offload_nvme lightning.pytorch.strategies.DeepSpeedStrategy", "fsdp2"),
        ("tensor_parallel model_parallel lightning.pytorch.strategies.ModelParallelStrategy", "replicas"),
        ("context_parallel sequence_parallel cp", "micro_batch_rows"),
        ("ddp_spawn ddp_fork_find_unused_parameters_true ddp_notebook xla_debug", "Use ddp"),
    ],
)
def test_a_refused_strategy_is_named_with_the_way_out(names, way_out):
    for name in names.split():
        reason = refused_strategy(name)
        assert reason is not None
        assert name.rpartition(".")[2] in reason
        assert way_out in reason
        assert "\n" not in reason


@pytest.mark.parametrize(
    "name", ["fsdp2", "halos_pl.training.strategy.ShardedStrategy", "ddp", "auto", "single_device"]
)
def test_no_other_name_is_refused(name):
    assert refused_strategy(name) is None


@pytest.mark.parametrize(
    ("replicas", "ranks", "fits"),
    [(1, 1, True), (2, 8, True), (8, 8, True), (3, 8, False), (0, 2, False), (4, 2, False)],
)
def test_replicas_must_divide_the_number_of_ranks(replicas, ranks, fits):
    if fits:
        check_replicas(replicas, ranks)
    else:
        with pytest.raises(ValueError, match=f"replicas is {replicas}.*{ranks}"):
            check_replicas(replicas, ranks)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy("cpu"), DDPStrategy()])
def test_what_works_is_not_refused(strategy):
    check_trainer(trainer_of(strategy))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "micro"),
    [
        pytest.param("kto", 0, marks=pytest.mark.slow),
        ("kto", 1),
        pytest.param("dpo_forward_kl", 2, marks=pytest.mark.slow),
    ],
)
def test_a_plain_loop_steps_through_ddp(tmp_path, tiny_folder, objective, micro):
    """A wrapped scorer, and ranks with different numbers of micro-batches: gradients are exchanged once per step."""
    data = (pair_data if objective.startswith("dpo") else binary_data)(tmp_path / "data.jsonl", 5)
    port = str(free_port())
    words = [sys.executable, str(ROOT / "tests" / "ddp_loop.py"), str(tiny_folder), str(data)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    each = [
        subprocess.Popen([*words, rank, port, objective, str(micro)], cwd=tmp_path, env=env, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in each]
    for rank, (process, said) in enumerate(zip(each, errors, strict=True)):
        assert process.returncode == 0, said
        off, exchanges, _ = (tmp_path / f"rank.{rank}").read_text(encoding="utf-8").split()
        assert float(off) < 1e-4
        assert int(exchanges) == 1
