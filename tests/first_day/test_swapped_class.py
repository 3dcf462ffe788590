"""A class that replaces another one gets what was written for that one, and none of its defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import yaml
from jsonargparse._util import import_object
from run_halos import config

from halos_pl.cli.main import main
from halos_pl.cli.swapped_class import swaps

SETS = {"lr": 5e-6, "weight_decay": 0.0, "fused": True}  # by base.yaml, for AdamW


def resolved(words: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    """The model in the config that a fit would run with."""
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *words, "--print_config"])
    return yaml.safe_load(capfd.readouterr().out)["model"]


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.Adagrad",
        *(
            pytest.param(f"torch.optim.{name}", marks=pytest.mark.slow)
            for name in ("SGD", "NAdam", "Adafactor", "Adadelta", "LBFGS", "Adam")
        ),
        pytest.param("transformers.optimization.Adafactor", marks=pytest.mark.slow),
    ],
)
def test_another_optimizer_has_its_own_defaults(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Alone it has those of its signature; over base.yaml it has what that file sets, too."""
    alone = resolved(["--no_base", f"--model.optimizer={name}"], capfd)["optimizer"]["init_args"]
    signature = inspect.signature(import_object(name)).parameters
    assert alone == {key: list(d) if isinstance(d := signature[key].default, tuple) else d for key in alone}
    assert {*signature} - {*alone} == {"params"}
    swapped = resolved([config("base"), f"--model.optimizer={name}"], capfd)["optimizer"]["init_args"]
    assert swapped == {key: SETS.get(key, value) for key, value in alone.items()}


def test_the_default_optimizer_keeps_the_settings_that_nothing_replaces(capfd: pytest.CaptureFixture[str]) -> None:
    found = resolved(["--model.optimizer=torch.optim.AdamW", "--model.optimizer.weight_decay=0.1"], capfd)["optimizer"]
    assert found["init_args"].items() >= {"lr": 5e-6, "weight_decay": 0.1, "fused": True, "eps": 1e-8}.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("value_function", "CARA"),
        ("value_function", "Identity"),
        ("reference_point", "RunningMean"),
        ("reward", "AlphaDivergence"),
        ("feedback", "Pairwise"),
    ],
)
def test_another_plug_in_has_its_own_defaults(option: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    alone = resolved([f"--model.{option}={name}"], capfd)[option]["init_args"]
    was = resolved([config("objectives/kto")], capfd)[option]["init_args"]
    swapped = resolved([config("objectives/kto"), f"--model.{option}={name}"], capfd)[option]["init_args"]
    assert swapped == {key: was.get(key, value) for key, value in alone.items()}


def test_what_becomes_of_the_settings_of_a_replaced_class_is_said() -> None:
    given = {"model": {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1.0, "eps": 2.0, "betas": [0, 0]}}}}
    now = {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0, "momentum": 0.0}}}}
    (said,) = swaps(given, now, "base.yaml")
    assert all(
        name in said for name in ("base.yaml", "model.optimizer", "SGD", "AdamW", "keeps lr 1.0", "eps", "betas")
    )
    assert "momentum" not in said
    option = {"model": {"optimizer": {"eps": None}}}
    (said,) = swaps(option, now, "--model.optimizer.eps")
    assert "does not take eps" in said
    same = {"model": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 1.0}}}, "trainer": {"logger": None}}
    assert not list(swaps(same, now, "base.yaml"))
    inner = {"class_path": "Scaled", "init_args": {"by": 2.0, "value_function": {"class_path": "CARA"}}}
    outer = {"class_path": "Scaled", "init_args": {"value_function": {"class_path": "Logistic", "init_args": {"b": 1}}}}
    (said,) = swaps({"v": outer}, {"v": inner}, "a.yaml")
    assert "v.value_function is now CARA instead of Logistic" in said


@pytest.mark.parametrize(
    "earlier", [{"class_path": "ShardedStrategy", "init_args": {"replicas": 4}}, {"replicas": None}, {"replicas": 4}]
)
def test_the_name_of_a_strategy_drops_settings_aloud(earlier: dict[str, Any]) -> None:
    (line,) = swaps({"trainer": {"strategy": earlier}}, {"trainer": {"strategy": "fsdp2"}}, "config.yaml")
    assert all(word in line for word in ("config.yaml", "trainer.strategy", "fsdp2", "replicas"))
