"""Mean hidden states of completions under the reference, from the pass that gives log pi_ref."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from halos_pl.batch import Needs, TokenBatch
from halos_pl.policy.architecture import vocabulary_size
from halos_pl.policy.head import most_logits
from halos_pl.policy.reference import weights_fingerprint
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.spec import ModelError
from halos_pl.policy.store import ReferenceStore, keys

Precision = Literal["32-true", "bf16-mixed"]


def autocast(precision: Precision) -> AbstractContextManager[None]:
    """The context of the model's layers; log-probs are float32 in both."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


class StoredStates:
    """Log pi_ref and the mean last hidden state of completions, stored by content as :mod:`halos_pl.policy.store` does.

    Args:
        scorer: the reference, in eval mode.
        store: its entries are float32 [1 + size]: log pi_ref in nats, and the mean state.
        precision: of the model's layers. The head and the log-softmax are float32.

    Attributes:
        rows_computed, rows_stored: number of rows that were scored, and found in the store.

    Raises:
        ModelError: the model cannot give its hidden states.
    """

    def __init__(self, scorer: Scorer, store: ReferenceStore, precision: Precision) -> None:
        if not scorer.shares_prefixes:
            raise ModelError(
                "states: the model cannot share prompts between rows, so its hidden states are out of reach;"
                " set states to 0"
            )
        self.scorer, self.store, self.precision = scorer, store, precision
        self.rows_computed = self.rows_stored = 0
        self._model = f"{weights_fingerprint(scorer.model)} log-prob and mean state"

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> Tensor:
        """float32 [n, 1 + size]: log pi_ref of each row in nats, and the mean of its states."""
        with autocast(self.precision):
            numerics = self.scorer.numerics
        names = keys(" ".join(map(str, (self._model, *numerics))), batch.on_host)
        known = self.store.get(names)
        missing = [i for i, name in enumerate(names) if name not in known]
        self.rows_stored += len(batch) - len(missing)
        self.rows_computed += len(missing)
        if missing:
            computed = self._scored(batch.select(torch.tensor(missing), missing))
            fresh = {names[i]: row for i, row in zip(missing, computed, strict=True)}
            self.store.put(fresh)
            known |= fresh
        return torch.stack([known[name] for name in names])

    def _scored(self, batch: TokenBatch) -> Tensor:
        """The states are those after a completion's tokens; of a token without loss, only if one with loss follows."""
        with autocast(self.precision):
            passes = self.scorer(batch, wanted="states", needs=Needs(scalar=True))
        dtype = next(self.scorer.model.parameters()).dtype
        total: Tensor | None = None
        logps, count = torch.zeros(len(batch)), torch.ones(len(batch))
        for states in passes:
            hidden = states.hidden.float()
            if total is None:
                total = hidden.new_zeros(len(batch), hidden.shape[1])
            after = states.column > 0  # the first is the prompt's last state, which all completions share
            total.index_add_(0, states.row[after], hidden[after])
            count.index_add_(0, states.row[after], torch.ones(int(after.sum())))
            total.index_add_(0, states.rows, states.last.float())
            parts = max(1, -(-len(hidden) * vocabulary_size(self.scorer.model) // most_logits(hidden.device)))
            each = zip(hidden.to(dtype).tensor_split(parts), states.targets.tensor_split(parts), strict=True)
            of_tokens = [self.scorer(hidden=h).log_softmax(1).gather(1, t[:, None]).squeeze(1) for h, t in each]
            logps.index_add_(0, states.row, torch.cat(of_tokens))
        assert total is not None
        return torch.cat([logps[:, None], total / count[:, None]], 1)
