"""Counts what a run is trained on."""

from __future__ import annotations

from typing import Any

import torch

from halos_pl.batch import TokenBatch
from halos_pl.distributed import rank, sum_over_ranks, world_size


class Amounts:
    """The rows and tokens of all optimizer steps of a run, those before a resumption included.

    A row counts as often as it is trained on, with all tokens of its prompt and completion after truncation. Mismatched
    rows, which get no gradient, do not count. A checkpoint has the counts of one rank only, so after a resumption those
    of a run of several ranks are unknown, as are those of a run that an older version began.
    """

    def __init__(self) -> None:
        self._known, self._loaded = True, False
        self._rows = self._tokens = 0

    def begin(self, *, resumed: bool) -> None:
        """Called before the first step."""
        self._known = self._known and (self._loaded or not resumed)

    def add(self, batch: TokenBatch) -> None:
        """Counts a step; reads nothing from a device."""
        prompt, mismatched = batch.host.prompt, batch.host.mismatched
        kept = [i for i in range(len(batch)) if not mismatched[i]]
        self._rows += len(kept)
        self._tokens += sum(len(batch.prompts[prompt[i]]) + len(batch.completions[i]) for i in kept)

    def of_all(self, device: torch.device) -> dict[str, int] | None:
        """``rows`` and ``tokens`` on all ranks, which must all call this; None if unknown."""
        counts = sum_over_ranks(torch.tensor([self._rows, self._tokens], device=device)).tolist()
        return dict(zip(("rows", "tokens"), counts, strict=True)) if self._known else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self._rows, "tokens": self._tokens, "known": self._known and world_size() == 1}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self._loaded, self._known = True, bool(state["known"])
        self._rows, self._tokens = (state["rows"], state["tokens"]) if rank() == 0 else (0, 0)
