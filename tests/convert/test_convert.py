"""What holds for every library: nothing is dropped, defaults are theirs, and bad input is one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peer_configs import HALOS_LOSSES, KTO, LLAMAFACTORY, WORDS, converted, write, write_halos, write_recipe
from run_halos import one_error, run_here

from halos_pl.cli.convert import peers
from halos_pl.convert.run import ConvertError
from halos_pl.convert.table import table

TRAINERS = ("kto", "dpo", "cpo", "orpo", "reward")
BARE = {"model_name_or_path": "owner/model", "dataset_name": "owner/data"}


@pytest.fixture
def make(tmp_path):
    """Converts a small config of a library for one of its trainers, with other settings."""

    def convert(word: str, trainer: str, overrides: str = "", /, **more: Any) -> tuple[dict[str, Any], list[str]]:
        if word == "trl":
            return converted(word, write(tmp_path, BARE | more), trainer=trainer, overrides=overrides)
        if word == "llamafactory":
            return converted(word, write_recipe(tmp_path, LLAMAFACTORY[trainer] | more), overrides=overrides)
        words = " ".join(f"{key}={value}" for key, value in more.items())
        return converted(word, write_halos(tmp_path), overrides=f"loss={trainer} {WORDS} {words} {overrides}")

    return convert


RUNS = [
    *(("trl", trainer) for trainer in TRAINERS),
    *(("llamafactory", trainer) for trainer in ("kto", "dpo", "reward", "simpo")),
    *(("halos", trainer) for trainer in HALOS_LOSSES),
]

OFTEN = [("trl", "dpo"), ("llamafactory", "kto"), ("halos", "kto")]
RARELY = [run for run in RUNS if run not in OFTEN]


def others(value: Any) -> list[Any]:
    """Values that are not this one; a setting takes at least one of them."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 + 1, value / 2, 0.3]
    return [True, False, 3, 0.3, "other", ["other"]]


#: Values of settings that take few, and settings without which one has no effect.
FEW = {
    "fp16": {"bf16": False, "fp16": True},
    "lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "optim": {"optim": "sgd"},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 7},
    "eval_strategy": {"eval_strategy": "epoch"},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "save_strategy": {"save_strategy": "epoch"},
    "f_divergence_type": {"f_divergence_type": "js_divergence"},
}
#: Settings that choose the trainer, or follow from the model.
IDENTITY = {"stage", "loss.trainer", "model.block_name"}


@pytest.mark.parametrize(("word", "trainer"), [*OFTEN, *(pytest.param(*run, marks=pytest.mark.slow) for run in RARELY)])
def test_every_setting_is_used_or_noted_or_refused(make, word, trainer):
    """Another value of any setting changes the config, or is named in a note or an error."""
    whole = table(*peers()[word].tables)
    kind = {"reward": "rm", "simpo": "dpo"}.get(trainer, trainer) if word == "llamafactory" else trainer
    plain = make(word, trainer)[0]
    dropped = []
    for key in set(whole.settings) - IDENTITY:
        setting = whole.settings[key]
        if word == "trl" and setting.only and trainer not in setting.only:
            with pytest.raises(ConvertError, match=key):
                make(word, trainer, **{key: setting.default})
            continue
        default = whole.default(key, kind)
        for value in (*others(default), default):  # a recipe may give another than the default
            more = FEW.get(key, {key: value})
            if word == "llamafactory" and "eval_strategy" in more:
                more = more | {"eval_dataset": LLAMAFACTORY[trainer]["dataset"]}
            try:
                config, notes = make(word, trainer, **more)
            except ConvertError as error:
                named = key in str(error)
            else:
                named = config != plain or any(note.startswith(key) for note in notes)
            if named:
                break
        else:
            dropped.append(key)
    assert dropped == []


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_table_is_that_of_the_installed_trl(trainer):
    """Names and defaults of TRL's dataclasses; the table may have older settings besides."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    classes = {"kto": trl.KTOConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig}
    classes |= {"cpo": CPOConfig, "orpo": ORPOConfig}
    theirs: dict[str, Any] = {}
    for cls in (classes[trainer], trl.ScriptArguments, trl.ModelConfig, trl.DatasetMixtureConfig):
        for field in dataclasses.fields(cls):
            made = field.default_factory() if callable(field.default_factory) else None
            theirs |= {field.name: field.default if field.default is not dataclasses.MISSING else made}
    whole = table("training_arguments", "trl")
    newest = {key for key in whole.of(trainer) if not whole.settings[key].older} - {"env"}  # env is of its parser
    assert newest == set(theirs)
    assert {key: whole.default(key, trainer) for key in newest} == theirs
    if f"trl {trl.__version__}" not in whole.version:
        pytest.fail("the table names another version of TRL")


@pytest.mark.parametrize(("word", "trainer"), RUNS)
def test_a_silent_file_trains_with_the_library_s_defaults(make, word, trainer):
    """Each setting of ours that a default of theirs decides is written, as our base.yaml has others."""
    config = make(word, trainer)[0]
    written = {"seed_everything", "trainer.max_epochs", "trainer.gradient_clip_val", "trainer.precision"}
    written |= {"model.policy.dtype", "model.policy.gradient_checkpointing", "model.optimizer", "model.lr_schedule"}
    written |= {"model.warmup_ratio", "model.micro_batch_rows", "data.batch_size", "data.max_length"}
    written |= {"checkpoint.every_n_steps", "model.value_function" if trainer != "csft" else "model.extra_terms"}
    for key in written:
        node: Any = config
        for name in key.split("."):
            assert name in node, key
            node = node[name]
    assert {"lr", "weight_decay", "betas"} <= config["model"]["optimizer"]["init_args"].keys()


def test_trl_s_defaults(make):
    config = make("trl", "kto")[0]
    assert config["seed_everything"] == 42
    assert config["trainer"] == {
        "precision": "bf16-mixed",
        "max_epochs": 3,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 10,
    }
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-6
    assert make("trl", "reward")[0]["model"]["optimizer"]["init_args"]["lr"] == 1e-4
    assert (config["model"]["lr_schedule"], config["model"]["warmup_ratio"]) == ("linear", 0)
    assert config["model"]["policy"]["gradient_checkpointing"] is True
    assert (config["data"]["batch_size"], config["data"]["max_length"], config["data"]["shuffle"]) == (8, 1024, False)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 8))
def test_a_step_has_the_examples_of_all_devices(tmp_path, each, parts, devices):
    sizes = {"per_device_train_batch_size": each, "gradient_accumulation_steps": parts}
    path = write(tmp_path, BARE | sizes)
    for trainer, rows in (("kto", 1), ("dpo", 2)):
        config = converted("trl", path, trainer=trainer, devices=devices)[0]
        assert config["data"]["batch_size"] == each * parts * devices
        assert config["model"]["micro_batch_rows"] == each * rows


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 100), st.integers(0, 100))
def test_a_warm_up_in_steps_takes_as_many_steps(tmp_path, steps, warmup):
    path = write(tmp_path, BARE | {"max_steps": steps, "warmup_steps": min(warmup, steps)})
    ratio = converted("trl", path, trainer="dpo")[0]["model"]["warmup_ratio"]
    assert round(ratio * steps) == min(warmup, steps)


REFUSED = {
    "a script": ("trl", "train.py", "print()", "", "train.py"),
    "not YAML": ("trl", "a.yaml", "beta: [", "", "a.yaml"),
    "a list": ("trl", "a.yaml", "- beta", "", "a.yaml"),
    "no file": ("trl", "gone.yaml", None, "", "gone.yaml"),
    "another library": ("trlx", "a.yaml", "beta: 0.1", "", "trl"),
    "unknown key": ("trl", "a.yaml", "desirable_weight: 1.0\nbatch_sise: 3", "", "batch_sise"),
    "misspelt": ("trl", "a.yaml", "desirable_weight: 1.0\nlearning_rat: 3", "", "learning_rate"),
    "wrong type": ("trl", "a.yaml", "desirable_weight: many", "", "a.yaml:1"),
    "no trainer": ("trl", "a.yaml", "learning_rate: 1e-6", "", "--trainer"),
    "a setting of another trainer": ("trl", "a.yaml", "desirable_weight: 1.0\nloss_weights: [1.0]", "", "--trainer"),
    "no model": ("trl", "a.yaml", "desirable_weight: 1.0", "", "model_name_or_path"),
    "WPO": ("trl", "a.yaml", "model_name_or_path: m\nuse_weighting: true", "", "a.yaml:2"),
    "LD-DPO": ("trl", "a.yaml", "model_name_or_path: m\nld_alpha: 0.5", "", "ld_alpha"),
    "RPO": ("trl", "a.yaml", "model_name_or_path: m\nrpo_alpha: 1.0", "", "loss_weights"),
    "without reference": ("trl", "a.yaml", "model_name_or_path: m\nreference_free: true", "", "reference_free"),
    "warm-up of unknown share": (
        "trl",
        "a.yaml",
        "desirable_weight: 1\nwarmup_steps: 9",
        "model_name_or_path=m",
        "max_steps",
    ),
    "no value": ("trl", "a.yaml", "desirable_weight: 1.0", "beta", "KEY=VALUE"),
    "given twice": ("trl", "a.yaml", "torch_dtype: float32\ndtype: float32", "", "torch_dtype"),
    "fine-tuning": ("llamafactory", "a.yaml", "stage: sft", "", "not a preference run"),
    "PPO": ("llamafactory", "a.yaml", "stage: ppo", "", "not a preference run"),
    "no dataset_info": (
        "llamafactory",
        "a.yaml",
        "stage: kto\nmodel_name_or_path: m\ndataset: d",
        "",
        "dataset_info.json",
    ),
    "no group": ("halos", "config.yaml", "defaults: [{loss: '???'}]", "", "loss"),
    "no such loss": ("halos", "config.yaml", "defaults: [{loss: '???'}]", "loss=kti", "kti"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capfd):
    word, name, text, overrides, named = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    words = ["convert", word, name, *([f"--overrides={overrides}"] if overrides else [])]
    assert named in one_error(words, capfd)


def test_a_config_that_fit_would_refuse_is_not_written(tmp_path, capfd):
    path = write(tmp_path, BARE | {"desirable_weight": -1.0})
    assert "lambda_desirable" in one_error(["convert", "trl", str(path), f"--out={tmp_path}/out.yaml"], capfd)
    assert not (tmp_path / "out.yaml").exists()


def test_a_converted_recipe_trains(tiny_folder, tmp_path, capfd):
    """LLaMA-Factory's KTO recipe, with a local model and local data."""
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "yes"}]}
        | {"label": i % 2 == 0}
        for i in range(24)
    ]
    (tmp_path / "kto_en_demo.json").write_text(json.dumps(rows))
    path, out = write_recipe(tmp_path, KTO), tmp_path / "out.yaml"
    assert run_here(capfd, ["convert", "llamafactory", str(path), f"--out={out}"]).status == 0
    options = [f"--model.policy.path={tiny_folder}", f"--run_dir={tmp_path}/run", "--trainer.max_steps=3"]
    options += ["--trainer.accelerator=cpu", "--data.num_workers=0", "--trainer.precision=32-true"]
    options += ["--model.policy.dtype=float32", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    ended = run_here(capfd, ["fit", f"--config={out}", *options])
    assert ended.status == 0, ended
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 4


def test_two_names_for_one_file_are_kept_apart(tmp_path, capfd):
    path = write(tmp_path, BARE | {"desirable_weight": 1.0})
    (tmp_path / "out.yaml").write_text("mine")
    one_error(["convert", "trl", str(path), f"--out={tmp_path}/out.yaml"], capfd)
    assert (tmp_path / "out.yaml").read_text() == "mine"


def test_passwords_are_not_written(make):
    assert "hf_secret" not in str(make("trl", "kto", hub_token="hf_secret"))
