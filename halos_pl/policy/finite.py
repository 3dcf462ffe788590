"""Whether a model that samples still gives numbers that a token can be drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from halos_pl.policy.spec import ModelError


class FiniteLogits(LogitsProcessor):
    """Stops sampling at logits without a finite largest one. Greedy decoding would take any token of such a row.

    Args:
        names: of the rows of the batch, for the message.
        start: tokens of a padded prompt.
        ends: ids at which a completion ends; what follows them does not count.

    Raises:
        ModelError: naming the row.
    """

    def __init__(self, names: Sequence[str], start: int, ends: Sequence[int]) -> None:
        self.names, self.start, self.ends = names, start, list(ends)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Gives back ``scores`` (rows x vocabulary) as they are."""
        wrong = ~scores.amax(dim=-1).isfinite()  # of NaN it is NaN
        if wrong.any():
            said = input_ids[:, self.start :]
            over = torch.isin(said, torch.tensor(self.ends, device=said.device)).any(dim=-1)
            for name, is_wrong in zip(self.names, (wrong & ~over).tolist(), strict=True):
                if is_wrong:
                    raise ModelError(
                        f"{name}: the model's logits are not finite after {said.shape[1]} tokens of its answer, so none"
                        " can be sampled; its weights are too large or damaged, or its dtype overflows (try float32)"
                    )
        return scores
