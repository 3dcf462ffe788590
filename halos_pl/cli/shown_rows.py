"""Rows of feedback, token by token, as ``halos data inspect`` shows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from halos_pl.common.messages import plain
from halos_pl.data.table import Table

SHOWN_PROMPT_TOKENS = 120


@dataclass(frozen=True)
class ShownRow:
    """One row, token by token.

    Attributes:
        name: name of the row.
        verdict: ``desirable``, ``undesirable``, or the score if the row has no label; and the weight if it is not 1. Or
            ``gold answer``.
        prompt, completion: text of each token; only the end of a long prompt.
        loss: whether each text of the completion carries the loss.
    """

    name: str
    verdict: str
    prompt: list[str]
    completion: list[str]
    loss: list[bool]

    def parts(self) -> Iterator[tuple[str, list[str]]]:
        """The texts in order, in runs with the loss (``loss``) or without (``prompt``, ``context``)."""
        yield "prompt", self.prompt
        for carries, run in groupby(zip(self.loss, self.completion, strict=True), key=lambda pair: pair[0]):
            yield "loss" if carries else "context", [text for _, text in run]


def shown_rows(tokenizer: PreTrainedTokenizerBase, table: Table, place: int) -> Iterator[ShownRow]:
    """A row of the table, and its gold answer, if it has one."""
    yield _shown_row(tokenizer, table, place)
    if table.of_rows("gold")[place] >= 0:
        yield replace(_shown_row(tokenizer, table.gold_answers, place), verdict="gold answer")


def _shown_row(tokenizer: PreTrainedTokenizerBase, table: Table, place: int) -> ShownRow:
    words = {1: "desirable", 0: "undesirable"}
    weight = "" if table.weight[place] == 1 else f", weight {table.weight[place]:g}"
    ids, loss = table.completion_ids(place), table.loss(place)
    loss = np.ones(len(ids), bool) if loss is None else loss
    edges = [0, *((loss[1:] != loss[:-1]).nonzero()[0] + 1).tolist(), len(ids)]
    texts: list[str] = []
    carries: list[bool] = []
    for start, stop in pairwise(edges):  # no character is shown across an edge
        run = _token_texts(tokenizer, ids[start:stop])
        texts += run
        carries += [bool(loss[start])] * len(run)
    return ShownRow(
        name=table.name(place),
        verdict=words.get(int(table.label[place]), f"score {table.score[place]:g}") + weight,
        prompt=_token_texts(tokenizer, table.prompt_ids(int(table.prompt[place]))[-SHOWN_PROMPT_TOKENS:]),
        completion=texts,
        loss=carries,
    )


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32]) -> list[str]:
    """The text of each token, or of several that make up one character; control characters are escaped."""
    texts, pending = [], []
    for token in ids.tolist():
        pending.append(token)
        text = str(tokenizer.decode(pending))
        if not text.endswith("\ufffd") or len(pending) == 4:  # a character has at most four bytes
            texts.append(plain(text))
            pending = []
    return [*texts, *([str(tokenizer.decode(pending))] if pending else [])]
