"""Which completion tokens carry the loss, and the plain way to compute their log-probs: each row separately, padded.

Prompts are padded on the left and completions on the right, so every completion starts in the same column and the
model's head runs on completion positions only: no tensor of rows x length x vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from halos_pl.batch import Routing, TokenBatch
from halos_pl.policy.architecture import accepts, decoder_and_head
from halos_pl.policy.routing import row_routing, token_routing
from halos_pl.policy.sharding import run
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


class Scores(NamedTuple):
    """What a pass of the model gives n rows; None for what was not requested.

    Attributes:
        logps: Log-probs of the completion tokens, float32 [n, T], 0 where a row has no token with loss.
        routing: How a mixture of experts routed the rows' tokens; also None if all rows are mismatched.
        scalar: Scalar of each row, float32 [n].
    """

    logps: Tensor | None
    routing: Routing | None = None
    scalar: Tensor | None = None


@dataclass
class _Padded:
    """Rows as one padded tensor.

    Attributes:
        inputs: Arguments of the model.
        targets: LongTensor [n, T], the completions.
        prompts: Prompt of each row.
        first: Column of the last prompt token.
    """

    inputs: dict[str, Any]
    targets: Tensor
    prompts: list[Tensor]
    first: int


def _padded(model: nn.Module, batch: TokenBatch, experts: int | None) -> _Padded:
    targets = pad_sequence(batch.completions, batch_first=True)
    prompts = [batch.prompts[i] for i in batch.host.prompt]
    context = pad_sequence(prompts, batch_first=True, padding_side="left")
    real = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    attention_mask = torch.cat([real, token_mask(batch).long()], dim=1)
    inputs: dict[str, Any] = {
        "input_ids": torch.cat([context, targets], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "use_cache": False,
    }
    if not accepts(model, "position_ids"):
        del inputs["position_ids"]
    if experts is not None:
        inputs["output_router_logits"] = True
    return _Padded(inputs, targets, prompts, context.shape[1] - 1)


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
    rows = _padded(model, batch, experts)
    # The logits of a column predict the token of the next one.
    columns = torch.arange(rows.first, rows.first + rows.targets.shape[1], device=rows.targets.device)
    if accepts(model, "logits_to_keep"):
        outputs = model(**rows.inputs, logits_to_keep=columns)
        logits = outputs.logits
    else:
        outputs = model(**rows.inputs)
        logits = outputs.logits[:, columns]
    return logits.float(), rows.targets, _routing(outputs, rows, batch, experts)


def _routing(outputs: Any, rows: _Padded, batch: TokenBatch, experts: int | None) -> Routing | None:
    if experts is None:
        return None
    n, width = rows.inputs["attention_mask"].shape
    ends = [i * width + rows.first + 1 for i in range(n)]  # of the prompts
    spans = [
        [(end - len(prompt), end + len(completion) - 1)]
        for end, prompt, completion in zip(ends, rows.prompts, batch.completions, strict=True)
    ]
    of_rows = row_routing(token_routing(outputs.router_logits, n * width, experts), spans)
    train = batch.labels.train[:, None]
    return Routing(of_rows.probability * train, of_rows.chosen * train)


def padded_scores(
    model: nn.Module,
    batch: TokenBatch,
    experts: int | None = None,
    *,
    scalar_head: nn.Module | None = None,
    logps: bool = True,
) -> Scores:
    """The scores of the rows, each computed separately.

    Args:
        model, batch, experts: as for :func:`padded_logits`.
        scalar_head: head that gives each row a scalar; None for none.
        logps: whether to compute log-probs.
    """
    if not logps:  # without the model's head
        rows = _padded(model, batch, experts)
        outputs = run(model, lambda: decoder_and_head(model)[0](**rows.inputs))
        scalar = _scalar(scalar_head, outputs.last_hidden_state, batch)
        return Scores(None, _routing(outputs, rows, batch, experts), scalar)
    with _last_hidden_state(model, scalar_head) as hidden:
        logits, targets, routing = padded_logits(model, batch, experts)
    each = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    # where, not a product: padding may have any log-prob, and 0 * inf is not 0.
    of_tokens = torch.where(completion_mask(batch), each, 0.0)
    return Scores(of_tokens, routing, _scalar(scalar_head, hidden[0], batch) if hidden else None)


@contextmanager
def _last_hidden_state(model: nn.Module, scalar_head: nn.Module | None) -> Iterator[list[Tensor]]:
    """A list to which the decoder's next pass adds its last hidden state; none is added without a scalar head."""
    states: list[Tensor] = []
    if scalar_head is None:
        yield states
        return
    decoder = decoder_and_head(model)[0]
    hook = decoder.register_forward_hook(lambda _, __, outputs: states.append(outputs.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()


def _scalar(scalar_head: nn.Module | None, hidden: Tensor, batch: TokenBatch) -> Tensor | None:
    """The scalar of each row, float32 [n], from hidden states [n, columns, size] with completions on the right."""
    if scalar_head is None:
        return None
    lengths = [len(completion) for completion in batch.completions]
    first = hidden.shape[1] - max(lengths) - 1
    (columns,) = upload([[first + length for length in lengths]], hidden.device)
    rows = torch.arange(len(lengths), device=hidden.device)
    return scalar_head(hidden[rows, columns])  # type: ignore[no-any-return]


def padded_logps(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probs of the completion tokens, float32 [n, T], 0 where a row has no token with loss."""
    logps = padded_scores(model, batch).logps
    assert logps is not None
    return logps
