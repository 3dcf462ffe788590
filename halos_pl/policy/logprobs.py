"""Which completion tokens carry the loss, and the plain way to their log-probs: each row by itself, padded.

Prompts are padded on the left and completions on the right, so every completion starts in the same column and the
model's head runs on completion positions only: no tensor of rows x length x vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from halos_pl.batch import TokenBatch
from halos_pl.policy.architecture import accepts


def token_mask(batch: TokenBatch) -> Tensor:
    """BoolTensor [n, T]: which places of the rows' completions, padded on the right to T, hold a token."""
    lengths = torch.tensor([len(c) for c in batch.completions], device=batch.prompt.device)
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def completion_mask(batch: TokenBatch) -> Tensor:
    """BoolTensor [n, T]: which places of the rows' completions, padded on the right to T, hold a token with loss."""
    mask = token_mask(batch)
    for row, loss in enumerate(batch.loss or ()):
        if loss is not None:
            mask[row, : len(loss)] &= loss
    return mask


def padded_logits(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits float32 [n, T, V] that predict each completion token, and the tokens LongTensor [n, T]."""
    targets = pad_sequence(batch.completions, batch_first=True)
    mask = token_mask(batch)
    prompts = [batch.prompts[i] for i in batch.prompt.tolist()]
    context = pad_sequence(prompts, batch_first=True, padding_side="left")
    real = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    attention_mask = torch.cat([real, mask.long()], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([context, targets], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "use_cache": False,
    }
    # The logits of a column predict the token of the next one.
    first, count = context.shape[1] - 1, targets.shape[1]
    columns = torch.arange(first, first + count, device=targets.device)
    if not accepts(model, "position_ids"):
        del inputs["position_ids"]
    if accepts(model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    return logits.float(), targets


def padded_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probs of the completion tokens, float32 [n, T], 0 where a row has no token with loss."""
    logits, targets = padded_logits(model, batch)
    logps = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    # where, not a product: a padded place may hold anything, and 0 * inf is not 0.
    return torch.where(completion_mask(batch), logps, 0.0)
