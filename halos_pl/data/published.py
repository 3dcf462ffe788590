"""Published data sets with special formats: UltraFeedback, SHP, PandaLM, OASST."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from halos_pl.data.example import Prompt, Skipped, short
from halos_pl.data.items import EMPTY, TIE, Items, group, one, pair
from halos_pl.data.messages import Messages, is_blank, not_blank, prompt_of
from halos_pl.data.values import (
    TRUE_FALSE,
    BadRow,
    checked_text,
    first_of,
    label_of,
    list_of,
    pair_scores,
    plain_text,
    score_of,
)

LONGEST = 1000  # messages on a path through a tree


def ultrafeedback(row: dict[str, Any], place: str) -> Items:
    """Answers of several models, each with a score."""
    prompt = prompt_of(row, "instruction")
    judged: list[tuple[Prompt, float | None]] = []
    for i, item in enumerate(list_of(row, "completions"), start=1):
        within = f", item {i}"
        if not isinstance(item, dict) or not isinstance(item.get("response"), str):
            raise BadRow(
                f"is {short(item)}; it must be an object with a 'response' of text and an 'overall_score'",
                "completions",
                within,
            )
        score = score_of(item.get("overall_score"), "completions", f"{within}, 'overall_score'")
        judged.append((checked_text(item["response"], "completions", within), score))
    return group(prompt, judged, place)


def shp(row: dict[str, Any], place: str) -> Items:
    """Two answers to a post; ``labels`` is 1 if A is preferred."""
    first = first_of(row, "labels")
    prompt = not_blank(plain_text(row, "history"), "history")
    a, b = plain_text(row, "human_ref_A"), plain_text(row, "human_ref_B")
    scores = pair_scores(row, "score_A", "score_B")
    if is_blank(a) or is_blank(b):
        return [Skipped(place, EMPTY)]
    return pair(prompt, a, b, place, scores) if first else pair(prompt, b, a, place, scores[::-1])


_ANNOTATOR = re.compile(r"annotator\d+")


def pandalm(row: dict[str, Any], place: str) -> Items:
    """A pair for each annotator's verdict, 1 or 2 for the better response; disagreeing annotators both count."""
    parts = [plain_text(row, "instruction"), plain_text(row, "input") if row.get("input") is not None else ""]
    prompt = not_blank("\n".join(part for part in parts if part.strip()), "instruction")
    verdicts = {}
    for column in sorted(filter(_ANNOTATOR.fullmatch, row), key=lambda name: (len(name), name)):
        verdict = score_of(row[column], column)
        if verdict not in (None, 0, 1, 2):
            raise BadRow(f"is {short(row[column])}; a verdict is 0 (tie), 1, 2 or null", column)
        verdicts[column] = verdict
    responses = []
    for column in ("response1", "response2"):
        if isinstance(row[column], bool | int | float):
            # The published file has JSON's true for a model's "True" or "true": which one is unknown.
            return [Skipped(place, "response is not text")]
        responses.append(plain_text(row, column))
    if any(map(is_blank, responses)):
        return [Skipped(place, EMPTY)]
    items: Items = []
    for column, verdict in verdicts.items():
        name = f"{place}#{column}"
        if not verdict:
            items.append(Skipped(name, "no verdict" if verdict is None else TIE))
        else:
            better = 0 if verdict == 1 else 1
            items += pair(prompt, responses[better], responses[1 - better], name)
    return items


class Trees:
    """OASST's message trees: each ranked assistant message is an example; its prompt is the path from the root."""

    reads = ("message_id", "parent_id", "text", "role", "rank", "deleted")

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.messages: dict[str, dict[str, Any]] = {}
        for row in rows:
            if isinstance(row["message_id"], str):
                self.messages.setdefault(row["message_id"], row)
        self._depths: dict[str, float] = {}

    def __call__(self, row: dict[str, Any], place: str) -> Items:
        name = row["message_id"]
        if not isinstance(name, str):
            raise BadRow(f"is {short(name)}; it must be text", "message_id")
        if self.messages[name] is not row:
            raise BadRow(f"is {short(name)}, as in an earlier row; each message needs its own", "message_id")
        message = self._turn(row)
        if self._deleted(row):
            return [Skipped(place, "deleted message")]
        if message["role"] != "assistant":
            return [Skipped(place, "prompter's message")]
        if row.get("rank") is None:
            return [Skipped(place, "no rank")]
        rank = score_of(row["rank"], "rank")
        if (depth := self._depth(name)) == math.inf:
            raise BadRow("leads back to this message; a message cannot answer itself", "parent_id")
        if depth > LONGEST:
            raise BadRow(f"has {depth:,.0f} messages above, more than {LONGEST:,}; remove the row", "parent_id")
        prompt: Messages = []
        above = row
        while (parent := above.get("parent_id")) is not None:
            if not isinstance(parent, str) or parent not in self.messages:
                what = "is" if above is row else "of a message above is"
                raise BadRow(f"{what} {short(parent)}, which is not a message_id of this source", "parent_id")
            above = self.messages[parent]
            if self._deleted(above):
                return [Skipped(place, "deleted message in the prompt")]
            prompt.append(self._turn(above))
        prompt.reverse()
        if is_blank(prompt):
            raise BadRow("leads to no prompt; only answers may have a rank", "parent_id")
        not_blank([message], "text")
        return one(prompt, [message], place, None, 0.0 - (rank or 0.0))

    def _depth(self, name: str) -> float:
        """The number of messages above one, infinite for a cycle. Each message is visited once."""
        path: dict[str, None] = {}
        while name not in self._depths:
            path[name] = None
            parent = self.messages[name].get("parent_id")
            if isinstance(parent, str) and parent in path:
                self._depths |= dict.fromkeys(path, math.inf)
            elif isinstance(parent, str) and parent in self.messages:
                name = parent
            else:
                self._depths[name] = 0
        for depth, below in enumerate(reversed(path), start=0 if name in path else 1):
            self._depths[below] = self._depths[name] + depth
        return self._depths[next(iter(path), name)]

    @staticmethod
    def _deleted(row: dict[str, Any]) -> bool:
        value = row.get("deleted")
        return value is not None and label_of(row, "deleted", "deleted", "not", TRUE_FALSE)

    @staticmethod
    def _turn(row: dict[str, Any]) -> dict[str, str]:
        role = row["role"]
        roles = {"prompter": "user", "assistant": "assistant"}
        name = roles.get(role.strip().lower()) if isinstance(role, str) else None
        if name is None:
            raise BadRow(f"is {short(role)}; it must be 'prompter' or 'assistant'", "role")
        return {"role": name, "content": plain_text(row, "text")}
