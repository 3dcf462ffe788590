"""Checks the values of a row: texts, labels, scores, flags and lists."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from halos_pl.data.example import Fault, short


class BadRow(Exception):
    """A fault of a row.

    Args:
        reason: the fault and how to fix it; with a column, it continues "column 'x'".
        column: the schema's name of the column.
        within: the part of the column, such as ``, message 2``.
        ignorable: name that the source may list in ``ignore`` to accept the row.
    """

    def __init__(self, reason: str, column: str | None = None, within: str = "", ignorable: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.column, self.within, self.ignorable = reason, column, within, ignorable

    def fault(self, place: str, renamed: Mapping[str, str]) -> Fault:
        """The fault of the row at ``place``, with the column's name in the file.

        Args:
            place: place of the row.
            renamed: ``Source.columns``.
        """
        if self.column is None:
            return Fault(place, self.reason)
        name = renamed.get(self.column, self.column)
        # ``ignore`` takes the names in the file, not those of the schema.
        ignorable = name if self.ignorable == self.column else self.ignorable
        anyway = f"; to train without it, add 'ignore: [\"{ignorable}\"]' to the source" if ignorable else ""
        return Fault(place, f"column '{name}'{self.within} {self.reason}{anyway}", name)


def checked_text(value: str, column: str, within: str = "") -> str:
    """``value``, unchanged.

    Raises:
        BadRow: UTF-8 cannot encode it.
    """
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(
                "contains half a surrogate pair, which is not text; remove or repair the \\ud8xx escape", column, within
            ) from None
    return value


def plain_text(row: dict[str, Any], column: str) -> str:
    """A column that must be text and may be empty."""
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"is {short(value)}; it must be text", column)
    return checked_text(value, column)


def has_value(value: Any, depth: int = 4) -> bool:
    """Whether a value is not null, NaN, a blank text, or a container of only these."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, list | dict) and depth:
        return any(has_value(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return value is not None and value == value  # NaN is not equal to itself


TRUE_FALSE = ({"true", "1", "1.0"}, {"false", "0", "0.0"})
# Common names of the two kinds of feedback, as text or as names of a ClassLabel.
_GOOD = TRUE_FALSE[0] | {"good", "desirable", "chosen", "preferred", "accepted", "accept", "positive", "correct"}
_GOOD |= {"helpful", "safe", "like", "liked", "up", "upvote", "thumbs_up", "thumbsup", "win"}
_BAD = TRUE_FALSE[1] | {"bad", "undesirable", "rejected", "reject", "dispreferred", "negative", "incorrect", "wrong"}
_BAD |= {"unhelpful", "unsafe", "dislike", "disliked", "down", "downvote", "thumbs_down", "thumbsdown", "lose"}
_FIRST, _SECOND = (
    yes | {f"{of}{a}" for of in ("", "output_", "human_ref_")} for yes, a in zip(TRUE_FALSE, "ab", strict=True)
)


def label_of(
    row: dict[str, Any],
    column: str,
    true: str = "desirable",
    false: str = "undesirable",
    words: tuple[set[str], set[str]] = (_GOOD, _BAD),
) -> bool:
    """A label: true or 1, false or 0, or one of ``words``, as in CSV files and the names of a ClassLabel.

    Args:
        row: values by column.
        column: column of the label.
        true, false: meanings of the two labels, for messages.
        words: lower-case texts that stand for true and for false.
    """
    value = row[column]
    if isinstance(value, str):
        word = re.sub(r"[\s-]+", "_", value.strip().lower())
        if word in words[0] or word in words[1]:
            return word in words[0]
    elif isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise BadRow(f"is {short(value)}; it must be true or 1 ({true}), or false or 0 ({false})", column)


def first_of(row: dict[str, Any], column: str) -> bool:
    """Whether A is preferred to B."""
    return label_of(row, column, "A is preferred", "B is preferred", (_FIRST, _SECOND))


def agreed_label(row: dict[str, Any], columns: tuple[str, ...]) -> bool:
    """The label from the first of ``columns`` that has one; others must agree."""
    present = [name for name in columns if name in row]
    filled = [name for name in present if row[name] is not None] or present[:1]
    labels = [label_of(row, name) for name in filled]
    if len(set(labels)) > 1:
        raise BadRow(f"is {short(row[filled[0]])}, but '{filled[1]}' says the opposite; keep one of them", filled[0])
    return labels[0]


def score_of(value: Any, column: str, within: str = "") -> float | None:
    """A finite number, or None for null."""
    if value is None:
        return None
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise BadRow(f"is {short(value)}; a score must be a finite number, or null", column, within)


def pair_scores(row: dict[str, Any], first: str, second: str) -> tuple[float | None, ...]:
    """The scores in two optional columns."""
    return score_of(row.get(first), first), score_of(row.get(second), second)


def flag_of(value: Any, column: str, within: str = "") -> bool:
    """Whether a completion is finished; null means yes."""
    if value is None:
        return True
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # CSV has only text
        return value.strip().lower() == "true"
    if value in (0, 1):
        return bool(value)
    raise BadRow(
        f"is {short(value)}; it must be true, or false for a completion that was cut and gets no EOS", column, within
    )


def list_of(row: dict[str, Any], column: str) -> list[Any]:
    """A column that must be a list."""
    value = row[column]
    if not isinstance(value, list):
        raise BadRow(f"is {short(value)}; it must be a list", column)
    return value
