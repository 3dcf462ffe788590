"""Which completion tokens carry the loss, and the plain way to compute their log-probs: each row separately, padded.

Prompts are padded on the left and completions on the right, so every completion starts in the same column and the
model's head runs on completion positions only: no tensor of rows x length x vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from halos_pl.batch import Routing, TokenBatch
from halos_pl.policy.architecture import accepts
from halos_pl.policy.routing import row_routing, token_routing
from halos_pl.policy.upload import upload


def token_mask(batch: TokenBatch) -> Tensor:
    """BoolTensor [n, T]: True on the tokens of the rows' completions, False on the padding on their right."""
    lengths = [len(completion) for completion in batch.completions]
    (on_device,) = upload([lengths], batch.prompt.device)
    return torch.arange(max(lengths), device=on_device.device) < on_device[:, None]


def completion_mask(batch: TokenBatch) -> Tensor:
    """BoolTensor [n, T]: True on the completion tokens that carry the loss; padding is on the right."""
    mask = token_mask(batch)
    for row, loss in enumerate(batch.loss or ()):
        if loss is not None:
            mask[row, : len(loss)] &= loss
    return mask


def padded_logits(
    model: nn.Module, batch: TokenBatch, experts: int | None = None
) -> tuple[Tensor, Tensor, Routing | None]:
    """Runs the model on padded rows.

    Args:
        model: Causal language model of transformers, or a peft model around one.
        batch: n rows.
        experts: Number of experts that a router chooses for each token; None to return no routing.

    Returns:
        Logits that predict each completion token, float32 [n, T, V]; the tokens, LongTensor [n, T]; and the routing
        of the rows.
    """
    targets = pad_sequence(batch.completions, batch_first=True)
    mask = token_mask(batch)
    prompts = [batch.prompts[i] for i in batch.host.prompt]
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
    if experts is not None:
        inputs["output_router_logits"] = True
    if accepts(model, "logits_to_keep"):
        outputs = model(**inputs, logits_to_keep=columns)
        logits = outputs.logits
    else:
        outputs = model(**inputs)
        logits = outputs.logits[:, columns]
    routing = None
    if experts is not None:
        rows, width = attention_mask.shape
        ends = [i * width + context.shape[1] for i in range(rows)]  # of the prompts
        spans = [
            [(end - len(prompt), end + len(completion) - 1)]
            for end, prompt, completion in zip(ends, prompts, batch.completions, strict=True)
        ]
        of_rows = row_routing(token_routing(outputs.router_logits, rows * width, experts), spans)
        train = batch.labels.train[:, None]
        routing = Routing(of_rows.probability * train, of_rows.chosen * train)
    return logits.float(), targets, routing


def padded_scores(model: nn.Module, batch: TokenBatch, experts: int | None = None) -> tuple[Tensor, Routing | None]:
    """Log-probs of the completion tokens, float32 [n, T], 0 where a row has no token with loss; and the routing.

    Args:
        model, batch, experts: as for :func:`padded_logits`.
    """
    logits, targets, routing = padded_logits(model, batch, experts)
    logps = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    # where, not a product: padding may have any log-prob, and 0 * inf is not 0.
    return torch.where(completion_mask(batch), logps, 0.0), routing


def padded_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probs of the completion tokens, float32 [n, T], 0 where a row has no token with loss."""
    return padded_scores(model, batch)[0]
