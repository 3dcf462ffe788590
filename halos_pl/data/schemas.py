"""Row schemas: which columns a row needs, and the function that reads it.

A new schema is one function in ``parsers`` and one entry of ``SCHEMAS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from halos_pl.data import parsers
from halos_pl.data.example import short
from halos_pl.data.parsers import PAIRS_OF_SCORES, Parse
from halos_pl.data.published import Trees, pandalm, shp, ultrafeedback
from halos_pl.data.values import BadRow
from halos_pl.data.weights import VOTES


@dataclass(frozen=True)
class Schema:
    """A set of columns, and how a row that has them is read.

    Attributes:
        name: its name, as in ``Source.schema``.
        columns: required columns; ``a|b`` is either of two.
        also: optional columns, as a regular expression.
        parse: reads one row; None with ``prepare``.
        without: columns that rule the schema out.
        prepare: makes ``parse`` from all rows of the source, if a row cannot be read alone.
        reads: with ``prepare``, the columns to keep in memory.
        conversation: the judged text is a whole conversation, not the answer to a prompt.
    """

    name: str
    columns: tuple[str, ...]
    parse: Parse | None = None
    also: str = ""
    without: tuple[str, ...] = ()
    prepare: Callable[[Iterable[dict[str, Any]]], Parse] | None = None
    reads: tuple[str, ...] = ()
    conversation: bool = False

    def lacks(self, columns: Iterable[str]) -> list[str]:
        """The required columns that are not among ``columns``."""
        present = set(columns)
        return [column for column in self.columns if present.isdisjoint(column.split("|"))]


# Columns that may hold the prompt; with one of them, "what both completions begin with" would be a guess.
_PROMPTS = ("instruction", "question", "query", "input", "history", "context", "context_messages")
_JUDGED = f"label|kto_tag|finished|{VOTES}"
_PAIR = "|".join(name for names in PAIRS_OF_SCORES for name in names) + "|margin|(chosen_|rejected_)?finished"
_PAIR += f"|{VOTES}"

SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("unpaired", ("prompt", "completion", "label"), parsers.unpaired, f"score|kto_tag|finished|{VOTES}"),
        Schema("paired", ("prompt", "chosen", "rejected"), parsers.paired, _PAIR),
        Schema("triple", ("prompt", "chosen", "rejected", "|".join(parsers.GOLD)), parsers.triple, _PAIR),
        Schema("implicit", ("chosen", "rejected"), parsers.implicit, _PAIR, _PROMPTS),
        Schema("halos_binary", ("prompt", "output", "label"), parsers.halos_binary, f"reward|{VOTES}"),
        Schema("halos_pairwise", ("prompt", "output_A", "output_B", "label"), parsers.halos_pairwise, "reward_[AB]"),
        Schema(
            "messages",
            ("messages", "kto_tag|label"),
            parsers.judged_conversation("messages", ("kto_tag", "label")),
            _JUDGED,
            conversation=True,
        ),
        Schema(
            "messages_pair",
            ("messages", "chosen", "rejected"),
            parsers.conversation_pair("messages"),
            _PAIR,
            ("prompt",),
        ),
        Schema(
            "sharegpt_pair", ("conversations", "chosen", "rejected"), parsers.conversation_pair("conversations"), _PAIR
        ),
        Schema(
            "sharegpt",
            ("conversations", "kto_tag|label"),
            parsers.judged_conversation("conversations", ("kto_tag", "label")),
            _JUDGED,
            conversation=True,
        ),
        Schema("scored", ("prompt", "completion", "score|rating|rank"), parsers.scored, "finished", without=("label",)),
        Schema("scored_lists", ("prompt", "completions", "scores"), parsers.scored_lists, "finished"),
        Schema("ultrafeedback", ("instruction", "completions"), ultrafeedback),
        Schema("shp", ("history", "human_ref_A", "human_ref_B", "labels"), shp, "score_[AB]"),
        Schema("pandalm", ("instruction", "response1", "response2", "annotator1"), pandalm, r"input|annotator\d+"),
        Schema("oasst", ("message_id", "text", "role"), None, "parent_id|rank|deleted", (), Trees, Trees.reads),
    )
}


@lru_cache(maxsize=1024)
def _fitting(columns: frozenset[str]) -> tuple[Schema, ...]:
    lower = {column.lower() for column in columns}
    fitting = [s for s in SCHEMAS.values() if not s.lacks(columns) and lower.isdisjoint(s.without)]
    # chosen + rejected are also part of prompt + chosen + rejected: the larger set wins.
    return tuple(s for s in fitting if not any(set(s.columns) < set(other.columns) for other in fitting))


def of_other_schemas(columns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The columns because of which rows of some schemas would also fit others.

    Args:
        columns: columns that such rows have besides those of their schema.
        names: names of the schemas.
    """
    columns, found = frozenset(columns), set[str]()
    for schema in (SCHEMAS[name] for name in names):
        own = {column.partition("|")[0] for column in schema.columns}
        for other in _fitting(columns | own):
            if other is not schema:
                found |= {name for column in other.columns for name in column.split("|")} & columns - own
    return found


def _filled(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(column for column, value in row.items() if value is not None)


def _lack(schema: Schema, row: dict[str, Any], renamed: Mapping[str, str]) -> BadRow:
    missing = ", ".join(
        " or ".join(f"'{renamed.get(name, name)}'" for name in column.split("|")) for column in schema.lacks(row)
    )
    has = ", ".join(short(column) for column in list(row)[:8]) or "none"
    if {"prompt", "completions"} <= set(row) and "scores" not in row:
        return BadRow(
            f"the row has completions but no 'scores' for them (its columns: {has}); add one score per completion, or"
            " write one completion per row (halos sample --one_per_row true) and label each"
        )
    return BadRow(
        f"the row lacks {missing} of the schema '{schema.name}' (its columns: {has}); map your names with 'columns', "
        f"or name a 'schema': {', '.join(SCHEMAS)}"
    )


def find(row: dict[str, Any], renamed: Mapping[str, str]) -> Schema:
    """The one schema whose columns a row has. A null counts as a value only if nothing fits without.

    Args:
        row: values by column.
        renamed: ``Source.columns``.

    Raises:
        BadRow: no schema fits, or several do.
    """
    for columns in (_filled(row), frozenset(row)):
        fitting = _fitting(columns)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            both = " and ".join(f"'{schema.name}' ({'+'.join(schema.columns)})" for schema in fitting)
            raise BadRow(f"the row fits {both}; name one of them as 'schema', or remove the columns of the other")
    raise _lack(max(SCHEMAS.values(), key=lambda s: len(s.columns) - len(s.lacks(row))), row, renamed)


def check(row: dict[str, Any], schema: Schema, first: str | None, renamed: Mapping[str, str]) -> None:
    """Checks that a row fits ``schema``.

    Args:
        row: values by column.
        schema: schema of the source.
        first: the name of the row that the schema was detected from; None if the schema was named.
        renamed: ``Source.columns``.

    Raises:
        BadRow: columns are missing, or belong to another schema.
    """
    filled = _filled(row)
    fitting = _fitting(filled)
    if schema in fitting:
        return
    lacks = schema.lacks(row)
    # One null is a gap in a row of this schema. More, or none, with other columns filled: a file of two kinds of rows.
    if first is not None and fitting and (lacks or len(schema.lacks(filled)) != 1):
        raise BadRow(
            f"fits the schema '{fitting[0].name}' ({'+'.join(fitting[0].columns)}), but {first} fits "
            f"'{schema.name}' ({'+'.join(schema.columns)}); put the two kinds into two files, or name a 'schema' that"
            " both fit"
        )
    if lacks:
        raise _lack(schema, row, renamed)
