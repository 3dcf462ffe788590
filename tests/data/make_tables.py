"""Tables made on the spot, without files or a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from halos_pl.data.layout import PROMPT, ROW
from halos_pl.data.store import Store
from halos_pl.data.table import Table


def store(rows: Sequence[tuple[int, int, float, int]], path: str = "f.jsonl") -> Store:
    """A store of rows (prompt, label, score, pair): prompt p has p % 3 + 1 tokens, the i-th row i % 5 + 1."""
    numbers = {p: i for i, p in enumerate(dict.fromkeys(p for p, *_ in rows))}
    tokens: list[int] = []
    prompts = []
    for p in numbers:
        prompts.append((len(tokens), p % 3 + 1, f"prompt{p:010d}".encode()))
        tokens += [1000 + p] * (p % 3 + 1)
    made: list[Any] = []
    for i, (p, label, score, pair) in enumerate(rows):
        made.append((numbers[p], len(tokens), i % 5 + 1, label, score, pair, i + 1, 0, i, 1.0, 0.0, 0.0, -1))
        tokens += [i] * (i % 5 + 1)
    return Store(
        path=path,
        tokens=np.array(tokens, np.int32),
        prompts=np.array(prompts, PROMPT),
        rows=np.array(made, ROW),
        suffixes=[""],
        examples=len(rows),
        found_faults=[],
        fault_count=0,
        skipped={},
        digest=path,
    )


def table(rows: Sequence[tuple[int, int, float, int]]) -> Table:
    return Table.of([store(rows)])


def singles(
    labels: Sequence[int], prompts: Sequence[int] | None = None, scores: Sequence[float] | None = None
) -> Table:
    """Rows that are not paired, by default each with a prompt of its own."""
    n = len(labels)
    columns = (prompts or range(n), labels, scores or [np.nan] * n, [-1] * n)
    return table(list(zip(*columns, strict=True)))


def pairs(count: int) -> Table:
    """Pairs, each with its own prompt: chosen, then rejected."""
    return table([(i // 2, 1 - i % 2, np.nan, i + 1 - 2 * (i % 2)) for i in range(2 * count)])
