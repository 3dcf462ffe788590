"""Sets of candidates, and softmax policies over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The completions that each prompt's policy chooses from, padded to the largest number K of any prompt.

    A completion's *place* is ``slot * prompts + prompt``; votes name completions by it. Slots come first because a
    softmax over the last, short dimension takes five times as long.

    Attributes:
        reference_logps: float [K, prompts], log pi_ref in nats, normalised over a prompt's candidates; -inf is padding.
        features: float [d, K * prompts], phi by place, 0 for padding; None for a free logit per candidate, where
            d = K * prompts.
    """

    reference_logps: Tensor
    features: Tensor | None = None

    @classmethod
    def of(cls, prompt: Tensor, reference_logps: Tensor, features: Tensor | None = None) -> tuple[Candidates, Tensor]:
        """The sets of single completions, which may come in any order.

        Args:
            prompt: LongTensor [n], number of each completion's prompt, from 0 without gaps.
            reference_logps: float [n], log pi_ref in nats up to a constant per prompt.
            features: float [n, d], or None for free logits.

        Returns:
            The sets, and the place of each completion, LongTensor [n].

        Raises:
            ValueError: there is no completion, a prompt has none, or a log-prob or feature is not finite.
        """
        counts = torch.bincount(prompt)
        if not len(prompt) or not bool((counts > 0).all()):
            raise ValueError("Candidates: each prompt from 0 to the largest number needs a completion")
        for name, values in (("reference_logps", reference_logps), ("features", features)):
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(f"Candidates: {name} are not all finite")
        order = prompt.argsort(stable=True)
        slot = torch.empty_like(prompt)
        slot[order] = torch.arange(len(prompt)) - (counts.cumsum(0) - counts)[prompt[order]]
        place, size = slot * len(counts) + prompt, int(counts.max()) * len(counts)
        logps = reference_logps.new_full((size,), -torch.inf).index_copy(0, place, reference_logps)
        if features is not None:
            features = features.new_zeros(features.shape[1], size).index_copy(1, place, features.T)
        return cls(logps.view(-1, len(counts)).log_softmax(0), features), place

    @property
    def dimension(self) -> int:
        """d, the number of parameters of a policy."""
        return self.reference_logps.numel() if self.features is None else len(self.features)

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return self.reference_logps.shape[1]

    def logps(self, theta: Tensor) -> Tensor:
        """log pi_theta in nats, float [fits, K, prompts], -inf for padding; ``theta`` is [fits, d]."""
        added = theta if self.features is None else theta @ self.features
        return (self.reference_logps + added.view(-1, *self.reference_logps.shape)).log_softmax(1)

    def kl(self, logps: Tensor) -> Tensor:
        """KL(pi_theta || pi_ref) of each prompt in nats, float [fits, prompts], without gradient.

        ``logps`` are those of :meth:`logps`. It is the sum over all candidates, not an estimate.
        """
        logps = logps.detach()
        ratio = torch.where(self.reference_logps.isfinite(), logps - self.reference_logps, 0.0)
        return (logps.exp() * ratio).sum(1).clamp(min=0)  # below 0 by rounding only
