"""Files of prompts for ``halos sample`` and ``halos evaluate``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.data.columns import prompt_in_context
from halos_pl.data.example import DataError, Example, Prompt, short
from halos_pl.data.formats import irregular
from halos_pl.data.parsers import GOLD
from halos_pl.data.prompts import TextPrompts, convention
from halos_pl.data.schemas import SCHEMAS, of_other_schemas
from halos_pl.data.source import Source
from halos_pl.data.values import BadRow
from halos_pl.data.weights import OF_JUDGEMENTS


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its row in the file.

    Attributes:
        place: ``PATH:LINE``, for messages.
        name: ``FILE:LINE`` without the folder, so that it does not depend on where the file is.
        columns: the whole row as in the file; for a ``.txt`` file only ``prompt``.
        prompt: text or messages, with the system text and earlier turns from other columns of the row.
        is_text: whether the file has the prompt as plain text, even if it has become messages.
        tools: JSON schemas of the tools that the model may call; None if there are none.
    """

    place: str
    name: str
    columns: dict[str, Any]
    prompt: Prompt
    is_text: bool
    tools: list[dict[str, Any]] | None = None

    @property
    def number(self) -> int:
        """Its line in the file, from 1."""
        return int(self.name.rpartition(":")[2])


#: The column that marks sampled answers whose text, in training, gives exactly the sampled tokens.
SAME_TOKENS = "same_tokens"
#: Columns of sampled answers with the sum of their tokens' log-probs, and those of each token; in nats.
LOGPROB, TOKEN_LOGPROBS = "logprob", "token_logprobs"
#: The column with the seed of each answer.
SEED = "seed"
#: Columns with the line of the prompt in its file, and with the index of the answer if each has a row of its own.
PROMPT_ROW, SAMPLE_INDEX = "prompt_row", "sample_index"

#: Columns with answers to a prompt or judgements of them, which do not belong to newly sampled answers. A gold answer
#: belongs to the prompt.
ANSWERS = frozenset(
    name
    for schema in SCHEMAS.values()
    if "prompt" in schema.columns or schema.name == "implicit"
    for column in schema.columns
    for name in column.split("|")
    if name not in GOLD
) - {"prompt"} | {"finished", SAME_TOKENS, LOGPROB, TOKEN_LOGPROBS, SEED, PROMPT_ROW, SAMPLE_INDEX, *OF_JUDGEMENTS}

#: Schemas of sampled answers once they are labelled.
_LABELLED = ("unpaired", "paired", "scored", "scored_lists")


def kept_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a prompt's row that go with new answers to it.

    Left out are ``prompt``, columns of other answers, and those with which ``halos fit`` would take labelled rows for
    another format.
    """
    kept = {name: value for name, value in columns.items() if name not in ANSWERS and name != "prompt"}
    other = of_other_schemas(kept, _LABELLED) - {*GOLD}
    return {name: value for name, value in kept.items() if name not in other}


def left_out(rows: Sequence[PromptRow], prompt_column: str | None) -> str:
    """The columns that new answers leave out, and why; empty if there are none.

    Args:
        rows: the prompts.
        prompt_column: see :func:`read_prompt_rows`.
    """
    lost = {name for row in rows for name in row.columns.keys() - kept_columns(row.columns).keys() - {"prompt"}}
    replaced = {"prompt"} if prompt_column and any("prompt" in row.columns for row in rows) else set[str]()
    reasons = (
        ("they belong to other answers", lost & ANSWERS),
        ("halos fit would take the rows for another format", lost - ANSWERS),
        (f"it gets the prompts of {prompt_column}", replaced if prompt_column != "prompt" else ()),
    )
    return "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in reasons if names)


#: Endings of compressed and tabular files, which are no prompt files.
_OTHER = (".gz", ".zst", ".csv", ".parquet", ".arrow")


def _lines(path: Path, most: int) -> Iterator[bytes]:
    """The lines of a file; a line longer than ``most`` + 1 bytes comes in pieces."""
    with path.open("rb") as file:
        # Lines end only at \n: JSON may contain U+2028 and the like.
        while raw := file.readline(most + 1):
            yield raw


def read_prompts(path: Path) -> list[Prompt]:
    """Only the prompts of :func:`read_prompt_rows`, with text unchanged."""
    return [row.prompt for row in read_prompt_rows(path)]


def read_prompt_rows(
    path: Path, text_prompts: TextPrompts = "plain", prompt_column: str | None = None
) -> list[PromptRow]:
    """The prompts of a file.

    A ``.txt`` file has one per line; each JSON line has one, a text or a message list.

    Args:
        path: the file.
        text_prompts: encoding of plain-text prompts, see :mod:`halos_pl.data.prompts`.
        prompt_column: the column of JSON lines that holds the prompt; default: ``prompt``.

    Raises:
        DataError: the file is missing or empty, or a line has no prompt; names file and line.
    """
    column, is_lines = prompt_column or "prompt", path.suffix == ".txt"
    if prompt_column and is_lines:
        raise DataError(f"{path}: a .txt file has no columns; omit --prompt_column, or name a file of JSON lines")
    if what := irregular(str(path)):
        raise DataError(f"{path}: is {what}; write its content to a file, and name that")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {what}; --prompts takes a .txt file, or JSON lines, each with a '{column}'")
    if path.suffix.lower() in _OTHER:
        raise DataError(f"{path}: --prompts takes a .txt file or uncompressed JSON lines; convert the file")
    rows: list[PromptRow] = []
    most = Source(str(path)).max_row
    for number, raw in enumerate(_lines(path, most), start=1):
        place = f"{path}:{number}"
        if len(raw) > most:  # tokenising it would take minutes and gigabytes of memory
            raise DataError(f"{place}: the line is longer than {most / 1e6:g} MB; remove or shorten it")
        try:
            line = raw.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 text; save it as UTF-8") from error
        if line.strip():
            columns = {"prompt": line} if is_lines else _row(line, place, column)
            example, is_text = _example(columns, place, column, text_prompts), isinstance(columns[column], str)
            rows.append(PromptRow(place, f"{path.name}:{number}", columns, example.prompt, is_text, example.tools))
    if not rows:
        raise DataError(f"{path}: the file contains no prompts; add one per line")
    return rows


def prompt_row(columns: dict[str, Any], name: str, text_prompts: TextPrompts) -> PromptRow:
    """A row that is in no file.

    Args:
        columns: its columns, among them ``prompt``.
        name: its name, also in messages.
        text_prompts: encoding of a plain-text prompt.

    Raises:
        DataError: the prompt is invalid; names the row.
    """
    example = _example({"prompt": columns["prompt"]}, name, "prompt", text_prompts)
    return PromptRow(name, name, columns, example.prompt, isinstance(columns["prompt"], str), example.tools)


def say_convention(rows: list[PromptRow], text_prompts: TextPrompts, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints how plain-text prompts are encoded.

    Raises:
        DataError: they should go through a chat template, but there is none.
    """
    texts = [row for row in rows if row.is_text]
    if texts and text_prompts == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"{texts[0].place}: a text prompt cannot go through a chat template (text_prompts: chat), because the"
            " tokenizer has none; name one with chat_template, or set text_prompts: plain"
        )
    if line := convention(len(texts), text_prompts, bool(tokenizer.chat_template)):
        print(f"halos: {line}")


def _row(line: str, place: str, column: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSONDecodeError alone
        raise DataError(f'{place}: not a JSON object with "{column}", one per line') from error
    if not isinstance(row, dict):
        raise DataError(f'{place}: not a JSON object with "{column}", one per line')
    if column not in row:
        has = ", ".join(map(short, list(row)[:8])) or "none"
        raise DataError(f"{place}: no column '{column}' (columns: {has}); --prompt_column names another one")
    return row


def _example(columns: dict[str, Any], place: str, column: str, text_prompts: TextPrompts) -> Example:
    row = columns if column == "prompt" else {k: v for k, v in columns.items() if k != column}
    try:
        return prompt_in_context(row | {"prompt": columns[column]}, text_prompts)
    except BadRow as bad:
        name = column if bad.column == "prompt" else bad.column
        raise DataError(f"{place}: column '{name}'{bad.within} {bad.reason}") from bad
