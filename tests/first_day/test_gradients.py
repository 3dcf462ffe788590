"""A learning rate at which nothing is learned is said once, with the cure."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit, metrics

from halos_pl.cli.main import main
from halos_pl.training.gradients import CLIPPED, SHORT, GradientWatch, mostly_cut

FEW = ("--trainer.max_epochs=3", "--model.warmup_ratio=0")


def warnings_of(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("halos: ")]


def test_a_large_learning_rate_is_said_once(
    tiny_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Its loss is finite, and all rows are where the value function is flat."""
    data = binary_data(tmp_path / "data.jsonl", 12)
    main(fit(tiny_folder, "kto", data, tmp_path / "run", *FEW, "--model.optimizer.init_args.lr=3"))
    assert [float(row["grad_norm"]) for row in metrics(tmp_path / "run")].count(0.0) > 3
    (said,) = (text for text in warnings_of(recwarn) if "gradient" in text)
    assert "model.optimizer.init_args.lr (it is 3)" in said
    assert "saturated" in said


def test_a_huge_one_ends_the_run_and_is_named(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 12), tmp_path / "run", *FEW)
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--model.optimizer.init_args.lr=1e30"])
    assert stopped.value.code == 1
    assert "model.optimizer.init_args.lr (it is 1e+30)" in capfd.readouterr().err


def test_an_ordinary_one_is_not(tiny_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    main(fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 12), tmp_path / "run", *FEW))
    assert not [text for text in warnings_of(recwarn) if "grad" in text]


def test_steps_that_are_all_clipped(tiny_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = binary_data(tmp_path / "data.jsonl", 12)
    main(fit(tiny_folder, "kto", data, tmp_path / "run", *FEW, "--trainer.gradient_clip_val=1e-6"))
    (said,) = (text for text in warnings_of(recwarn) if "grad" in text)
    assert "trainer.gradient_clip_val is 1e-06" in said


def test_clipping_by_value_may_cut_all_entries_but_those_that_are_zero() -> None:
    entries = torch.linspace(-1, 1, 2001)
    assert mostly_cut([entries[:1000], entries[1000:], torch.zeros(10_000)], 1e-3)
    assert not mostly_cut([entries], 0.5)
    assert not mostly_cut([torch.zeros(3)], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "count"), [("1e-9", 1), ("1e-3", 0)])
def test_entries_that_are_all_clipped(
    value: str, count: int, tiny_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 12), tmp_path / "run", *FEW)
    main([*words, f"--trainer.gradient_clip_val={value}", "--trainer.gradient_clip_algorithm=value"])
    said = [text for text in warnings_of(recwarn) if "clipped" in text]
    assert len(said) == count
    assert all("trainer.gradient_clip_val is 1e-09" in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "named"), [("0", "lr is 0"), ("1e-30", "100% of the float32"), ("1e-6", "")])
def test_a_learning_rate_that_changes_no_weight_is_said(
    lr: str, named: str, tiny_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data = binary_data(tmp_path / "data.jsonl", 12)
    main(fit(tiny_folder, "kto", data, tmp_path / "run", *FEW, f"--model.optimizer.init_args.lr={lr}"))
    said = [text for text in warnings_of(recwarn) if "model.optimizer.init_args.lr" in text]
    assert len(said) == bool(named)
    assert all(named in text for text in said)


def seen(*norms: float, clip: float | None = 10.0, **figures: float) -> list[str]:
    """What is said of steps with these gradients."""
    watch = GradientWatch()
    found: list[str] = []
    watch._warn_once = lambda what, text: found.append(text)  # type: ignore[method-assign]
    for step, norm in enumerate(norms):
        watch.see(norm, clip, lr=0.1, step=step, figures=figures)
    watch.finish(clip, lr=0.1)
    return found


def test_one_step_without_a_gradient_is_nothing() -> None:
    assert seen(1.0, 0.0, 1.0, 0.0) == []


def test_no_gradient_from_the_start_is_not_the_learning_rates_fault() -> None:
    (said,) = seen(0.0, 0.0, 0.0, **{"outcome/saturation": 1.0, "outcome/u": 900.0})
    assert "beta" in said
    assert "learning rate is not the cause" in said
    (said,) = seen(1.0, 0.0, 0.0, **{"outcome/saturation": 1.0, "outcome/u": -9e5})
    assert "-9e+05" in said
    assert "0.1" in said


@pytest.mark.parametrize(
    "weights", [{"chosen": 0.0}, {"chosen": 0.0, "rejected": math.nan}, {"chosen": 0.0, "rejected": 0.0}]
)
def test_no_gradient_without_a_weight_is_a_matter_of_feedback_and_data(weights: dict[str, float]) -> None:
    (said,) = seen(0.0, 0.0, **{f"outcome/weight_{side}": weight for side, weight in weights.items()})
    assert "feedback" in said
    (said,) = seen(0.0, 0.0, **{f"outcome/weight_{side}": 1.0 for side in weights})
    assert "feedback" not in said


@pytest.mark.parametrize(
    ("norms", "clip", "count"),
    [
        ([20.0] * (CLIPPED - 1) + [1.0], 10.0, 0),
        ([1.0] + [20.0] * CLIPPED, 10.0, 1),
        ([20.0] * 3 * CLIPPED, 10.0, 1),
        ([20.0] * SHORT, 10.0, 1),
        ([20.0] * (SHORT - 1), 10.0, 0),
        ([20.0] * SHORT, None, 0),
        ([20.0] * SHORT, math.inf, 0),
    ],
)
def test_how_many_clipped_steps_are_said(norms: list[float], clip: float | None, count: int) -> None:
    watch = GradientWatch()
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        for step, norm in enumerate(norms):
            watch.see(norm, clip, lr=0.1, step=step, figures={})
        watch.finish(clip, lr=0.1)
    assert len(issued) == count
