"""Configs by name: --objective and --config find the shipped files, in a fixed order, and no name is guessed."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
import yaml
from run_halos import OBJECTIVES, ROOT, binary_data, fit, metrics, refused

from halos_pl.cli.configs import config_files, expanded
from halos_pl.cli.errors import RunError
from halos_pl.cli.lightning_cli import HalosCLI
from halos_pl.cli.main import main
from halos_pl.common.config_keys import KEYS
from halos_pl.common.experiments import BASE, EXPERIMENTS, PresetError, objectives, presets
from halos_pl.common.yaml_files import YAMLFileError
from halos_pl.objective.build import NOT_OF_THE_OBJECTIVE, build_objective, load_objective
from halos_pl.training.module import HALOModule


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(words: list[str]) -> list[str]:
    """The configs of a command, shipped ones by their names."""
    shipped = {str(path): name for name, path in presets().items()}
    return [shipped.get(file, file) for file in config_files(expanded(words))]


def test_the_shipped_configs_are_those_of_the_checkout() -> None:
    assert ROOT / "experiments" == EXPERIMENTS
    assert [*objectives()] == OBJECTIVES
    assert {"base", "data/shp", "objectives/kto", "paper/settings", "ablations/small"} <= presets().keys()


def test_base_comes_first_then_the_objective_then_the_configs(here: Path) -> None:
    (here / "own.yaml").write_text("model: {warmup_ratio: 0.0}\n")
    words = ["fit", "--data.batch_size=3", "--config", "own.yaml", "--objective=kto", "--config=data/shp"]
    assert names(words) == ["base", "objectives/kto", "own.yaml", "data/shp"]
    assert expanded(words)[-1] == "--data.batch_size=3"
    assert names(["fit", "--no_base", *words[1:]]) == ["objectives/kto", "own.yaml", "data/shp"]
    assert names(["fit", "--no_base=false", "--objective", "kto"]) == ["base", "objectives/kto"]


def test_base_is_not_read_twice(here: Path) -> None:
    assert names(["fit", "-c", "base", "--objective", "dpo"]) == ["objectives/dpo", "base"]
    assert names(["fit", f"--config={BASE}"]) == ["base"]


def test_what_comes_later_wins(here: Path) -> None:
    """Each of the four layers against the one before, in values."""
    (here / "own.yaml").write_text(
        "model: {warmup_ratio: 0.3, value_function: {class_path: Logistic, init_args: {beta: 0.2}}, loss_offset: 2.0}\n"
    )
    words = ["--model.loss_offset=3.0", "--config=own.yaml", "--objective=kto", "--data.train=x"]
    model = Parsed(words, run=False).config.model
    assert model.lr_schedule == "linear"  # of base.yaml
    assert model.feedback.class_path.endswith(".Binary")  # of the objective
    assert model.warmup_ratio == 0.3  # of the config, over base.yaml
    assert model.value_function.init_args.beta == 0.2  # of the config, over the objective
    assert model.loss_offset == 3.0  # of the command line, though it stands before the config


class Parsed(HalosCLI):
    """Stops when the words have been read."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


@pytest.mark.parametrize("file", ["kto", "kto.yaml"])
def test_a_name_that_is_a_file_and_a_shipped_loss_is_refused(here: Path, file: str) -> None:
    (here / file).write_text("model: {}\n")
    with pytest.raises(PresetError, match="ambiguous") as error:
        expanded(["fit", "--objective", "kto"])
    assert file in str(error.value)
    assert str(EXPERIMENTS / "objectives" / "kto.yaml") in str(error.value)
    assert names(["fit", "--objective", f"./{file}"])[1] == file


def test_a_loss_of_ones_own_is_found_by_its_name(here: Path) -> None:
    (here / "mine.yaml").write_text((EXPERIMENTS / "objectives" / "dpo.yaml").read_text())
    assert names(["fit", "--objective", "mine"]) == ["base", "mine.yaml"]
    assert type(load_objective("mine")) is type(load_objective("dpo"))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--objective=ktoo", "did you mean kto"),
        ("--config=data/ship", "did you mean data/shp"),
        ("--config=experiments/objectives/kto.yaml", "objectives/kto"),
        ("--config=nothing/like/it.yaml", "nothing/like/it.yaml"),
    ],
)
def test_a_name_of_nothing_is_answered_by_one_like_it(word: str, meant: str) -> None:
    with pytest.raises(PresetError, match=meant):
        expanded(["fit", word])


def test_one_objective_a_run() -> None:
    with pytest.raises(RunError, match="kto and dpo"):
        expanded(["fit", "--objective=kto", "--objective=dpo"])


def test_a_run_of_a_name_and_of_the_config_that_it_leaves(here: Path, tiny_folder: Path, capfd) -> None:
    """The config of a run states every setting: base.yaml is not implied, and an objective would be ignored."""
    data = binary_data(here / "rows.jsonl")
    words = [word for word in fit(tiny_folder, "kto", data, here / "run") if not word.startswith("--config")]
    main([*words, "--objective=kto", "--trainer.max_steps=1"])
    assert float(metrics(here / "run")[0]["loss"]) == 0.5
    saved = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert saved.keys() == {*KEYS}
    assert load_objective("run/config.yaml").needs == load_objective("kto").needs
    assert names(["test", "--config=run/config.yaml"]) == ["run/config.yaml"]
    assert "no effect" in refused(capfd, ["test", "--objective=dpo", "--config=run/config.yaml"])


@pytest.mark.parametrize("words", [["--conf", "own.yaml"], ["--conf=own.yaml"], ["-cown.yaml"]])
def test_an_abbreviated_config_comes_before_the_flags_too(here: Path, words: list[str]) -> None:
    (here / "own.yaml").write_text("data: {batch_size: 7}\n")
    assert expanded(["fit", "--data.batch_size=5", *words])[-1] == "--data.batch_size=5"


@pytest.mark.parametrize("key", ["config: other.yaml", "objective: kto", "no_base: true"])
def test_a_config_cannot_hold_options_of_the_command_line(here: Path, key: str) -> None:
    (here / "own.yaml").write_text(key + "\n")
    with pytest.raises(YAMLFileError, match=f"own.yaml:1: {key.partition(':')[0]}"):
        expanded(["fit", "--config=own.yaml"])


def test_the_keys_of_an_objective_file_are_those_of_a_fit(here: Path) -> None:
    assert {*NOT_OF_THE_OBJECTIVE} == {*signature(HALOModule).parameters} - {*signature(build_objective).parameters}


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("model:", "model:\n  extra_term: []", 2, "extra_term; did you mean extra_terms"),
        ("model:", "model:\n  3: x", 2, "no setting 3"),
        ("model:", "model:\n  null: x", 2, "no setting null"),
        ("model:", "modle: 3\nmodel:", 1, "modle; did you mean model"),
        ("model:", "value_function: Identity\nmodel:", 1, "value_function belongs below model"),
        ("model:", "data: 7\nmodel:", 1, "data is 7"),
        ("model:", "model.value_function: Identity\nmodel:", 1, "dotted"),
        ("model:", "model:\n  value_function.init_args.beta: 5.0", 2, "dotted"),
        ("0.1", ".nan", None, r"model\.value_function\.init_args\.beta is nan"),
        ("0.1", "null", None, r"model\.value_function\.init_args\.beta is null"),
        ("0.1", "-0.1", None, "^own.yaml: model.value_function: Logistic: beta is -0.1"),
        ("offset: 1.0", "offset: .inf", None, r"model\.loss_offset is inf"),
        ("offset: 1.0", "offset: null", None, r"model\.loss_offset is null"),
        ("desirable: 1.0", "desirable: .inf", None, r"model\.feedback\.init_args\.lambda_desirable is inf"),
    ],
)
def test_an_objective_file_that_no_fit_would_take_as_written_is_refused(
    here: Path, old: str, new: str, line: int | None, said: str
) -> None:
    text = objectives()["kto"].read_text()
    Path("own.yaml").write_text(text[text.index("model:") : text.index("data:")].replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as error:
        load_objective("own.yaml")
    assert str(error.value).startswith(f"own.yaml:{line}: " if line else "own.yaml: ")
    assert "\n" not in str(error.value)
