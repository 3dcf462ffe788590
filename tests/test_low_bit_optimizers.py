"""Optimizers of bitsandbytes and torchao with low-bit or paged states: a run resumes from them bit for bit."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import _typehints
from run_halos import binary_data, fit
from torch import nn

from halos_pl.cli.class_names import resolve
from halos_pl.cli.main import main
from halos_pl.training.optim import Change, MasterWeights, guard, make_optimizer, run_load_hooks
from halos_pl.training.optimizer_checks import check_optimizer


@pytest.fixture(autouse=True)
def _not_compiled() -> Iterator[None]:
    """torchao compiles its step, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def optimizer_class(path: str) -> Any:
    package, _, name = path.rpartition(".")
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package.partition('.')[0]} is not installed")
    return getattr(importlib.import_module(package), name)


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in ((64, 128), (64,))]


def attached(make: Any, parameters: list[nn.Parameter]) -> tuple[Any, MasterWeights, list[Change]]:
    changes: list[Change] = []
    masters = MasterWeights(parameters)
    optimizer = make_optimizer(make, masters.parameters)
    guard(optimizer, changes.extend)
    masters.attach(optimizer)
    run_load_hooks(optimizer)
    return optimizer, masters, changes


def train(optimizer: Any, masters: MasterWeights, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        masters.begin_pass()
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "path",
    [
        *(f"bitsandbytes.optim.{name}" for name in ("AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit")),
        *(f"torchao.optim.{name}" for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")),
    ],
)
def test_a_resumed_optimizer_continues_exactly(path: str, dtype: torch.dtype) -> None:
    kind = optimizer_class(path)

    def make(parameters: list[nn.Parameter]) -> Any:
        return kind(parameters, lr=1e-3)

    check_optimizer(make, torch.device("cpu"), vectors=True)
    whole, part, resumed = weights(dtype), weights(dtype), weights(dtype)
    train(*attached(make, whole)[:2], whole, range(6))
    optimizer, masters, _ = attached(make, part)
    train(optimizer, masters, part, range(3))
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in part], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, value in zip(resumed, saved["weights"], strict=True):
            p.copy_(value)
    optimizer, masters, changes = attached(make, resumed)
    optimizer.load_state_dict(saved["optimizer"])
    assert not changes
    train(optimizer, masters, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
    assert not torch.equal(whole[0], weights(dtype)[0])


def test_a_resumed_run_of_bitsandbytes_keeps_its_own_settings() -> None:
    """Its optimizers do not run torch's hooks for loading a state."""
    kind = optimizer_class("bitsandbytes.optim.AdamW8bit")
    optimizer, _, _ = attached(lambda parameters: kind(parameters, lr=1e-3), weights(torch.float32))
    saved = optimizer.state_dict()
    resumed, _, changes = attached(lambda parameters: kind(parameters, lr=1e-4), weights(torch.float32))
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == 1e-4
    assert [change.key for change in changes] == ["model.optimizer.lr"]
    other = optimizer_class("bitsandbytes.optim.Lion8bit")
    with pytest.raises(ValueError, match="Lion8bit"):
        attached(lambda parameters: other(parameters, lr=1e-3), weights(torch.float32))[0].load_state_dict(saved)


@pytest.mark.parametrize("path", ["bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit"])
def test_a_run_with_8_bit_states_resumes_exactly(tiny_folder: Path, tmp_path: Path, path: str) -> None:
    optimizer_class(path)
    data = binary_data(tmp_path / "d.jsonl")

    def run(name: str, steps: int, *options: str) -> list[str]:
        words = fit(tiny_folder, "kto", data, tmp_path / name)
        words = [word for word in words if "optimizer" not in word]
        words += ["--model.lr_schedule=constant_with_warmup", "--model.warmup_ratio=0", f"--trainer.max_steps={steps}"]
        return [*words, f"--model.optimizer={path}", "--model.optimizer.init_args.lr=1e-3", *options]

    main(run("whole", 3))
    main(run("part", 2))
    main(run("part", 3, "--ckpt_path=last"))
    one, other = (torch.load(tmp_path / r / "checkpoints/last.ckpt", weights_only=True) for r in ("whole", "part"))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    names = {type(v).__name__ for state in one["optimizer_states"][0]["state"].values() for v in state.values()}
    assert names & {"OptimState8bit", "dict"}


def test_a_bare_name_means_the_class_of_torch(monkeypatch: Any) -> None:
    """bitsandbytes has optimizers with the names of torch's."""
    paths = [f"{library}.optim.SGD" for library in ("bitsandbytes", "torch")] + ["one.Lion", "other.Lion"]
    monkeypatch.setattr("jsonargparse._typehints.get_all_subclass_paths", lambda *args, **options: paths)
    assert resolve(torch.optim.Optimizer, "SGD") == "torch.optim.SGD"
    with pytest.raises(ValueError, match=r"one\.Lion, other\.Lion"):
        resolve(torch.optim.Optimizer, "Lion")
    importlib.import_module("halos_pl.cli.lightning_cli")
    assert _typehints.resolve_class_path_by_name is resolve
