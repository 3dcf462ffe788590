"""Checks online training before its first stage: parses the command of every stage, reads the prompts and the
configurations of the models, and asks for the judge's server; reads no weights.

The settings that it returns are those that may not change between the rounds.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import yaml

from halos_pl.common.messages import counted
from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import PromptRow, left_out, read_prompt_rows
from halos_pl.evaluation.arguments import check_arguments, digest_of
from halos_pl.evaluation.evaluate import ARGUMENTS
from halos_pl.evaluation.judging import judged_by
from halos_pl.evaluation.metrics import CODE
from halos_pl.labelling.labellers import Labeller, named_labeller
from halos_pl.labelling.options import refuse_unused, thresholds_of
from halos_pl.policy.loading import load_tokenizer, stored_config
from halos_pl.policy.spec import ModelError
from halos_pl.rounds import identity
from halos_pl.rounds.spec import SAMPLED, TEXT, Round, Rounds, RoundsError, rounds_of
from halos_pl.rounds.state import finished
from halos_pl.sampling.engine import SamplingSettings
from halos_pl.study.preflight import PLACEMENT, parser_error
from halos_pl.training.settings import aside, flat

#: Settings of a fit that halos rounds sets for each round, or that depend on the machine.
_PER_ROUND = ("run_dir", "seed_everything", "data.train", "model.reference_model", "trainer.callbacks", *PLACEMENT)
#: Settings of a server that decide how requests reach it, but not what it answers.
_CONNECTION = ("url", "api_key_env", "concurrency", "timeout", "retries", "price_in", "price_out")


class CommandLine(Protocol):
    """The parsers of the command line, which the command passes in. Both print their errors and exit."""

    @property
    def user_errors(self) -> tuple[type[Exception], ...]:
        """Errors that a user can fix."""

    def fit(self, words: list[str]) -> Any:
        """A LightningCLI with ``config``, ``parser``, ``trainer``, ``model`` and ``datamodule`` of ``halos fit``."""

    def tool(self, name: str, words: list[str]) -> Mapping[str, Any]:
        """The arguments of another command, by name."""


@dataclass(frozen=True)
class Checked:
    """The results of the check.

    Attributes:
        prompts: The prompts to sample completions of.
        held_out: The held-out prompts, without repetitions.
        text: Options that decide how text becomes tokens, see :meth:`halos_pl.rounds.spec.Round.words`.
        like: Settings of the policy for a reference that is loaded from a folder, see ``words``.
        settings: Settings that may not change, by key: plain values.
        notes: Lines for the user.
    """

    prompts: Sequence[PromptRow]
    held_out: Sequence[PromptRow]
    text: Mapping[str, Any]
    like: Mapping[str, Any]
    settings: Mapping[str, Any]
    notes: Sequence[str]


def check(study: Rounds, line: CommandLine, out: Path) -> Checked:
    """Refuses settings, prompts and labellers that a later stage would refuse.

    Args:
        study: The settings.
        line: The parsers.
        out: Folder of all rounds. Without a stage that is left to label, reward models and servers are not checked.

    Raises:
        RoundsError: Names the line of the file.
    """
    first = Round(study, out, 1)
    cli = _fit(study, first, line)
    _check_reference(study, cli)
    if cli.model.objective.needs.scalar:
        raise RoundsError(
            f"{study.place('fit', 'objective')}: {study.objective} trains a reward model, which writes no answers;"
            " choose an objective for a language model, or train it with halos fit"
        )
    text = {name: getattr(cli.datamodule, name) for name in TEXT}
    spec = cli.model.models.spec
    like = {name: getattr(spec, name) for name in ("dtype", "attn_implementation", "trust_remote_code")}
    parsed = {}
    for each in rounds_of(study, out):
        for stage in each.stages:
            if stage != "fit":
                words = each.words(stage, text, like)
                parsed[stage] = _parsed(study, stage, line, words)
    labellers = _check_arguments(study, parsed)
    encoding = parsed["evaluate"]["text_prompts"]
    prompts = _read(study, "prompts", encoding)
    repeated = _read(study, "held_out_prompts", encoding)
    held_out = _without_repetitions(study, repeated)
    _refuse_overlap(study, prompts, held_out)
    if study.label.get("form") == "binary" and cli.model.objective.needs.pairs:
        raise RoundsError(
            f"{study.place('label', 'form')}: label.form is binary, but {study.objective} compares pairs; set it to"
            " pairs"
        )
    if any({"label", "score"} & ({*each.stages} - finished(each).keys()) for each in rounds_of(study, out)):
        with _at(study.place("label", "by"), (ValueError, OSError)):
            for labeller in labellers:
                labeller.check()
    notes = []
    if len(held_out) < len(repeated):
        number = counted(len(repeated) - len(held_out), "repeated prompt")
        notes.append(f"{study.held_out_prompts}: {number} left out, so that every held-out prompt counts once")
    read = [(study.prompts, prompts), *([] if study.rule else [(study.held_out_prompts, held_out)])]
    for path, rows in read:
        if names := left_out(rows, study.column(path)):
            notes.append(f"columns of {path} that the labellers do not see: {names}")
    if unused := [f"sample.{name}" for name in ("top_p", "control") if name in study.sample]:
        notes.append(f"{' and '.join(unused)} set how completions are sampled, but not the held-out answers")
    return Checked(prompts, held_out, text, like, _settings(study, cli), notes)


@contextlib.contextmanager
def _at(place: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns a refusal of a parser, or one of these errors, into a :class:`RoundsError` at a place."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as error:
        raise RoundsError(f"{place}: {parser_error(printed.getvalue()) or error}") from error
    except errors as error:
        raise RoundsError(f"{place}: {str(error).removeprefix('model.policy.path: ')}") from error


def _fit(study: Rounds, first: Round, line: CommandLine) -> Any:
    """The command of the first fit, with its objects built."""
    words = first.words("fit", {}, {})[1:]
    with _at(f"{study.place('fit')}: fit", line.user_errors):
        cli = line.fit(words)
    with _at(f"{study.place('model')}: model", (ModelError,)):
        stored_config(cli.model.models.spec)
        load_tokenizer(cli.model.models.spec)
    with _at(f"{study.place('fit')}: fit", line.user_errors):
        cli.before_fit()
    return cli


def _check_reference(study: Rounds, cli: Any) -> None:
    model = cli.config.model
    if study.reference and model.get("reference_model") is not None:
        raise RoundsError(
            f"{study.place('reference')}: reference is {study.reference}, but fit sets model.reference_model; remove"
            " one of them"
        )
    if study.rounds > 1 and hasattr(type(cli.trainer.strategy), "sharding"):
        raise RoundsError(
            f"{study.place('fit')}: trainer.strategy fsdp2 shards the policy, which cannot start from the last round's"
            " checkpoint; choose ddp"
        )


def _parsed(study: Rounds, stage: str, line: CommandLine, words: list[str]) -> Mapping[str, Any]:
    key = "label" if stage == "score" else stage
    with _at(f"{study.place(key)}: {key}", line.user_errors):
        return line.tool(words[0], words[1:])


def _check_arguments(study: Rounds, parsed: Mapping[str, Mapping[str, Any]]) -> list[Labeller]:
    """Checks the arguments of all stages but ``fit``; returns the labellers."""
    sample, label = parsed["sample"], parsed["label"]
    with _at(f"{study.place('sample')}: sample", (ValueError,)):
        drawn = SamplingSettings(**{each.name: sample[each.name] for each in fields(SamplingSettings)})
        drawn.check(sample["batch_size"])
    evaluate = {name: parsed["evaluate"][name] for name in ARGUMENTS}
    with _at(f"{study.place('evaluate')}: evaluate", (ValueError,)):
        check_arguments(**evaluate)
    for key in (key for key in CODE if evaluate[key]):
        with _at(study.place("label" if key == "rule" else "evaluate"), (ValueError,)):
            judged_by(evaluate[key], key)
    with _at(study.place("label", "by"), (ValueError, OSError)):
        options: dict[str, Any] = {name: label[name] for name in ("batch_size", "text_prompts", "endpoint")}
        labellers = [named_labeller(name, **options, transcripts=None) for name in study.labellers]
    with _at(f"{study.place('label')}: label", (ValueError,)):
        refuse_unused(label, study.labellers)
        if label["form"] == "binary":
            thresholds_of(study.labellers, labellers, label["threshold"])
    if sample["n"] < 2 and label["form"] == "pairs":
        raise RoundsError(f"{study.place('sample')}: label.form pairs needs at least two completions; raise sample.n")
    return labellers


def _read(study: Rounds, key: str, text_prompts: Any) -> list[PromptRow]:
    path: Path = getattr(study, key)
    column = None if path.suffix == ".txt" else study.sample.get("prompt_column")
    try:
        return read_prompt_rows(path, text_prompts, column)
    except DataError as error:
        raise RoundsError(f"{study.place(key)}: {key}: {error}") from error


def _without_repetitions(study: Rounds, rows: Sequence[PromptRow]) -> list[PromptRow]:
    """The rows without repeated ones, as all prompts get the same number of answers.

    Raises:
        RoundsError: Rows with the same prompt differ in other columns.
    """
    first: dict[str, PromptRow] = {}
    for row in rows:
        before = first.setdefault(json.dumps(row.prompt), row)
        if before.columns != row.columns:
            raise RoundsError(
                f"{study.place('held_out_prompts')}: {row.place} repeats the prompt of {before.place} with other"
                " columns; remove one of them, as every held-out prompt counts once"
            )
    return list(first.values())


def _refuse_overlap(study: Rounds, prompts: Sequence[PromptRow], held_out: Sequence[PromptRow]) -> None:
    """Refuses held-out prompts that are trained on."""
    trained = {json.dumps(row.prompt): row.place for row in prompts}
    if both := [row for row in held_out if json.dumps(row.prompt) in trained]:
        raise RoundsError(
            f"{study.place('held_out_prompts')}: {len(both)} of {len(held_out)} held-out prompts are among the prompts,"
            f" such as {both[0].place} ({trained[json.dumps(both[0].prompt)]}); remove them from one of the files"
        )


def options_of(study: Rounds) -> dict[str, Any]:
    """The options of all stages but ``fit`` by dotted key, without those that decide how requests reach a server."""
    options: dict[str, Any] = {}
    for group in ("sample", "label", "evaluate"):
        connection = [f"{group}.endpoint.{name}" for name in _CONNECTION]
        flattened = flat(getattr(study, group), group)
        options |= {key: value for key, value in flattened.items() if key not in (group, *connection)}
    return options


def _settings(study: Rounds, cli: Any) -> dict[str, Any]:
    """The settings that all rounds share, as JSON values by key; files by their digest."""
    content: dict[str, Any] = {
        name: getattr(study, name)
        for name in ("model", "window", "seed", "answers", "reference", "optimizer", "offline")
    }
    content |= {"prompts": digest_of(str(study.prompts)), "held_out_prompts": digest_of(str(study.held_out_prompts))}
    content |= options_of(study)
    content["the content of model"] = identity.of_model(cli.model.models.spec)
    content |= {f"the content of label.by {name}": identity.of_labeller(name) for name in study.labellers}
    if judge := study.evaluate.get("judge"):
        content["the content of evaluate.judge"] = identity.of_file(judge.rpartition(":")[0])
    if win_rate := study.evaluate.get("win_rate"):
        content["the content of evaluate.win_rate"] = identity.of_file(win_rate)
    if study.offline and study.offline != SAMPLED:
        content["offline"] = digest_of(study.offline)
    if study.offline:  # the offline run takes as many steps as all rounds
        content["rounds"] = study.rounds
    dumped = yaml.load(cli.parser.dump(cli.config, skip_none=False), Loader=yaml.CSafeLoader)
    fit = aside(flat(dumped), wanted=False)
    content |= {
        f"fit: {key}": value
        for key, value in fit.items()
        if not any(key == name or key.startswith(f"{name}.") for name in _PER_ROUND)
    }
    content["fit: model.reference_model"] = fit.get("model.reference_model")
    return json.loads(json.dumps(content, default=str))  # type: ignore[no-any-return]
