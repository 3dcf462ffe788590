"""Every way of computing a step gives the same step: for each objective file the same losses and gradients."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_runs import FILES, FOLDER, Recorded, run
from run_halos import write_data

import halos_pl
from halos_pl.policy import head

STEPS = 3
# Differences stay as small as they are: AdamW would divide what is only rounding by its own size.
SGD = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.init_args.lr=0.003")
WAYS: dict[str, tuple[str, ...]] = {
    "padded": ("--model.prefix_sharing=never",),
    "padded, one row at a time": ("--model.prefix_sharing=never", "--model.micro_batch_rows=1"),
    "one row at a time": ("--model.micro_batch_rows=1",),
    "three rows at a time": ("--model.micro_batch_rows=3",),
    "checkpointed": ("--model.policy.gradient_checkpointing=true",),
    "logits by parts": (),
    "stored reference": ("--model.reference_store=true",),
}


def _reference(objective: str) -> Any:
    given = yaml.safe_load((FOLDER / f"{objective}.yaml").read_text())["model"].get("reference_model")
    name = given["class_path"] if isinstance(given, dict) else given or "FrozenCopy"
    return getattr(halos_pl, name.rpartition(".")[2])


TRAINED: dict[str, tuple[str, ...]] = {"whole": (), "adapter": ("--model.policy.lora.r=4",)}
CELLS = [
    (objective, way, trained)
    for objective in FILES
    for way in WAYS
    for trained in TRAINED
    if way != "stored reference" or _reference(objective).storable
]
# Every way on rows, and one each on pairs of an adapter and on groups: few objectives, because each is also fitted as
# by default. test_loss_defects.py takes steps in parts with one of each kind.
SAMPLE = {
    *(("kto", way, "whole") for way in WAYS),
    ("dpo", "stored reference", "adapter"),
    ("grpo", "padded", "whole"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(data: dict[str, list[str]], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The steps of an objective as they are taken by default, computed once."""

    @cache
    def steps(objective: str, trained: str = "whole") -> list[Recorded]:
        folder = tmp_path_factory.mktemp("plain") / "run"
        return run(objective, tiny_folder, data, folder, *SGD, *TRAINED[trained], steps=STEPS)

    return steps


@pytest.mark.parametrize(
    ("objective", "way", "trained"),
    [pytest.param(*cell, marks=[] if cell in SAMPLE else [pytest.mark.slow]) for cell in CELLS],
)
def test_a_step_is_the_same(
    objective: str,
    way: str,
    trained: str,
    plain: Any,
    data: dict[str, list[str]],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted, options = plain(objective, trained), (*SGD, *TRAINED[trained], *WAYS[way])
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    if way == "logits by parts":
        monkeypatch.setattr(head, "LOGITS", 3000)  # some eight rows of the tiny vocabulary at a time
    if way == "stored reference":  # by an earlier run, which came by in another order
        run(objective, tiny_folder, data, tmp_path / "earlier", *options, "--data.seed=2", steps=STEPS)
    found = run(objective, tiny_folder, data, tmp_path / "run", *options, steps=STEPS)
    assert len(found) == len(wanted) == STEPS
    for one, other in zip(found, wanted, strict=True):
        assert one.names == other.names
        assert one.logged.keys() == other.logged.keys()
        for name, figure in other.logged.items():
            if way == "stored reference" and name.endswith(("gains", "accuracies", "clamped")):
                continue  # at the start all rewards are 0 to within rounding, of either sign
            assert one.logged[name] == pytest.approx(figure, rel=1e-4, abs=1e-4), name
        assert one.logged["loss"] == pytest.approx(other.logged["loss"], rel=1e-5, abs=1e-5)
        assert one.gradient.keys() == other.gradient.keys()
        size = max(float(g.abs().max()) for g in other.gradient.values())
        for name, gradient in other.gradient.items():
            assert float((one.gradient[name] - gradient).abs().max()) <= 1e-5 * size + 1e-9, name


@pytest.mark.parametrize("prefix_sharing", ["always", "never"])
@pytest.mark.parametrize(
    "objective", [pytest.param(name, marks=[] if name in ("kto", "grpo") else [pytest.mark.slow]) for name in FILES]
)
def test_under_bfloat16_a_step_is_off_by_its_rounding(
    objective: str, prefix_sharing: str, plain: Any, data: dict[str, list[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    """Three digits: the loss within 0.02, no entry of the gradient farther off than a twentieth of the largest one."""
    how = ("--trainer.precision=bf16-mixed", f"--model.prefix_sharing={prefix_sharing}")
    [found] = run(objective, tiny_folder, data, tmp_path / "run", *SGD, *how, steps=1)
    wanted = plain(objective)[0]
    assert found.logged["loss"] == pytest.approx(wanted.logged["loss"], rel=0.02, abs=0.02)
    size = max(float(g.abs().max()) for g in wanted.gradient.values())
    off = max(float((found.gradient[name] - g).abs().max()) for name, g in wanted.gradient.items())
    assert off <= 0.05 * size


def test_an_adapter_off_is_a_copy_of_what_it_was_put_on(
    data: dict[str, list[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    """Two references, one model: the same losses and gradients of the adapter."""
    lora = (*SGD, "--model.policy.lora.r=4")
    off = run("kto", tiny_folder, data, tmp_path / "off", *lora, steps=STEPS)
    copy = run("kto", tiny_folder, data, tmp_path / "copy", *lora, "--model.reference_model=FrozenCopy", steps=STEPS)
    for one, other in zip(off, copy, strict=True):
        assert one.logged["loss"] == pytest.approx(other.logged["loss"], rel=1e-5)
        for name, gradient in other.gradient.items():
            assert torch.allclose(one.gradient[name], gradient, rtol=1e-4, atol=1e-7), name
