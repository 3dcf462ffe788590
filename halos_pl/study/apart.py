"""Checks that validation data share no prompt with the data of the report and, for tuning, with the training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.messages import counted
from halos_pl.data.example import DataError, Example
from halos_pl.data.prompt_files import read_prompt_rows
from halos_pl.data.read import read
from halos_pl.data.same_prompt import words_of
from halos_pl.data.source import Source
from halos_pl.data.sources import sources_of
from halos_pl.study.spec import StudyError

#: Number of rows that an error names.
SHOWN = 3
_REPORT = "the data of the report (evaluate)"


def check_apart(
    place: str, validation: Mapping[str, Any], arguments: Mapping[str, Any], trained_on: list[tuple[str, list[Source]]]
) -> None:
    """Refuses a tuning split that shares a prompt with other data: an example is everything about one prompt.

    Args:
        place: file, line and key of ``tune``.
        validation: arguments of ``halos evaluate`` for the tuning runs.
        arguments: those for the report.
        trained_on: sources of the training data by arm.

    Raises:
        StudyError: names the rows.
    """
    others = [(_REPORT, _prompts_of(arguments))]
    seen: list[list[Source]] = []
    for arm, sources in trained_on:
        if sources not in seen:
            seen.append(sources)
            others.append((f"the training data of arm {arm!r}", _prompts_in(sources)))
    _refuse_shared(place, _prompts_of(validation), others)


def check_monitored(place: str, sources: list[Source], arguments: Mapping[str, Any]) -> None:
    """Refuses ``data.validation`` that shares a prompt with the report: checkpoints and stops may be chosen by it.

    Args:
        place: file, line and key of the arm's ``data.validation``.
        sources: its sources.
        arguments: arguments of ``halos evaluate`` for the report.

    Raises:
        StudyError: names the rows.
    """
    _refuse_shared(place, _prompts_in(sources), [(_REPORT, _prompts_of(arguments))])


def _refuse_shared(
    place: str, own: Iterator[tuple[str, str]], others: list[tuple[str, Iterator[tuple[str, str]]]]
) -> None:
    """Refuses prompts that are also in other data; each comes with what it is called."""
    rows: dict[str, str] = {}
    try:
        for key, row in own:
            rows.setdefault(key, row)
        for what, prompts in others:
            _refuse(place, rows, prompts, what)
    except (DataError, OSError) as error:
        raise StudyError(f"{place}: {error}") from error


def _refuse(place: str, own: Mapping[str, str], others: Iterator[tuple[str, str]], what: str) -> None:
    shared: dict[str, str] = {}
    for key, row in others:
        if key in own:
            shared.setdefault(own[key], row)
    if shared:
        rows = [f"{mine} (there {other})" for mine, other in [*shared.items()][:SHOWN]]
        more = f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
        number = f"{counted(len(shared), 'prompt')} of its validation data {'is' if len(shared) == 1 else 'are'}"
        raise StudyError(f"{place}: {number} also in {what}: {', '.join(rows)}{more}; remove these rows on one side")


def _prompts_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The prompts of an evaluation's held-out data and prompt file, with the names of their rows."""
    yield from _prompts_in(sources_of("predict", arguments["held_out"]))
    if arguments["prompts"]:
        for row in read_prompt_rows(Path(arguments["prompts"]), "plain", arguments["prompt_column"]):
            yield words_of(row.prompt), row.place


def _prompts_in(sources: list[Source]) -> Iterator[tuple[str, str]]:
    for source in sources:
        for item in read(source):
            if isinstance(item, Example):
                yield words_of(item.prompt), item.row_id
