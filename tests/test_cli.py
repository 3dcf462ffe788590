"""The command line: objectives in YAML, overrides, users' plug-ins, errors, files of a run, export."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml
from run_halos import OBJECTIVES, ROOT, SHORTCUTS, binary_data, config, fit, metrics, one_in, pair_data, refused

from halos_pl.cli.lightning_cli import HalosCLI
from halos_pl.cli.main import main
from halos_pl.data.transforms import Transform
from halos_pl.objective import build
from halos_pl.policy.loading import LoRASpec, ModelSpec, load_model
from halos_pl.policy.reference import ReferenceModel

WHOLE = {name: resolve_name(name) for name in SHORTCUTS}  # before the tests begin, which take the short ones
PARTS = ("reward", "reference_point", "value_function", "feedback", "reflect_undesirable", "extra_terms")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {"binary": binary_data(folder / "binary.jsonl"), "pairs": pair_data(folder / "pairs.jsonl", 12)}


# -- objectives -----------------------------------------------------------------------------------------


class Parsed(HalosCLI):
    """Stops after parsing."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="module")
def resolve():
    """A function from options to the resolved config, as plain dicts."""
    parser = Parsed(["fit", config("base"), config("objectives/kto")]).parser

    def parse(*options: str) -> dict[str, Any]:
        found: dict[str, Any] = parser.parse_args(["fit", config("base"), *options]).fit.as_dict()
        return json.loads(json.dumps(found, default=str))

    return parse


def test_the_name_of_a_strategy_takes_settings(resolve):
    """As in ``--trainer.strategy fsdp2 --trainer.strategy.replicas 2``, where Lightning's own name is a text."""
    sharded = resolve("--trainer.strategy=fsdp2", "--trainer.strategy.replicas=2")["trainer"]["strategy"]
    assert sharded["class_path"] == "halos_pl.training.strategy.ShardedStrategy"
    assert (sharded["init_args"]["replicas"], sharded["init_args"]["reference"]) == (2, "sharded")
    ddp = resolve("--trainer.strategy=ddp", "--trainer.strategy.find_unused_parameters=true")["trainer"]["strategy"]
    assert ddp["init_args"]["find_unused_parameters"] is True
    assert resolve("--trainer.strategy=fsdp2")["trainer"]["strategy"] == "fsdp2"


def test_base_yaml_names_no_plug_in():
    base = yaml.safe_load((ROOT / "experiments" / "base.yaml").read_text())
    assert not {*PARTS, "reference_model", "loss_offset"} & base["model"].keys()
    assert "one_completion_per_prompt" not in base["data"]


def test_every_objective_states_the_same_settings():
    """So nothing of one objective remains when another is loaded on top of it."""
    files = {name: yaml.safe_load((ROOT / f"experiments/objectives/{name}.yaml").read_text()) for name in OBJECTIVES}
    assert {tuple(file) for file in files.values()} == {("model", "data")}
    assert len({frozenset(file["model"]) for file in files.values()}) == 1
    assert len({frozenset(file["data"]) for file in files.values()}) == 1


def subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


KNOWN = {cls.__name__: cls for base in (*build.KINDS, ReferenceModel, Transform) for cls in subclasses(base)}


def plugins_within(config: Any) -> Iterator[dict[str, Any]]:
    """All parts of a config that name a class, at any depth; a bare name is a class without arguments."""
    if isinstance(config, str) and config in KNOWN:
        yield {"class_path": config, "init_args": {}}
    if isinstance(config, dict) and "class_path" in config:
        yield {"init_args": {}, **config}
    for key, value in (
        config.items() if isinstance(config, dict) else enumerate(config if isinstance(config, list) else ())
    ):
        if key != "class_path":
            yield from plugins_within(value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_file_states_every_argument(objective):
    """In the file itself, before defaults are filled in: a missing argument could come from another file."""
    stated = yaml.safe_load((ROOT / "experiments" / "objectives" / f"{objective}.yaml").read_text())["model"]
    assert stated.keys() - {"reference_model"} == {*PARTS, "loss_offset"}
    plugins = list(plugins_within(stated))
    assert plugins
    for plugin in plugins:
        parameters = inspect.signature(KNOWN[plugin["class_path"]]).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        assert plugin["init_args"].keys() == named, plugin


# Every file after one other: with each argument stated in each file (above), what a file follows cannot matter.
@pytest.mark.parametrize("first", one_in(3, OBJECTIVES))
def test_nothing_of_one_objective_leaks_into_another(resolve, first):
    second = OBJECTIVES[OBJECTIVES.index(first) - 1]
    alone = resolve(config(f"objectives/{second}"))
    after = resolve(config(f"objectives/{first}"), config(f"objectives/{second}"))
    assert after["model"] == alone["model"]
    assert after["data"] == alone["data"]


@pytest.mark.parametrize(  # all of them, with their formulas: tests/family
    ("objective", "kind"),
    [("kto", "binary"), ("kto", "pairs"), ("dpo", "pairs"), ("grpo", "pairs"), ("csft", "binary")],
)
def test_an_objective_trains(tiny_folder, data, tmp_path, objective, kind):
    main(fit(tiny_folder, objective, data[kind], tmp_path / "run", "--trainer.max_steps=3", "--trainer.max_epochs=2"))
    losses = [float(row["loss"]) for row in metrics(tmp_path / "run")]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    start = load_model(ModelSpec(str(tiny_folder))).state_dict()
    assert any(not torch.equal(state[f"scorer.model.{name}"], weight) for name, weight in start.items())


@pytest.mark.parametrize(("objective", "start"), [("kto", 0.5), ("dpo", math.log(2))])
@pytest.mark.parametrize("lora", [(), ("--model.policy.lora={r: 2}",)])
def test_before_the_first_update_every_reward_is_exactly_zero(tiny_folder, data, tmp_path, objective, start, lora):
    options = ("--data.batch_size=12", f"--data.validation={data['pairs']}", "--trainer.val_check_interval=1")
    main(fit(tiny_folder, objective, data["pairs"], tmp_path / "run", "--trainer.max_steps=1", *options, *lora))
    first = metrics(tmp_path / "run")[0]
    assert float(first["loss"]) == pytest.approx(start, abs=1e-7)
    zero = {"rewards/chosen", "rewards/rejected", "rewards/margins", "outcome/reward", "outcome/u", "outcome/z0"}
    assert {name: float(first[name]) for name in zero} == dict.fromkeys(zero, 0.0)


# -- the command line -----------------------------------------------------------------------------------


def test_plug_ins_are_chosen_and_configured_on_the_command_line(resolve):
    kto = config("objectives/kto")

    def value_function(*options: str) -> Any:
        return resolve(kto, *options)["model"]["value_function"]

    assert value_function("--model.value_function=LogSigmoid") == {
        "class_path": "value_functions.LogSigmoid",
        "init_args": {"beta": 0.1},
    }
    for name in ("model.value_function.init_args.beta", "model.value_function.beta"):
        assert value_function(f"--{name}=0.3") == {
            "class_path": "value_functions.Logistic",
            "init_args": {"beta": 0.3},
        }
    chosen = resolve(kto, "--model.reference_point=RunningMean", "--model.reference_point.decay=0.9")["model"]
    assert chosen["reference_point"]["init_args"] == {"of": None, "decay": 0.9}
    assert chosen["value_function"] == value_function()


def test_a_users_own_value_function_trains(tiny_folder, data, tmp_path, monkeypatch):
    (tmp_path / "my_values.py").write_text(
        "import torch\n"
        "from value_functions import ValueFunction\n\n\n"
        "class Tanh(ValueFunction):\n"
        '    """v(u) = tanh(beta * u)."""\n\n'
        "    def __init__(self, *, beta: float = 0.1) -> None:\n"
        "        super().__init__()\n"
        "        self.beta = beta\n\n"
        "    def forward(self, u):\n"
        "        return torch.tanh(self.beta * u)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ("--model.value_function=my_values.Tanh", "--model.value_function.beta=0.4", "--trainer.max_steps=2")
    main(fit(tiny_folder, "kto", data["binary"], Path("run"), *own))
    rows = metrics(tmp_path / "run")
    # With C = 1 and v(0) = 0 the first loss is 1; it is the user's class that was at work.
    assert float(rows[0]["loss"]) == 1
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["value_function"]
    assert saved == {"class_path": "my_values.Tanh", "init_args": {"beta": 0.4}}


def test_help_of_a_plug_in(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--model.value_function.help", "Logistic"])
    said = capfd.readouterr().out
    assert caught.value.code == 0
    assert "beta" in said
    assert "risk aversion, 1 / nats" in said


def test_help_names_every_command(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    said = capfd.readouterr().out
    assert caught.value.code == 0
    for command in ("fit", "validate", "test", "predict", "export", "sample"):
        assert command in said


@pytest.mark.parametrize(
    ("plugin", "option", "known"),
    [
        ("value_function", "Nope", ("Identity", "KahnemanTversky", "LogSigmoid", "Logistic")),
        ("reference_point", "Nope", ("MismatchedKL", "PairedCompletion", "RunningMean", "Zero")),
        ("reward", "Nope", ("LogProb", "LogRatio")),
        ("feedback", "Nope", ("Binary", "Pairwise")),
        ("reference_model", "Nope", ("AdapterOff", "FrozenCopy", "NoReference", "OtherModel")),
        ("extra_terms", "[{class_path: Nope}]", ("HALO", "NLL", "Sum")),
        ("value_function", "no.such.module.Nope", ("Identity", "Logistic")),
    ],
)
def test_the_error_for_an_unknown_plug_in_lists_the_existing_ones(capfd, plugin, option, known):
    said = refused(capfd, ["fit", config("base"), config("objectives/kto"), f"--model.{plugin}={option}"], status=2)
    [line] = [line for line in said.splitlines() if f"model.{plugin}" in line]
    assert all(name in line for name in known)
    assert "dotted path" in line


@pytest.mark.parametrize(
    ("option", "said", "near"),
    [
        ("--model.value_function.gamma=1", "gamma is '1': Logistic has no such setting", "beta"),
        ("--data.batch_sizes=3", "unrecognized arguments: --data.batch_sizes", "data.batch_size"),
        ("model: {value_funktion: {class_path: Logistic}}", "model.value_funktion", "model.value_function"),
        ("model: {value_function: {class_path: Logistic, init_args: {betta: 1}}}", "betta is 1: ", "beta"),
    ],
)
def test_the_error_for_an_unknown_option_lists_similar_ones(capfd, tmp_path, option, said, near):
    if not option.startswith("--"):
        (tmp_path / "own.yaml").write_text(option)
        option = f"--config={tmp_path / 'own.yaml'}"
    message = refused(capfd, ["fit", config("base"), config("objectives/kto"), option], status=2)
    assert said in message
    assert re.search(rf"(There is: |it has |did you mean ).*\b{re.escape(near)}\b", message)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "takes"),
    [
        ("check Tanh Logistic", "one TARGET"),
        ("prove Tanh Logistic", "one TARGET"),
        ("verify a.json b.json", "one CERTIFICATE"),
        ("compare a b c", "one FIRST and one SECOND"),
    ],
)
def test_the_error_for_too_many_words_says_how_many_a_command_takes(capfd, words, takes):
    [line] = refused(capfd, words.split(), status=2).splitlines()
    assert f"unrecognized arguments: {words.split()[-1]}; it takes {takes}, and" in line


@pytest.mark.parametrize("words", [["--bogus"], ["--definition", "v7"], [], ["--timeout", "soon"]])
def test_the_errors_of_halos_check_about_its_options_are_one_line(capfd, words):
    [line] = refused(capfd, ["check", *words], status=2).splitlines()
    assert line.startswith("halos check: error: ")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("objective", "option", "said"),
    [
        ("kto", "--trainer.accumulate_grad_batches=2", "accumulate_grad_batches is 2: it would average losses with"),
        ("kto", "--model.reflect_undesirable=null", "the objective lacks reflect_undesirable"),
        ("kto", "--checkpoint.every_n_steps=0", "checkpoint.every_n_steps is 0"),
        ("kto", "--model.micro_batch_rows=0", "micro_batch_rows is 0"),
        ("kto", "--data.batch_size=0", "data.batch_size is 0"),
        ("dpo", "", "chosen and rejected"),
        ("dpo", "", "binary.jsonl:1"),
        ("kto", "--data.train=null", "set data.train"),
        ("kto", "--model.policy.path=/no/such/folder", "/no/such/folder is not a local folder"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(
    tiny_folder, data, tmp_path, capfd, objective, option, said
):
    words = fit(tiny_folder, objective, data["binary"], tmp_path / "run", *([option] if option else []))
    assert said in refused(capfd, words)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_missing_objective_is_an_error(tiny_folder, data, tmp_path, capfd):
    words = ["fit", config("base"), f"--model.policy.path={tiny_folder}", f"--data.train={data['binary']}"]
    assert "--objective NAME" in refused(capfd, [*words, f"--run_dir={tmp_path}/run"])


GOOD = '{"prompt": "a", "completion": "b", "label": true}\n'


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("split", "content", "named"),
    [
        ("train", None, ["data.jsonl: no such file"]),
        ("train", "", ["data.jsonl", "no row"]),
        ("validation", "", ["data.jsonl", "no row"]),
        ("train", GOOD + GOOD.replace("true", '"maybe"'), ["data.jsonl:2", "'label'", "maybe"]),
        ("train", GOOD + GOOD.replace('"b"', '""'), ["data.jsonl:2", "'completion' is empty"]),
        ("validation", GOOD + "{prompt\n", ["data.jsonl:2", "invalid JSON"]),
        ("train", GOOD + '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', ["data.jsonl:2", "data.jsonl:1 "]),
    ],
)
def test_faults_in_data_are_found_before_a_model_is_loaded(tiny_folder, data, tmp_path, capfd, content, named, split):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    words = fit(tiny_folder, "kto", data["binary"], tmp_path / "run", f"--data.{split}={file}")
    said = refused(capfd, words)
    for words_ in named:
        assert words_ in said
    assert not (tmp_path / "run").exists()


# -- what a run leaves ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, data) -> Path:
    """The complete folder of a finished KTO run with validation."""
    run = tmp_path_factory.mktemp("finished") / "run"
    options = (f"--data.validation={data['pairs']}", f"--data.test={data['pairs']}", "--checkpoint.every_n_steps=2")
    with pytest.MonkeyPatch.context() as patch:
        for name, part in WHOLE.items():
            patch.setattr(name, part)
        main(fit(tiny_folder, "kto", data["binary"], run, *options))
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_files_of_a_run(finished):
    written = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert written == {
        "config.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt",
        "metrics.csv",
        "summary.json",
        "training.png",
        "value_function.png",
    }
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (3, 1)
    assert summary["data"]["train"].pop("transforms") == []
    (counts,) = summary["data"]["train"].values()
    assert (counts["rows"], counts["desirable"], counts["undesirable"]) == (12, 8, 4)
    assert summary["metrics"]["loss"] == pytest.approx(float(metrics(finished)[2]["loss"]))
    assert summary["metrics"].keys() >= {"val/loss", "val/rewards/auroc", "val/rewards/accuracies"}
    assert [row["step"] for row in metrics(finished) if "loss" in row] == ["0", "1", "2"]
    assert sum("val/loss" in row for row in metrics(finished)) == 1


def test_the_saved_config_reproduces_the_run(finished, tmp_path):
    main(["fit", f"--config={finished}/config.yaml", f"--run_dir={tmp_path}/again"])
    assert metrics(tmp_path / "again") == metrics(finished)
    first, again = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (finished, tmp_path / "again"))
    for each in (first, again):
        each.pop("run_dir")
        each["trainer"].pop("default_root_dir")
    assert again == first


def test_settings_that_lightning_refuses_late_or_breaks_on_are_refused(data, tiny_folder, no_model, tmp_path, capfd):
    for option, said in {
        "strategy=fsdp": "trainer.strategy fsdp is not supported",
        "strategy=deepspeed_stage_3": "Use fsdp2",
        "overfit_batches=1": "Use --trainer.limit_train_batches",
        "enable_checkpointing=false": "checkpoints/last.ckpt",
    }.items():
        words = fit(tiny_folder, "kto", data["binary"], tmp_path / "run", f"--trainer.{option}")
        assert said in refused(capfd, words), option
    assert not (tmp_path / "run").exists()


def test_errors_do_not_print_the_usage(data, tiny_folder, tmp_path, capfd):
    words = fit(tiny_folder, "kto", data["binary"], tmp_path / "run")
    said = refused(capfd, [*words, "--model.value_function.beta=abc"], status=2)
    assert "beta is 'abc'" in said
    assert "LogSigmoid" not in said  # the class is right
    assert len(refused(capfd, [*words, "--data.trian=x"], status=2).splitlines()) == 1
    named = refused(capfd, ["foo"], status=2)
    assert all(command in named for command in ("fit", "check", "data", "ablate"))


def test_python_m_names_the_program_halos(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["/somewhere/halos_pl/__main__.py"])
    assert refused(capfd, ["fit", "--nope"], status=2).startswith("halos fit: ")


def test_evaluation_uses_the_checkpoint_of_the_run(run, data, capfd):
    """Otherwise it would silently measure the untrained model."""
    words = [f"--config={run}/config.yaml", f"--run_dir={run}"]
    main(["test", *words, "--ckpt_path=last"])
    wanted = json.loads((run / "test.json").read_text())
    main(["test", *words])
    assert json.loads((run / "test.json").read_text()) == wanted
    assert wanted["step"] == json.loads((run / "summary.json").read_text())["steps"]
    assert abs(wanted["test/rewards/chosen"]) > 0


def test_resuming_a_finished_run_reports_that_and_keeps_its_summary(data, tiny_folder, tmp_path, caplog):
    words = fit(tiny_folder, "kto", data["binary"], tmp_path / "run", "--trainer.max_steps=2")
    main(words)
    before = (tmp_path / "run" / "summary.json").read_text()
    main([*words, "--ckpt_path=last"])
    assert "nothing was left to train" in caplog.text
    assert (tmp_path / "run" / "summary.json").read_text() == before
    (tmp_path / "run" / "summary.json").unlink()  # as where the kill came between the last checkpoint and the summary
    main([*words, "--ckpt_path=last"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_a_users_own_logger_does_not_replace_metrics_csv(data, tiny_folder, tmp_path, caplog):
    own = ("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/own")
    main(fit(tiny_folder, "kto", data["binary"], tmp_path / "run", "--trainer.max_steps=1", *own))
    assert len(metrics(tmp_path / "run")) == 1
    assert list((tmp_path / "own").rglob("metrics.csv"))
    assert f"other loggers wrote to {tmp_path}/own" in caplog.text


def test_commands_that_would_measure_nothing_are_refused(run, capfd):
    words = ["test", f"--config={run}/config.yaml", f"--run_dir={run}", "--trainer.limit_test_batches=0"]
    assert "trainer.limit_test_batches is 0" in refused(capfd, words)


def test_validate_and_test(run):
    main(["validate", f"--config={run}/config.yaml", f"--run_dir={run}", "--ckpt_path=last"])
    main(["test", f"--config={run}/config.yaml", f"--run_dir={run}", "--ckpt_path=last"])
    found = json.loads((run / "test.json").read_text())
    logged = next(row for row in metrics(run) if "val/loss" in row)
    for name in ("loss", "rewards/auroc", "rewards/accuracies", "rewards/chosen", "outcome/u"):
        assert found[f"test/{name}"] == pytest.approx(float(logged[f"val/{name}"]), rel=1e-5, abs=1e-6)
    assert found["test/kl/token"] >= 0
    assert found["test/kl/sequence"] > found["test/kl/token"]


@pytest.mark.parametrize("kind", ["pairs", "binary"])
def test_predict(run, data, kind):
    words = ["predict", f"--config={run}/config.yaml", f"--run_dir={run}", "--ckpt_path=last"]
    main([*words, f"--data.predict={data[kind]}"])
    records = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == {"pairs": 24, "binary": 12}[kind]
    assert len({record["row"] for record in records}) == len(records)
    keys = ["row", "desirable", "tokens", "policy_logp", "reference_logp", "r", "z0", "u", "value"]
    for record in records:
        assert list(record) == keys
        assert record["r"] == pytest.approx(record["policy_logp"] - record["reference_logp"], abs=1e-4)
        assert record["u"] == pytest.approx(record["r"] - record["z0"], abs=1e-5)
        # kto.yaml reflects undesirable rows, and its value function is the logistic one.
        perceived = record["u"] if record["desirable"] else -record["u"]
        assert record["value"] == pytest.approx(1 / (1 + math.exp(-0.1 * perceived)), abs=1e-6)
    assert any(record["r"] != 0 for record in records)


def test_predictions_of_dpo(tiny_folder, data, tmp_path):
    main(fit(tiny_folder, "dpo", data["pairs"], tmp_path / "run", "--trainer.max_steps=2"))
    words = [f"--config={tmp_path}/run/config.yaml", "--ckpt_path=last", f"--data.predict={data['pairs']}"]
    main(["predict", *words])
    records = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    rewards = {record["row"]: record["r"] for record in records}
    for record in records:
        base, _, side = record["row"].rpartition("#")
        pair = f"{base}#{'rejected' if side == 'chosen' else 'chosen'}"
        assert record["z0"] == pytest.approx(rewards[pair], abs=1e-6)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_commands_on_a_run_do_not_change_its_other_files(run, data, command):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    option = f"--data.{ {'validate': 'validation'}.get(command, command) }={data['pairs']}"
    main([command, f"--config={run}/config.yaml", f"--run_dir={run}", "--ckpt_path=last", option])
    assert {p: p.read_bytes() for p in before} == before


# -- a loss that is no number ---------------------------------------------------------------------------


def test_a_non_finite_loss_stops_the_run(tiny_folder, data, tmp_path, capfd):
    run = tmp_path / "run"
    options = ("--model.value_function=plugins.fragile.NaNAtStep", "--model.value_function.step=2")
    more = ("--checkpoint.every_n_steps=1", "--data.shuffle=false")
    said = refused(capfd, fit(tiny_folder, "kto", data["binary"], run, *options, *more))
    said = said[said.index("halos: NonFiniteLossError") :]
    assert "the loss is nan at optimizer step 2" in said
    assert f"rows with a non-finite log-prob or value: {data['binary']}:9\n" in said
    names = ", ".join(f"{data['binary']}:{line}" for line in (9, 10, 11, 12))
    assert f"rows of the step: {names}\n" in said
    assert f"last good checkpoint: {run}/checkpoints/last.ckpt" in said
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert [row["step"] for row in metrics(run)] == ["0", "1"]


def test_resuming_from_another_runs_checkpoint_moves_the_existing_run_aside(tiny_folder, data, tmp_path):
    for name in ("one", "two"):
        main(fit(tiny_folder, "kto", data["binary"], tmp_path / name, "--trainer.max_steps=2"))
    before = {p.relative_to(tmp_path / "two"): p.read_bytes() for p in (tmp_path / "two").rglob("*") if p.is_file()}
    from_one = ("--trainer.max_steps=3", f"--ckpt_path={tmp_path}/one/checkpoints/last.ckpt")
    main(fit(tiny_folder, "kto", data["binary"], tmp_path / "two", *from_one))
    assert {p: (tmp_path / "two.1" / p).read_bytes() for p in before} == before
    assert [row["step"] for row in metrics(tmp_path / "two")] == ["2"]
    assert (tmp_path / "two" / "config.yaml").is_file()


def test_a_non_finite_loss_at_the_first_step(tiny_folder, data, tmp_path, capfd):
    options = ("--model.value_function=plugins.fragile.NaNAtStep", "--model.value_function.step=0")
    said = refused(capfd, fit(tiny_folder, "kto", data["binary"], tmp_path / "run", *options))
    assert "last good checkpoint: none was written yet" in said


# -- export ---------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 9, 17, 33, 80, 120], [7, 200, 90, 91, 4, 6]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def trained(run: Path, spec: ModelSpec) -> torch.Tensor:
    """Logits of the policy in a run's checkpoint."""
    policy = load_model(spec)
    before = logits(policy)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    state = {k.removeprefix("scorer.model."): v for k, v in state.items() if k.startswith("scorer.")}
    assert not policy.load_state_dict(state, strict=False).unexpected_keys
    after = logits(policy)
    assert not torch.equal(after, before)
    return after


def test_export_of_a_full_model(run, tiny_folder, tmp_path, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["export", str(run), str(tmp_path / "model")])
    assert f"wrote the model of {run} to {tmp_path}/model" in capfd.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(exported), trained(run, ModelSpec(str(tiny_folder))))
    first = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert exported.config.attention_dropout == first.config.attention_dropout
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "model", tiny_folder)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert "--adapter" in refused(capfd, ["export", str(run), str(tmp_path / "other"), "--adapter=true"])
    assert not (tmp_path / "other").exists()


def test_export_of_an_adapter_merged_and_alone(tiny_folder, data, tmp_path, capfd):
    from transformers import AutoModelForCausalLM

    options = ("--model.policy.lora={r: 4, alpha: 8}", "--model.optimizer.init_args.lr=1e-2")
    main(fit(tiny_folder, "kto", data["binary"], tmp_path / "run", *options))
    expected = trained(tmp_path / "run", ModelSpec(str(tiny_folder), lora=LoRASpec(r=4, alpha=8)))
    main(["export", str(tmp_path / "run"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-4)
    main(["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter=true"])
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(adapter), expected, rtol=1e-5, atol=1e-5)
    # Loaders would put an adapter on the model beside it; a whole model takes the place of an adapter.
    shutil.copytree(tmp_path / "merged", tmp_path / "model")
    words = ["export", str(tmp_path / "run"), str(tmp_path / "model"), "--adapter=true", "--overwrite=true"]
    assert f"{tmp_path}/model contains a model" in refused(capfd, words)
    shutil.copytree(tmp_path / "adapter", tmp_path / "both")
    main(["export", str(tmp_path / "run"), str(tmp_path / "both"), "--overwrite=true"])
    assert not list((tmp_path / "both").glob("adapter_*"))
    torch.testing.assert_close(logits(load_model(ModelSpec(str(tmp_path / "both")))), expected, rtol=1e-5, atol=1e-4)
    # Trained on from there it is what it was, with a new adapter and without one.
    for spec in (ModelSpec(str(tmp_path / "adapter")), ModelSpec(str(tmp_path / "adapter"), lora=LoRASpec(r=2))):
        further = load_model(spec)
        assert any(p.requires_grad for p in further.parameters())
        torch.testing.assert_close(logits(further), expected, rtol=1e-5, atol=1e-4)


def test_an_exported_model_has_the_dropout_of_its_base(tiny_gpt2_folder, data, tmp_path):
    """Dropout is off in the run, but later training of the exported model should keep the base's."""
    main(fit(tiny_gpt2_folder, "kto", data["binary"], tmp_path / "run", "--trainer.max_steps=1"))
    main(["export", str(tmp_path / "run"), str(tmp_path / "model")])
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tiny_gpt2_folder, tmp_path / "model")
    )
    assert after["attn_pdrop"] == before["attn_pdrop"] == 0.1


def test_a_trial_run_does_not_change_the_existing_run(tiny_folder, data, tmp_path):
    words = fit(tiny_folder, "kto", data["binary"], tmp_path / "run")
    main(words)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    main([*words, "--trainer.fast_dev_run=true"])
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "run.1").exists()


def test_a_callback_that_gathers_gradients_is_refused(tiny_folder, data, tmp_path, capfd):
    words = fit(tiny_folder, "kto", data["binary"], tmp_path / "run")
    added = ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"]
    assert "GradientAccumulationScheduler" in refused(capfd, [*words, *added])


def test_a_run_without_an_end_is_refused(tiny_folder, data, tmp_path, capfd):
    words = fit(tiny_folder, "kto", data["binary"], tmp_path / "run")
    said = refused(capfd, [*words, "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:05"])
    assert "trainer.max_steps" in said


def test_export_refuses_a_folder_that_is_not_empty(run, tmp_path, capfd):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert f"{folder} is not empty" in refused(capfd, ["export", str(run), str(folder)])
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    main(["export", str(run), str(folder), "--overwrite=true"])
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "config.json").is_file()


def test_export_refuses_a_folder_without_a_run(tmp_path, capfd):
    said = refused(capfd, ["export", str(tmp_path), str(tmp_path / "model")])
    assert f"{tmp_path} is not the folder of a run" in said
    assert not (tmp_path / "model").exists()


def test_exported_models_can_be_trained_and_sampled(run, data, tmp_path):
    main(["export", str(run), str(tmp_path / "model")])
    main(fit(tmp_path / "model", "kto", data["binary"], tmp_path / "next", "--trainer.max_steps=1"))
    assert float(metrics(tmp_path / "next")[0]["loss"]) == 0.5
    (tmp_path / "prompts.txt").write_text("question 1\nquestion 2\n")
    words = ["sample", str(tmp_path / "model"), f"--prompts={tmp_path}/prompts.txt", "--max_new_tokens=3"]
    main([*words, f"--out={tmp_path}/out.jsonl"])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
