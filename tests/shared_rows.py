"""Models whose log-probs vary, batches of rows that share prompts, and their log-probs and gradients."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from model_families import MODELS, V
from torch import Tensor

from halos_pl.batch import TokenBatch
from halos_pl.labels import Labels
from halos_pl.policy import prefix_sharing
from halos_pl.policy.prefix_sharing import shared_logps


def spread(made: Any, std: float = 0.2) -> Any:
    """With weights so large that log-probs vary."""
    torch.manual_seed(0)
    for p in made.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=std)
    return made


def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random one whose log-probs vary."""
    torch.manual_seed(0)
    made: Any = spread(MODELS[name]())
    return made.to(dtype).train()


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """Prompts and completions of 1 to 12 tokens, shared prompts, and mismatched rows."""
    lengths = st.integers(1, 12)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    prompts = [torch.randint(0, V, (n,), generator=generator) for n in draw(st.lists(lengths, min_size=1, max_size=4))]
    rows = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), lengths, st.booleans()), min_size=1, max_size=9))
    n = len(rows)
    return TokenBatch(
        prompts=prompts,
        completions=[torch.randint(0, V, (length,), generator=generator) for _, length, _ in rows],
        prompt=torch.tensor([p for p, *_ in rows]),
        labels=Labels(
            desirable=torch.ones(n, dtype=torch.bool), mismatched=torch.tensor([mismatched for *_, mismatched in rows])
        ),
    )


def example(seed: int) -> TokenBatch:
    """Three prompts, one alone with a mismatched row."""
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> Tensor:
        return torch.randint(0, V, (n,), generator=generator)

    return TokenBatch(
        prompts=[some(7), some(1), some(4)],
        completions=[some(n) for n in (3, 1, 9, 2, 5, 4, 6)],
        prompt=torch.tensor([0, 0, 1, 1, 2, 0, 1]),
        labels=Labels(
            desirable=torch.ones(7, dtype=torch.bool),
            mismatched=torch.tensor([False, False, False, False, True, True, True]),
        ),
    )


def results(made: Any, batch: TokenBatch, how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of a weighted sum of those of rows that are no mismatched rows."""
    made.zero_grad(set_to_none=True)
    made.config._attn_implementation = prefix_sharing.NAME if how is shared_logps else "sdpa"
    found = how(made, batch)
    weight = torch.rand(found.shape, generator=torch.Generator().manual_seed(1))
    total = (found * weight)[~batch.labels.mismatched].sum()
    if total.requires_grad:
        total.backward()
    return found.detach(), {k: p.grad.clone() for k, p in made.named_parameters() if p.grad is not None}
