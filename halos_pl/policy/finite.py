"""Stops sampling from a model whose logits are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from halos_pl.policy.spec import ModelError


class FiniteLogits(LogitsProcessor):
    """Stops sampling if the largest logit of a row is not finite; greedy decoding would pick an arbitrary token.

    Args:
        names: names of the rows of the batch, for the message.
        start: number of tokens of a prompt, padding included.
        ends: ids that end a completion; logits after them are ignored.

    Raises:
        ModelError: names the row.
    """

    def __init__(self, names: Sequence[str], start: int, ends: Sequence[int]) -> None:
        self.names, self.start, self.ends = names, start, list(ends)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns ``scores`` (rows x vocabulary) unchanged."""
        wrong = ~scores.amax(dim=-1).isfinite()  # the maximum of NaN is NaN
        if wrong.any():
            completions = input_ids[:, self.start :]
            ended = torch.isin(completions, torch.tensor(self.ends, device=completions.device)).any(dim=-1)
            for name, is_wrong in zip(self.names, (wrong & ~ended).tolist(), strict=True):
                if is_wrong:
                    raise ModelError(
                        f"{name}: the model's logits are not finite after {completions.shape[1]} tokens of its answer,"
                        " so no token can be sampled; its weights are too large or damaged, or its dtype"
                        " overflows (try float32)"
                    )
        return scores
