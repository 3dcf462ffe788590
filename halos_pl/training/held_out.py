"""Figures of held-out rows during a run, over all batches and ranks; stops the run if one is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from halos_pl.batch import TokenBatch
from halos_pl.distributed import sum_over_ranks
from halos_pl.training.metrics import (
    Losses,
    Means,
    Suspects,
    derived,
    implied_reward,
    into_unit_interval,
    row_figures,
)
from halos_pl.training.non_finite import non_finite
from halos_pl.training.parts import Part
from halos_pl.training.reward_quality import RewardQuality, is_learned
from value_functions import reward_scale


class HeldOut:
    """Measures held-out batches and accumulates their figures until they are logged.

    Args:
        module: the LightningModule.

    Attributes:
        means: figures of the rows by name.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.means = Means()
        self._auroc = BinaryAUROC()
        learned = is_learned(module.objective)
        self._quality = RewardQuality(reward_scale(module.objective.halo.value_function)) if learned else None

    def parts(self, batch: TokenBatch) -> Iterator[Part]:
        """Yields the parts of a batch.

        Raises:
            NonFiniteLossError: on every rank, after the last part, if a figure of a row on any rank is not finite.
        """
        module, suspects = self._module, Suspects()
        loss = torch.zeros((), dtype=torch.float32, device=module.device)
        for part in module.engine.evaluate(batch, module.global_step):
            suspects.add(part.row_ids, part.rows, part.result)
            loss = loss + part.result.loss
            yield part
        wrong = suspects.any + (~loss.isfinite()).float()
        if bool(sum_over_ranks(wrong) > 0):
            self._reset()
            what = f"a held-out figure is not finite (loss {loss.item()})"
            raise non_finite(module, what, batch.train_ids, suspects.names)

    def measured(self, batch: TokenBatch) -> Iterator[Part]:
        """Like :meth:`parts`, but also accumulates their figures."""
        losses = Losses()
        for part in self.parts(batch):
            losses.add(part.result)
            self.means.add(row_figures(part.rows, part.result, self._module.objective.halo))
            reward = implied_reward(part.rows, part.result)
            if reward is not None:
                scores = into_unit_interval(reward)
                self._auroc.update(scores, part.rows.labels.desirable.long().to(scores.device))
                if self._quality is not None:
                    self._quality.add(part.rows, reward)
            yield part
        # Each batch is weighted by its number of rows: summed over ranks this is loss * rows / rows.
        here = batch.labels.train.sum().float()
        everywhere = sum_over_ranks(here)
        self.means.add({name: (value * everywhere, here) for name, value in losses.items()})

    def add_kl(self, kl: Tensor, tokens: Tensor) -> None:
        """Adds KL divergences of rows, nats, float32 [m, T], over ``tokens`` tokens."""
        figures = {"kl/sequence": (kl.sum(), kl.new_full((), len(kl))), "kl/token": (kl.sum(), tokens.float())}
        self.means.add(figures)

    def _reset(self) -> None:
        self.means = Means()
        self._auroc.reset()
        if self._quality is not None:
            self._quality.reset()

    def log(self, prefix: str) -> None:
        """Logs the figures over all ranks, equal on each, and resets them."""
        means = derived(self.means.compute(empty=False))
        means = {name: value for name, value in means.items() if not math.isnan(value)}  # undefined
        targets: Any = self._auroc.target
        labels = torch.cat(list(targets)) if targets else torch.zeros(0)
        both = sum_over_ranks(torch.stack([(labels == 0).sum(), (labels == 1).sum()]).float().to(self._module.device))
        if bool((both > 0).all()):
            means["rewards/auroc"] = float(self._auroc.compute())
        if self._quality is not None:
            means |= self._quality.figures(self._module.device)
        self._reset()
        self._module.log_dict({f"{prefix}/{name}": value for name, value in means.items()}, sync_dist=True)
