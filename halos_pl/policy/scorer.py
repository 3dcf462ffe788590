"""The one entry to a model: all code that needs log-probs, hidden states or logits calls a ``Scorer``.

Wrappers such as DDP, ``fully_shard`` and ``torch.compile`` act on a module's forward pass, so no other code may run a
model's decoder or read the weight of its head. Sampling is the exception: ``generate`` of transformers runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from halos_pl.batch import Needs, TokenBatch
from halos_pl.policy import prefix_sharing
from halos_pl.policy.architecture import attention_function, base_model, decoder_and_head, rotary_frequencies
from halos_pl.policy.cast_once import cast_once
from halos_pl.policy.compilation import compile_layers, compiles_whole
from halos_pl.policy.liger import apply_liger, check_liger
from halos_pl.policy.logprobs import Scores, padded_logits, padded_scores
from halos_pl.policy.memory import recomputed
from halos_pl.policy.quantized_weights import quantized_layers
from halos_pl.policy.routing import check_router
from halos_pl.policy.scalar_head import RewardHead, check_classifier
from halos_pl.policy.self_test import padding_fault, self_test_batch, sharing_fault
from halos_pl.policy.sharding import Sharding, gathered_dtype, is_sharded, most_over_ranks, reshard, run
from halos_pl.policy.spec import ModelError

PrefixSharing = Literal["auto", "always", "never"]


class Scorer(nn.Module):
    """A causal language model as a function from rows to log-probs.

    Args:
        model: Causal language model of transformers, or a peft model around one.
        prefix_sharing: ``always`` computes each prompt once for all rows that share it, without padding. ``never``
            computes each row separately. ``auto`` shares prompts if a self-test gets the same log-probs, and logs the
            reason if not.
        compiled: Whether to compile the layers on their first call: on a GPU whole layers, around attention; on a CPU,
            and in a mixture of experts, the parts without attention.
        liger: Whether to use Liger's kernels, once the model is on a GPU (see ``halos_pl.policy.liger``).
        name: Name of the model in messages.
        sharding: How the model is sharded over the ranks; None if each rank holds all of it.
        scalar_head: Whether to add a head that gives each row a scalar, as in a reward model.

    Attributes:
        model: The model.
        scalar_head: The head; None without one.
        sharding: As above.
        shares_prefixes: Whether rows share prompts.

    Raises:
        ModelError: if ``prefix_sharing`` is ``always`` and the model cannot share prompts, if the model computes
            wrong log-probs in a padded batch, or if transformers could not load it as a reward model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prefix_sharing: PrefixSharing = "auto",
        compiled: bool = False,
        liger: bool = False,
        name: str = "the model",
        sharding: Sharding | None = None,
        scalar_head: bool = False,
    ) -> None:
        super().__init__()
        if prefix_sharing not in get_args(PrefixSharing):
            raise ValueError(
                f"prefix_sharing is {prefix_sharing!r}; it must be one of {', '.join(get_args(PrefixSharing))}"
            )
        self.model, self.sharding, self._name = model, sharding, name
        self.scalar_head = RewardHead(model) if scalar_head else None
        self._options: dict[str, Any] = {"prefix_sharing": prefix_sharing, "compiled": compiled, "liger": liger}
        self._patched = False  # whether Liger's kernels are in place
        self._compiled_for: str | None = None  # type of device
        self._whole = False  # whether whole layers are compiled
        # Ranks load the same frozen weights; DDP cannot send those of torchao.
        self._ddp_params_and_buffers_to_ignore = [f"model.{layer}.weight" for layer, _ in quantized_layers(model)]
        self._frequencies = [(module, key, values.clone()) for module, key, values in rotary_frequencies(model)]
        self.shares_prefixes = prefix_sharing != "never"
        self._tested: set[tuple[str, torch.dtype | None]] = set()
        self._use_liger()
        # A reference may be loaded during a step. The self-test must not see the rounding of its autocast.
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            self._test()
            self._test_scalar_head()
        if self.device.type == "cpu" and not compiled:
            cast_once(model)

    @property
    def _kernels(self) -> tuple[str, torch.dtype | None]:
        """Type of the device and, on a GPU, dtype of an autocast: together they decide which kernels compute a pass."""
        device = self.device.type
        autocast = device != "cpu" and torch.is_autocast_enabled(device)
        return device, torch.get_autocast_dtype(device) if autocast else None

    def _test(self) -> None:
        """Tests whether rows can share prompts, and else whether padded rows are right, with the current kernels.

        Raises:
            ModelError: as the class.
        """
        self._tested.add(self._kernels)
        device = "" if self.device.type == "cpu" else f" on {self.device.type}"
        why = sharing_fault(self.model) if self.shares_prefixes else None
        if is_sharded(self.model) and most_over_ranks(why is not None)[0]:
            why = why or "it failed the self-test on another rank"  # all ranks must make the same passes
        if why and self._options["prefix_sharing"] == "always":
            raise ModelError(
                f"model.prefix_sharing is always, but {self._name} cannot share prompts{device}: {why};"
                " choose auto or never"
            )
        if why:
            self.shares_prefixes = False
            if attention_function(self.model) == self.attention:  # shared on another device
                base_model(self.model).set_attn_implementation("sdpa")
        wrong = None if self.shares_prefixes else padding_fault(self.model)
        reshard(self.model)
        if wrong:
            raise ModelError(f"{self._name} cannot be used{device}: {wrong}")
        if why:
            rank_zero_info(f"halos: {self._name} does not share prompts between rows{device}: {why}")
        if self.shares_prefixes:
            base_model(self.model).set_attn_implementation(self.attention)

    def _test_scalar_head(self) -> None:
        """Refuses, before training, a head whose model transformers could not load afterwards.

        Raises:
            ModelError: as the class.
        """
        if self.scalar_head is not None and not is_sharded(self.model):
            check_classifier(self, self_test_batch(self.model))

    #: Name of the attention function of models that share prefixes.
    attention = prefix_sharing.NAME

    def _use_liger(self) -> None:
        """Puts Liger's kernels in place as soon as the model is on a GPU."""
        if self._options["liger"] and not self._patched and self.device.type == "cuda":
            apply_liger(self.model)
            self._patched = True

    def _compile(self) -> None:
        """Compiles the layers for the model's device, which may be known only after the model has been loaded."""
        device = self.device.type
        if self._options["compiled"] and self._compiled_for != device:
            self._compiled_for = device
            self._whole = compiles_whole(self.model, device)
            compile_layers(self.model, whole=self._whole)

    def copy(self) -> Scorer:
        """An independent copy, compiled if this one is: compiled layers round differently."""
        assert not is_sharded(self.model), "a sharded model is loaded again instead"
        other = deepcopy(self)
        other._compiled_for = None  # the copied modules are not compiled
        return other

    def beside(self, model: nn.Module, name: str) -> Scorer:
        """A scorer with the same options for another model."""
        return Scorer(model, name=name, sharding=self.sharding, **self._options)

    def forward(
        self,
        batch: TokenBatch | None = None,
        *,
        wanted: Literal["logps", "scores", "states", "logits"] = "logps",
        needs: Needs | None = None,
        hidden: Tensor | None = None,
    ) -> Any:
        """Runs the model.

        Args:
            batch: n rows.
            wanted: The result: ``logps``; ``scores``, all that ``needs`` names; ``states``, the hidden states of a
                model that shares prefixes; or ``logits``, each row separately.
            needs: Needs of an objective, for ``scores``: log-probs, routing of a mixture of experts, scalars. For
                ``states``, the need of a scalar adds the states after the rows' last tokens.
            hidden: Hidden states [m, size] from an earlier pass, in place of a batch.

        Returns:
            ``logps``: log-probs of the completion tokens, float32 [n, T] whatever the model's dtype, 0 where a row has
            no token with loss; where prefixes are shared, mismatched rows have no gradient. ``scores``:
            :class:`Scores`. ``states``: a list of :class:`States`. ``logits``: float32 [n, T, V]. For ``hidden``:
            logits float32 [m, V].

        The first pass on a GPU repeats the self-test there, with the pass's autocast.

        Raises:
            ModelError: if the routing is requested from a model that is not a mixture of experts, scalars from one
                without a head, or the states from one that does not share prefixes; or if the self-test on a GPU fails
                as in the constructor.
        """
        result = self._result(batch, wanted, hidden, needs or Needs())
        if not torch.is_grad_enabled():
            reshard(self.model)
        return result

    def _result(self, batch: TokenBatch | None, wanted: str, hidden: Tensor | None, needs: Needs) -> Any:
        self._use_liger()
        if self._options["liger"]:
            check_liger(self.device)
        if hidden is not None:
            return run(self.model, lambda: decoder_and_head(self.model)[1](hidden).float())
        assert batch is not None
        if self._kernels not in self._tested:  # the first pass after a move to a GPU
            self._test()
        self._compile()
        if wanted == "states":
            if not self.shares_prefixes:
                raise ModelError(f"{self._name} does not share prompts; set model.prefix_sharing to never")
            return run(self.model, lambda: list(prefix_sharing.shared_states(self.model, batch, last=needs.scalar)))
        if wanted == "logits":
            return padded_logits(self.model, batch)[0]
        scores = self._scores(batch, needs)
        return scores if wanted == "scores" else scores.logps

    def _scores(self, batch: TokenBatch, needs: Needs) -> Scores:
        if needs.scalar and self.scalar_head is None:
            raise ModelError(f"the objective needs a scalar per row, but {self._name} has no scalar head")
        experts = check_router(self.model) if needs.routing else None
        score = prefix_sharing.shared_scores if self.shares_prefixes else padded_scores
        # Compiled layers hide their operations, and choose themselves what to keep.
        with nullcontext() if self._whole else recomputed():
            return score(
                self.model,
                batch,
                experts,
                scalar_head=self.scalar_head if needs.scalar else None,
                logps=needs.policy_logps,
            )

    def scalars(self, batch: TokenBatch) -> Tensor:
        """The scalars of n rows, float32 [n].

        Raises:
            ModelError: if there is no scalar head.
        """
        return self(batch, wanted="scores", needs=Needs(scalar=True)).scalar  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def numerics(self) -> tuple[Any, ...]:
        """The settings that affect log-probs: dtypes, autocast, device, precision of matrix products, kernels."""
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = next(self.model.parameters()).dtype
        gathered = (f"gathered in {gathered_dtype(self.model)}",) if is_sharded(self.model) else ()
        buffers = {module._buffers[name].dtype for module, name, _ in self._frequencies} - {dtype}  # type: ignore[union-attr]
        kernels = ["liger"] if self._options["liger"] else []
        if device == "cpu" and self.shares_prefixes and (autocast or dtype).itemsize == 2:
            kernels.append("attention in float32")
        return (dtype, autocast, *gathered, *buffers, device, torch.get_float32_matmul_precision(), *kernels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scorer:
        """Moves and casts the model, but keeps the precision of its rotary frequencies."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._use_liger()
        for module, name, values in self._frequencies:
            buffer = module._buffers[name]
            if buffer is not None and buffer.dtype.itemsize < values.dtype.itemsize:
                module._buffers[name] = values.to(buffer.device)
        return self


def scorer_of(policy: nn.Module) -> Scorer:
    """The scorer inside a wrapper such as DDP, which hides its attributes; only the wrapper may be called."""
    parts: Any = policy.modules() if isinstance(policy, nn.Module) else ()
    return next((part for part in parts if isinstance(part, Scorer)), policy)  # type: ignore[return-value]
