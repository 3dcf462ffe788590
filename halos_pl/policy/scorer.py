"""The one entry to a model: everything that needs its log-probs, hidden states or logits calls a ``Scorer``.

Wrappers such as DDP, ``fully_shard`` and ``torch.compile`` act on a module's forward pass, so nothing may run a model's
decoder or read its head's weight outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from halos_pl.batch import Routing, TokenBatch
from halos_pl.policy import prefix_sharing
from halos_pl.policy.architecture import base_model, decoder_and_head, layer_parts, rotary_frequencies
from halos_pl.policy.logprobs import padded_logits, padded_scores
from halos_pl.policy.memory import recomputed
from halos_pl.policy.routing import check_router
from halos_pl.policy.self_test import padding_fault, sharing_fault
from halos_pl.policy.spec import ModelError

PrefixSharing = Literal["auto", "always", "never"]


class Scorer(nn.Module):
    """A causal language model as a function from rows to log-probs.

    Args:
        model: of transformers, or a peft model around one.
        prefix_sharing: ``always``: each prompt is computed once for all rows that share it, without padding.
            ``never``: each row is computed by itself. ``auto``: prompts are shared where a self-test finds the same
            log-probs; otherwise a line says why not.
        compiled: compile the parts of each layer that hold no attention when they are first called. Attention sees
            other lengths in every step, and would be compiled anew each time.
        name: of the model, for messages.

    Attributes:
        model: the model.
        shares_prefixes: whether rows share prompts.

    Raises:
        ModelError: where prompts shall always be shared and cannot be; where the model's log-probs are wrong in a
            padded batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prefix_sharing: PrefixSharing = "auto",
        compiled: bool = False,
        name: str = "the model",
    ) -> None:
        super().__init__()
        self.model = model
        self._options: dict[str, Any] = {"prefix_sharing": prefix_sharing, "compiled": compiled}
        self._frequencies = [(module, key, values.clone()) for module, key, values in rotary_frequencies(model)]
        # A reference may be loaded in the middle of a step, under autocast, whose rounding is no fault of the model.
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            why = None if prefix_sharing == "never" else sharing_fault(model)
            self.shares_prefixes = prefix_sharing != "never" and why is None
            wrong = None if self.shares_prefixes else padding_fault(model)
        if why and prefix_sharing == "always":
            raise ModelError(
                f"model.prefix_sharing is always, but {name} cannot share prompts: {why}; choose auto or never"
            )
        if wrong:
            raise ModelError(f"{name} cannot be used: {wrong}")
        if why:
            rank_zero_info(f"halos: {name} computes each row by itself: {why}")
        if self.shares_prefixes:
            base_model(model).set_attn_implementation(self.attention)
        if compiled:
            for part in layer_parts(model):
                if part._compiled_call_impl is None:
                    part.compile(dynamic=True)

    #: The attention function of models that share prefixes.
    attention = prefix_sharing.NAME

    def beside(self, model: nn.Module, name: str) -> Scorer:
        """A scorer of another model with the same options."""
        return Scorer(model, name=name, **self._options)

    def forward(
        self,
        batch: TokenBatch | None = None,
        *,
        wanted: Literal["logps", "routing", "states", "logits"] = "logps",
        hidden: Tensor | None = None,
    ) -> Any:
        """Runs the model.

        Args:
            batch: n rows.
            wanted: The result: ``logps``; ``routing``, the log-probs and the routing of a mixture of experts;
                ``states``, the hidden states of a model that shares prefixes; or ``logits``, each row separately.
            hidden: Hidden states [m, size] from an earlier pass, in place of a batch.

        Returns:
            ``logps``: log-probs of the completion tokens, float32 [n, T] whatever the model's dtype, 0 where a row has
            no token with loss; where prefixes are shared, mismatched rows have no gradient. ``routing``: a tuple of
            these and a :class:`Routing` (None where all rows are mismatched). ``states``: a list of :class:`States`.
            ``logits``: float32 [n, T, V]. For ``hidden``: logits float32 [m, V].

        Raises:
            ModelError: if the routing is requested of a model that is no mixture of experts.
        """
        if hidden is not None:
            return decoder_and_head(self.model)[1](hidden).float()
        assert batch is not None
        if wanted == "states":
            return list(prefix_sharing.shared_states(self.model, batch))
        if wanted == "logits":
            return padded_logits(self.model, batch)[0]
        experts = check_router(self.model) if wanted == "routing" else None
        with recomputed():
            scores: tuple[Tensor, Routing | None]
            scores = (prefix_sharing.shared_scores if self.shares_prefixes else padded_scores)(
                self.model, batch, experts
            )
        return scores if wanted == "routing" else scores[0]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def numerics(self) -> tuple[Any, ...]:
        """What its log-probs depend on beside weights and rows: dtypes, autocast, device, precision of products."""
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = next(self.model.parameters()).dtype
        buffers = {module._buffers[name].dtype for module, name, _ in self._frequencies} - {dtype}  # type: ignore[union-attr]
        return (dtype, autocast, *buffers, device, torch.get_float32_matmul_precision())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scorer:
        """Moves and casts the model, but leaves the frequencies of rotary positions as precise as they were."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, values in self._frequencies:
            buffer = module._buffers[name]
            if buffer is not None and buffer.dtype.itemsize < values.dtype.itemsize:
                module._buffers[name] = values.to(buffer.device)
        return self
