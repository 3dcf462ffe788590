"""Sharded over two ranks, a policy takes the same step as in one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_families import GROUPED, MODELS, SIZE
from run_halos import OBJECTIVES, binary_data, fit, metrics, pair_data, refused, run, run_ranks, write_data, write_jsonl
from sharded_steps import Case, compare, loading_peaks
from transformers import LlamaConfig, LlamaForCausalLM

from halos_pl.batch import Needs
from halos_pl.objective.build import load_objective
from halos_pl.policy.architecture import block_names
from halos_pl.testing import tiny_tokenizer
from halos_pl.training.checks import check_sharded
from halos_pl.training.strategy import ShardedStrategy

# A sum over tokens or ranks in another order.
ROUNDING = 1e-5
# In bfloat16, autocast and gathered weights round at different places.
HALF = 0.1
LORA: dict[str, Any] = {"lora": {"r": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, str]:
    """Folders of tiny random models by family."""
    tokenizer, folders = tiny_tokenizer(), {}
    for settings in (SIZE, GROUPED):
        pytest.MonkeyPatch().setitem(settings, "vocab_size", len(tokenizer))
    for name, make in MODELS.items():
        torch.manual_seed(0)
        path = folder / name.replace(", ", "-").replace(" ", "_")
        model: Any = make()
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        folders[name] = str(path)
    return folders


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, str]:
    return {"rows": str(binary_data(folder / "rows.jsonl", 13)), "pairs": str(pair_data(folder / "pairs.jsonl", 13))}


# Micro-batches of one row: one rank has three parts of the step, the other two.
SAMPLE: dict[str, dict[str, Any]] = {
    "tied, one row at a time": {"model": "llama, tied", "objective": "kto", "micro": 1},
    "pairs": {"model": "llama", "data": "pairs", "objective": "dpo"},
    "no plan of transformers": {"model": "gpt2", "objective": "kto"},
    "compared rows": {"model": "llama", "data": "pairs", "objective": "aot_unpaired", "micro": 2},
    "padded": {"model": "gpt-neox", "objective": "kto", "micro": 2, "prefix_sharing": "never"},
    "adapter": {"model": "qwen2", "objective": "kto", "policy": LORA},
    "reward model": {"model": "llama", "data": "pairs", "objective": "bradley_terry", "micro": 2},
    "half": {"model": "llama", "objective": "kto", "half": True},
    "half, whole reference": {"model": "gpt2", "objective": "kto", "half": True, "whole_reference": True},
}
MORE: dict[str, dict[str, Any]] = {
    **{name: {"model": name, "objective": "kto"} for name in MODELS},
    "checkpointing": {"model": "llama", "objective": "kto", "policy": {"gradient_checkpointing": True}},
    "whole reference": {"model": "llama", "objective": "kto", "whole_reference": True},
    "running mean": {"model": "llama", "objective": "bco", "micro": 2},
    "half, tied": {"model": "llama, tied", "objective": "kto", "half": True},
    "half, adapter": {"model": "llama", "objective": "kto", "half": True, "policy": LORA},
}


def case(of: dict[str, Any], models: dict[str, str], data: dict[str, str]) -> Case:
    return Case(**of | {"model": models[of["model"]], "data": data[of.get("data", "rows")]})


@pytest.fixture(scope="module")
def steps(folder: Path, models: dict[str, str], data: dict[str, str]) -> dict[str, dict[str, Any]]:
    return compare({name: case(of, models, data) for name, of in SAMPLE.items()}, folder)


def check(step: dict[str, Any], *, half: bool = False) -> None:
    assert step["same_names"]
    assert step["shares"], "prefix sharing was lost"
    assert step["first_rewards"] == 0
    assert step["size"] > 0.01
    assert step["gradient"] <= (HALF if half else ROUNDING) * step["size"]
    assert step["loss"] <= (1e-2 if half else 1e-6)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sharded_step_is_the_step_of_one_process(name: str, steps: dict[str, dict[str, Any]]) -> None:
    check(steps[name], half=bool(SAMPLE[name].get("half")))


@pytest.mark.slow
def test_families_and_settings(folder: Path, models: dict[str, str], data: dict[str, str]) -> None:
    found = compare({name: case(of, models, data) for name, of in MORE.items()}, folder)
    for name, step in found.items():
        check(step, half=bool(MORE[name].get("half")))


@pytest.mark.slow
def test_hybrid_sharding(folder: Path, models: dict[str, str], data: dict[str, str]) -> None:
    """Two groups of two ranks, each with all weights; one rank has two rows, the others one."""
    names = ("tied, one row at a time", "pairs", "adapter", "no plan of transformers")
    found = compare({n: case(SAMPLE[n], models, data) for n in names}, folder, ranks=4, replicas=2)
    for step in found.values():
        check(step)


@pytest.mark.slow
def test_a_rank_without_a_row_of_some_class(folder: Path, models: dict[str, str]) -> None:
    cases = {}
    for labels in ("DDDDU", "DDDDD"):  # one rank lacks an undesirable row, or both
        path = binary_data(folder / f"{labels}.jsonl", 5)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row | {"label": label == "D"} for row, label in zip(rows, labels, strict=True)]
        data = write_jsonl(path, rows)
        cases |= {f"{labels} {name}": Case(models["llama"], data, name, micro=1) for name in ("kto", "bco")}
    for step in compare(cases, folder).values():
        check(step)


@pytest.mark.slow
def test_every_objective(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    """Two rows in a pass; a pair's two stay together."""
    files = write_data(tmp_path)
    needs = {name: load_objective(name).needs for name in OBJECTIVES}
    kinds = {name: "groups" if name == "grpo" else "pairs" if needs[name].pairs else "rows" for name in OBJECTIVES}
    cases = {
        name: Case(models["llama"], files[kinds[name]], name, micro=2)
        for name in OBJECTIVES
        if not needs[name].samples and not needs[name].routing
    }
    assert len(cases) > 30
    for step in compare(cases, folder).values():
        check(step)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's memory")
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_holds_a_whole_model(ranks: int, tmp_path: Path) -> None:
    """Not even while it loads: each rank reads its slice of the files."""
    for name, hidden in (("model", 1024), ("model-small", 32)):
        shape = {"vocab_size": 512, "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 6}
        LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(tmp_path / name)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 250e6
    peaks = loading_peaks(str(tmp_path / "model"), tmp_path, ranks)
    assert min(peaks) > 0.9 * size / ranks  # the measurement sees the shard
    assert max(peaks) < size * (0.9 if ranks == 2 else 0.7)  # pages of the file that were read ahead count as well


# -- runs -----------------------------------------------------------------------------------------------

RMSPROP = "--model.optimizer.class_path=torch.optim.RMSprop"
SGD = ("--model.optimizer.class_path=torch.optim.SGD", "--model.optimizer.init_args={lr: 1.0, fused: false}")


def both(folder: Path, model: str, objective: str, rows: str, *options: str, ranks: int = 2) -> tuple[Any, Any]:
    """The metrics of a fit in one process, and of the same fit sharded."""
    found = []
    for name, how in (("one", run), ("many", lambda words, at: run_ranks(words, at, ranks, "fsdp2")[0])):
        ended = how(fit(Path(model), objective, rows, folder / name, "--data.batch_size=5", *options), folder)
        assert ended.status == 0, ended
        found.append(metrics(folder / name))
    return found[0], found[1]


def apart(one: Any, many: Any) -> float:
    assert [line.keys() for line in one] == [line.keys() for line in many]
    return max(abs(float(a[key]) - float(b[key])) for a, b in zip(one, many, strict=True) for key in a)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        # A validation without gradient between two steps must not leave weights gathered that the next step changes.
        ("kto", ("--trainer.gradient_clip_val=0.1", *SGD, "--trainer.val_check_interval=1", "validation")),
        pytest.param("tr_dpo", ("--model.reference_model.init_args.every=1", *SGD), marks=pytest.mark.slow),
        pytest.param(
            "mnpo",
            ("--model.reference_model.init_args.every=1", "--model.value_function.init_args.beta=1.0"),
            marks=pytest.mark.slow,
        ),
        pytest.param("kto", ("--model.policy.lora={r: 2}", "--model.micro_batch_rows=1"), marks=pytest.mark.slow),
        pytest.param("kto", ("--model.value_function=plugins.learnt.Learnt",), marks=pytest.mark.slow),
        pytest.param("kto", (RMSPROP, "--model.micro_batch_rows=1"), marks=pytest.mark.slow),
        pytest.param("dpo", ("--model.micro_batch_rows=2", "--model.reference_store=true"), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_sharded_fit_is_the_fit_of_one_process(
    objective: str, options: tuple[str, ...], models: dict[str, str], data: dict[str, str], tmp_path: Path
) -> None:
    rows = data["pairs" if load_objective(objective).needs.pairs else "rows"]
    words = [f"--data.validation={rows}" if option == "validation" else option for option in options]
    one, many = both(tmp_path, models["llama, tied"], objective, rows, *words)
    assert len(one) >= 3
    assert apart(one, many) <= 2e-4  # figures of sequences, nats


# -- refusals -------------------------------------------------------------------------------------------


def test_an_objective_that_samples_is_refused() -> None:
    trainer: Any = SimpleNamespace(strategy=ShardedStrategy())
    check_sharded(trainer, Needs())
    with pytest.raises(ValueError, match="reference_point"):
        check_sharded(trainer, Needs(samples=2))


def test_a_refused_objective_leaves_the_earlier_run_where_it_is(capfd: Any, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step\n")
    data = binary_data(tmp_path / "rows.jsonl")
    words = fit(tiny_folder, "kto", data, tmp_path / "run", "--model.reference_point=SampledKL")
    said = refused(capfd, [*words, "--trainer.strategy=fsdp2"])
    assert "samples from the policy" in said
    assert {path.name for path in tmp_path.iterdir()} == {"run", "rows.jsonl"}


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="replicas"):
        ShardedStrategy(replicas=0)
    with pytest.raises(ValueError, match="reference"):
        ShardedStrategy(reference="everywhere")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_layers(name: str) -> None:
    with torch.device("meta"):
        model: Any = MODELS[name]()
    names = block_names(model)
    assert len(names) == model.config.get_text_config().num_hidden_layers
    inside = sum(p.numel() for block in names for p in model.get_submodule(block).parameters())
    outside = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
    assert sum(p.numel() for p in model.parameters()) - inside <= 1.2 * outside + 1024 * 64
