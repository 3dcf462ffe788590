"""Tries out a study before its first run: parses every arm, builds its module, reads its data; loads no model."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import read_prompt_rows
from halos_pl.data.prompts import TextPrompts
from halos_pl.data.source import Source
from halos_pl.data.template import template_of
from halos_pl.evaluation.arguments import check_arguments, measuring
from halos_pl.evaluation.evaluate import ARGUMENTS
from halos_pl.evaluation.judging import judged_by
from halos_pl.evaluation.metrics import CODE, metric_of
from halos_pl.evaluation.precision import trained_in
from halos_pl.evaluation.win_rates import win_rates_of
from halos_pl.policy.spec import ModelError
from halos_pl.study.apart import check_apart, check_monitored
from halos_pl.study.contents import config_by_content, digest, is_users
from halos_pl.study.control import measured_on
from halos_pl.study.held_out import check_held_out
from halos_pl.study.planned_power import assumed
from halos_pl.study.results import control_of
from halos_pl.study.spec import Arm, Run, Study, StudyError
from halos_pl.tasks.options import benchmarks_of
from halos_pl.training.ending import epoch_steps, fit_steps
from halos_pl.training.monitors import check_monitors
from halos_pl.training.named_model import NamedModel
from halos_pl.training.optim import make_optimizer

#: Devices that every machine has, since those of a cluster's nodes are unknown.
PLACEMENT = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
}


class CommandLine(Protocol):
    """The parsers of the command line, which the command passes in. Both print their errors and exit."""

    @property
    def user_errors(self) -> tuple[type[Exception], ...]:
        """Errors that a user can fix."""

    def fit(self, words: list[str]) -> Any:
        """A LightningCLI with ``config``, ``parser``, ``trainer``, ``model`` and ``datamodule`` of ``halos fit``.

        Its ``before_fit`` refuses what cannot work with any data.
        """

    def evaluate(self, words: list[str]) -> Mapping[str, Any]:
        """The arguments of ``halos evaluate``, by name."""


@dataclass(frozen=True)
class CheckedArm:
    """The pre-flight's results for an arm.

    Attributes:
        steps: number of optimizer steps of a run.
        digest: digest of the resolved config and data, without seed and folder.
        content: the same, whatever the paths of files.
    """

    steps: int
    digest: str
    content: str


@dataclass(frozen=True)
class Checked:
    """The pre-flight's results for a study.

    Attributes:
        arms: results by arm; if an option is tuned, by arm and value.
        examples: number of prompts that the primary metric is measured on.
        measuring: a record of the evaluation, see :func:`halos_pl.evaluation.arguments.measuring`.
        validating: the same for the tuning runs; None if nothing is tuned.
        uncontrolled: why the positive control does not hold (yet); None if it does, or the study names none.
    """

    arms: Mapping[str, CheckedArm]
    examples: int
    measuring: Mapping[str, Any]
    validating: Mapping[str, Any] | None = None
    uncontrolled: str | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Digests by arm, or by arm and value."""
        return {name: arm.digest for name, arm in self.arms.items()}


def check(study: Study, line: CommandLine) -> Checked:
    """Tries out every arm, and the evaluation.

    Raises:
        StudyError: for the first arm that is not valid, two arms with the same config, and anything that cannot be
            measured; for validation data that are not apart from the report's or, for tuning, from those of training;
            and for a control that cannot be the study's.
    """
    try:
        assumed(study)
    except ValueError as error:
        raise StudyError(f"{study.places['power']}: power: {error}") from error
    arguments = evaluate_arguments(study, line)
    prompts = _check_evaluation(study, arguments)
    validating = None
    if study.tune is not None:
        validating = evaluate_arguments(study.validation, line)
        _check_evaluation(study.validation, validating)
    trained_on: list[tuple[str, list[Source]]] = []
    arms: dict[str, CheckedArm] = {}
    apart: list[list[Source]] = []
    by_digest: dict[str, Arm] = {}
    first: Any = None
    known: dict[str, str] = {}
    precisions: dict[str, str] = {}
    with _logged_once():
        for arm in study.variants:
            cli, checked = _check_arm(study, arm, line, known)
            if other := by_digest.get(checked.digest):
                raise StudyError(
                    f"{study.path}:{arm.line}: arm {arm.title!r} resolves to the same config as arm {other.title!r}"
                    f" (line {other.line}); change or remove one"
                )
            by_digest[checked.digest] = arm
            arms[arm.title] = checked
            trained_on.append((arm.name, cli.datamodule.sources["train"]))
            if (monitored := cli.datamodule.sources["validation"]) and monitored not in apart:
                check_monitored(f"{study.path}:{arm.line}: arm {arm.title!r}: data.validation", monitored, arguments)
                apart.append(monitored)
            precisions.setdefault(str(cli.trainer.precision), arm.name)
            first = first or cli
        if arguments["precision"] == "as_trained":
            _check_as_trained(study, precisions)
        held_out = check_held_out(study, arguments, first.model.tokenizer, first.datamodule)
        if validating is not None:
            check_held_out(study.validation, validating, first.model.tokenizer, first.datamodule)
            check_apart(f"{study.places['tune']}: tune", validating, arguments, trained_on)
    how = measuring(arguments)
    lacking = None
    if (control := control_of(study, measured_on(how))) is not None and not control.holds:
        lacking = control.why
    questions = _check_benchmarks(study, arguments, first)
    unit = metric_of(study.primary).unit
    examples = {"prompts": prompts, "questions": questions}.get(unit, held_out)
    return Checked(arms, examples, how, None if validating is None else measuring(validating), lacking)


def _check_as_trained(study: Study, arms: Mapping[str, str]) -> None:
    """Refuses arms that could not all be measured in the precision of their training; ``arms`` has one of each."""
    place = f"{study.places['evaluate']}: evaluate.precision is as_trained, but"
    for precision, arm in arms.items():
        if trained_in(precision) is None:
            raise StudyError(
                f"{place} arm {arm!r} is trained in {precision}, in which it cannot be measured; choose 32-true or"
                " bf16-mixed"
            )
    if len(arms) > 1:
        some = ", ".join(f"{precision} ({arm!r})" for precision, arm in arms.items())
        raise StudyError(f"{place} the arms are trained in {some}; choose one precision for all")


def _check_benchmarks(study: Study, arguments: Mapping[str, Any], first: Any) -> int:
    """Loads the benchmarks and checks that the first arm's model can answer them.

    Returns:
        the number of questions of the primary metric, if it is a benchmark.
    """
    try:
        benchmarks = benchmarks_of(arguments)
        if benchmarks is None:
            return 0
        from halos_pl.tasks.measure import prepare

        spec = first.model.models.spec
        text_prompts = arguments["text_prompts"] or first.datamodule.text_prompts
        named = NamedModel(spec.path, spec, None, None, {}, _template(arguments["chat_template"]))
        prepared = prepare(named, benchmarks, text_prompts, arguments["batch_size"], arguments["seed"])
    except (DataError, ModelError) as error:
        raise StudyError(f"{study.places['evaluate']}: evaluate: {error}") from error
    return prepared.questions(study.primary)


def _template(chat_template: str | None) -> str | None:
    return None if chat_template is None else template_of(chat_template, "--chat_template")


@contextlib.contextmanager
def _logged_once() -> Iterator[None]:
    """In this context, Lightning logs each message only once, since most arms have the same data and devices."""
    logged: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return message not in logged and not logged.add(message)  # type: ignore[func-returns-value]

    handlers = [h for name in ("lightning.pytorch", "lightning.fabric") for h in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def _check_arm(study: Study, arm: Arm, line: CommandLine, known: dict[str, str]) -> tuple[Any, CheckedArm]:
    """The command of an arm and what is found; ``known`` are digests of files by path."""
    words = arm.words("unused", study.seeds[0])[1:]
    # The digest covers the devices of a cluster's nodes all the same.
    placed = {} if study.cluster is None else {k: v for k, v in arm.options.items() if k in PLACEMENT}
    if study.cluster is not None:
        words += [f"--{key}={value}" for key, value in PLACEMENT.items()]
    printed, place = io.StringIO(), f"{study.path}:{arm.line}: arm {arm.name!r}"
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            cli = line.fit(words)
            if study.cluster is None:  # whose nodes may have other devices
                cli.before_fit()
            config = cli.config.clone()
            config.run_dir, config.seed_everything = "", 0
            config.trainer.default_root_dir = None
            steps = _steps(cli)
            data = [store.digest for store in cli.datamodule.stores("train")]
            dumped = cli.parser.dump(config, skip_none=False)
            code = _plugin_digests(dumped)
            content = config_by_content(yaml.load(dumped, Loader=yaml.CSafeLoader), known)
    except SystemExit as error:
        raise StudyError(f"{place}: {parser_error(printed.getvalue()) or error}") from error
    except line.user_errors as error:
        raise StudyError(f"{place}: {error}") from error
    except Exception as error:  # of Lightning, another library or a plug-in
        raise StudyError(f"{place}: {type(error).__name__}: {error}") from error
    if cli.model.objective.needs.scalar:
        raise StudyError(f"{place}: it trains a reward model, which writes no answers to measure; use halos fit")
    if study.tune is not None and _stands_still(cli.model):
        raise StudyError(
            f"{study.places['tune']}: tune: with {arm.candidate}, {arm.name!r} has a learning rate of 0, which trains"
            " nothing; remove the value"
        )
    resolved = dumped + repr(data) + "".join(map(repr, filter(None, (placed, code))))
    whole = hashlib.sha256(resolved.encode()).hexdigest()
    return cli, CheckedArm(steps, whole, digest([content, data, placed, code]))


def _stands_still(module: Any) -> bool:
    """Whether a module's learning rate is 0."""
    optimizer = make_optimizer(module.make_optimizer, [torch.nn.Parameter(torch.zeros(64, 64))])
    return all(group.get("lr") == 0 for group in optimizer.param_groups)


def _steps(cli: Any) -> int:
    """Optimizer steps of a fit, after reading and checking its data."""
    trainer, data = cli.trainer, cli.datamodule
    data.connect(tokenizer=lambda: cli.model.tokenizer, needs=cli.model.objective.needs)
    trainer.strategy._lightning_module = cli.model
    data.trainer = trainer
    trainer.state.fn = "fit"
    data.setup("fit")
    check_monitors(trainer, cli.model, data)
    return fit_steps(trainer, epoch_steps(trainer, data))


def _plugin_digests(config: str) -> list[str]:
    """SHA-256 digests of the user's files with plug-ins that a config names.

    Installed packages and halos_pl have a version or a revision, which the report names; a user's file may change
    between two runs.
    """
    digests = set()
    for path in set(re.findall(r"class_path: (\S+)", config)):
        module = sys.modules.get(path.rpartition(".")[0])
        file = Path(getattr(module, "__file__", None) or "")
        if file.is_file() and is_users(file):
            digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
    return sorted(digests)


def parser_error(printed: str) -> str:
    """The error that a parser printed, without usage and hints."""
    message = printed.partition("error: ")[2] or printed
    lines = message.partition("\nAll options: ")[0].splitlines()
    return "\n".join(line for line in lines if line.strip())


def evaluate_arguments(study: Study, line: CommandLine) -> dict[str, Any]:
    """The arguments of ``halos evaluate`` for the study's runs, as its parser reads them.

    Raises:
        StudyError: if it refuses them.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            arguments = line.evaluate(study.evaluation(Run(study.arms[0], 0, Path("unused")))[1:])
    except SystemExit as error:
        raise StudyError(f"{study.places['evaluate']}: evaluate: {parser_error(printed.getvalue())}") from error
    except ValueError as error:  # a setting of the judge's endpoint
        raise StudyError(f"{study.places['evaluate']}: evaluate: {error}") from error
    return {name: arguments[name] for name in ARGUMENTS}


def _check_evaluation(study: Study, arguments: Mapping[str, Any]) -> int:
    """Checks the arguments of the evaluation, the functions that it calls and its prompts.

    Returns:
        the number of different prompts; one that is listed twice is one example.
    """
    try:
        check_arguments(**arguments)
    except DataError as error:
        raise StudyError(f"{study.places['evaluate']}: evaluate: {error}") from error
    for key in CODE:
        if arguments[key]:
            try:
                judged_by(arguments[key], key)
            except ValueError as error:
                raise StudyError(f"{study.places[key]}: {key}: {error}") from error
    try:
        win_rates = win_rates_of(**arguments)
    except ValueError as error:
        raise StudyError(f"{study.places['win_rate']}: win_rate: {error}") from error
    if not arguments["prompts"]:
        return len(win_rates.judge.questions()) if win_rates else 0
    text_prompts: TextPrompts = arguments["text_prompts"] or "chat"
    try:
        rows = read_prompt_rows(Path(arguments["prompts"]), text_prompts, arguments["prompt_column"])
    except DataError as error:
        raise StudyError(f"{study.places['prompts']}: prompts: {error}") from error
    return len({json.dumps(row.prompt) for row in rows})
