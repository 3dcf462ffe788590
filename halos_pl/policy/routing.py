"""How a mixture of experts routes tokens: the input of the load-balancing loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos_pl.batch import Routing
from halos_pl.policy.architecture import experts_per_token
from halos_pl.policy.spec import ModelError
from halos_pl.policy.upload import ramps, repeats, upload


def check_router(model: nn.Module, name: str = "the policy") -> int:
    """The number of experts that a model's routers choose for each token.

    Raises:
        ModelError: if the model has no router, or does not return its logits.
    """
    count = experts_per_token(model)
    if count is None:
        raise ModelError(
            f"the objective needs the routing of a mixture of experts (RouterLoss), but {name} returns no router"
            " logits; remove the term or choose a mixture of experts"
        )
    return count


def token_routing(layers: Sequence[Tensor], tokens: int, count: int) -> Routing:
    """How each of ``tokens`` tokens was routed.

    Args:
        layers: router logits of each layer, [..., E], all for the same tokens in the same order.
        tokens: number of tokens.
        count: number of experts chosen for each token.

    Raises:
        ModelError: if layers differ in their number of experts, or do not route every token.
    """
    shapes = {tuple(logits.flatten(0, -2).shape) for logits in layers}
    if len(shapes) != 1 or next(iter(shapes))[0] != tokens:
        raise ModelError(f"RouterLoss: the model's routers return logits of shape {sorted(shapes)} for {tokens} tokens")
    probability = torch.stack([logits.flatten(0, -2).float().softmax(dim=-1) for logits in layers])
    best = probability.detach().topk(count, dim=-1).indices
    chosen = F.one_hot(best, probability.shape[-1]).sum(dim=-2)  # [layers, tokens, E]
    return Routing(probability.sum(dim=0), chosen.sum(dim=0).float())


def row_routing(of_tokens: Routing, spans: Sequence[Sequence[tuple[int, int]]]) -> Routing:
    """Sums the routing of tokens over the spans (start, stop) of each row's tokens."""
    device = of_tokens.chosen.device
    runs = [(a, b - a) for row in spans for a, b in row]
    lengths = [(i, sum(b - a for a, b in row)) for i, row in enumerate(spans)]
    token, row = upload([ramps(runs), repeats(lengths)], device)
    zeros = torch.zeros(len(spans), of_tokens.chosen.shape[1], dtype=torch.float32, device=device)
    return Routing(
        zeros.index_add(0, row, of_tokens.probability[token]), zeros.index_add(0, row, of_tokens.chosen[token])
    )
