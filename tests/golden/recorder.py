"""A callback that writes down what a fit does, in terms that no renaming of the package changes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback


def trained(module: Any) -> list[tuple[str, torch.Tensor]]:
    """The parameters that are trained, in the order of their names in the model."""
    return sorted((name, p) for name, p in module.policy.named_parameters() if p.requires_grad)


def rows(batch: Any) -> list[dict[str, Any]]:
    """Each row of a batch: its name, its tokens, which of them carry the loss, and what is known of it."""
    loss = batch.loss or [None] * len(batch)
    return [
        {
            "row": re.sub(r"[^ ]*/", "", batch.row_ids[i]),  # without folders
            "prompt": batch.prompts[batch.prompt[i]].tolist(),
            "completion": batch.completions[i].tolist(),
            "loss": None if loss[i] is None else loss[i].tolist(),
            "desirable": bool(batch.labels.desirable[i]),
            "pair": int(batch.labels.pair[i]),
            "mismatched": bool(batch.labels.mismatched[i]),
            "score": round(float(batch.labels.score[i]), 6),
        }
        for i in range(len(batch))
    ]


def digest(numbers: Iterable[torch.Tensor]) -> str:
    """Of every bit."""
    made = hashlib.sha256()
    for tensor in numbers:
        made.update(tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()[:16]


def norm(numbers: Iterable[torch.Tensor]) -> float:
    """Euclidean, in float64."""
    return float(torch.stack([t.detach().double().norm() for t in numbers]).norm())


class Golden(Callback):
    """Writes ``PATH`` (and ``PATH.RANK`` for a later rank) when the fit ends.

    Args:
        path: of the file: each step's gradient norm before clipping and its rows, how far the weights moved, and a
            digest of them.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.gradients: list[float] = []
        self.batches: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = [p.detach().clone() for _, p in trained(pl_module)]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(rows(batch))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(norm(p.grad for _, p in trained(pl_module) if p.grad is not None))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        weights = [p for _, p in trained(pl_module)]
        found = {
            "gradient": self.gradients,
            "moved": norm(p.detach() - q for p, q in zip(weights, self.start, strict=True)),
            "weights": digest(weights),
            "batches": self.batches,
        }
        path = self.path + (f".{trainer.global_rank}" if trainer.global_rank else "")
        Path(path).write_text(json.dumps(found), encoding="utf-8")
