"""The models of a run: the policy, the reference, and the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

import halos_pl.policy.moving_reference  # noqa: F401  # its classes are found by their bare names
from halos_pl.batch import Needs
from halos_pl.policy.adapters import chain
from halos_pl.policy.architecture import base_model, has_adapter, noise_settings
from halos_pl.policy.limits import check_length, check_vocabulary
from halos_pl.policy.loading import ModelSpec, check_files, check_reward_model, load_model, load_tokenizer
from halos_pl.policy.reference import AdapterOff, FrozenCopy, NoReference, ReferenceModel, check_divergence
from halos_pl.policy.scalar_head import freeze_language_head
from halos_pl.policy.scorer import PrefixSharing, Scorer
from halos_pl.policy.sharding import Sharding
from halos_pl.policy.spec import ModelError
from halos_pl.policy.store import ReferenceStore, StoredReference

if TYPE_CHECKING:
    Policy = ModelSpec | nn.Module
else:
    Policy = ModelSpec  # all that a config may name


class Models:
    """Loads policy and reference according to a module's arguments (see ``HALOModule``).

    Attributes:
        spec: the policy's specification; None for a model that was already in memory.
        reference_model: makes the reference.
        bound: whether it has made it.
        sharding: how models are sharded over the ranks; None if each rank holds all of them.
        reference: source of log pi_ref; None until it is made.

    Raises:
        ValueError: if the arguments cannot be combined.
    """

    def __init__(
        self,
        policy: ModelSpec | nn.Module,
        reference_model: ReferenceModel | None,
        *,
        needs: Needs,
        prefix_sharing: PrefixSharing,
        reference_store: bool,
    ) -> None:
        self.spec = policy if isinstance(policy, ModelSpec) else None
        self._in_memory: Any = policy if self.spec is None else None
        with_adapter = bool(policy.lora) if isinstance(policy, ModelSpec) else has_adapter(policy)
        self.reference_model = reference_model or (AdapterOff() if with_adapter else FrozenCopy())
        self.bound = False
        self.sharding: Sharding | None = None
        self.reference: ReferenceModel | StoredReference | None = None
        self.prefix_sharing, self.stored, self._needs = prefix_sharing, reference_store, needs
        if self.spec and needs.reference:
            self.reference_model.check(self.spec)
        if self.spec and prefix_sharing == "always" and self.spec.attn_implementation != "sdpa":
            raise ValueError(
                f"model.prefix_sharing is always, which needs sdpa attention, but model.policy.attn_implementation is"
                f" {self.spec.attn_implementation}; choose auto or never"
            )
        check_divergence(self.reference_model, needs)
        if reference_store and not self.reference_model.storable and self.can_compare:
            raise ValueError(
                f"model.reference_store is true, but log-probs of {type(self.reference_model).__name__} cannot be"
                " stored: it changes during the run, or has no fingerprint; set it to false, or choose FrozenCopy or"
                " AdapterOff"
            )

    def check_files(self) -> None:
        """Refuses models by their configuration files, before any weights are read.

        Raises:
            ModelError: naming the setting.
        """
        if self.spec is not None:
            check_files(self.spec)
            if self._needs.scalar:
                check_reward_model(self.spec)
            if self._needs.reference:
                self.reference_model.check_files(self.spec)

    @property
    def dtype(self) -> str:
        """Name of the dtype of the policy's weights."""
        return self.spec.dtype if self.spec else str(next(self._in_memory.parameters()).dtype).removeprefix("torch.")

    def load_in(self, precision: str) -> None:
        """Loads a float32 policy, and a reference copied from it, straight in bfloat16 if the Trainer rounds it anyway.

        The numbers are the same, but no float32 copy is ever in memory. Adapters are still merged and made in float32.

        Args:
            precision: the Trainer's precision.
        """
        spec = self.spec
        if spec and spec.dtype == "float32" and precision == "bf16-true" and not spec.lora and not chain(spec)[1]:
            self.spec = replace(spec, dtype="bfloat16")

    @property
    def can_compare(self) -> bool:
        """Whether there are log-probs to compare with those of a reference."""
        return self._needs.policy_logps and not isinstance(self.reference_model, NoReference)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded without the model.

        Raises:
            ModelError: if there is none.
        """
        if self.spec is not None:
            return load_tokenizer(self.spec)
        if not (folder := str(getattr(self._in_memory, "name_or_path", ""))):
            raise ModelError("the policy in memory has no folder to load a tokenizer from; set module.tokenizer to it")
        return load_tokenizer(ModelSpec(folder))

    def policy(self) -> Scorer:
        """The policy before training."""
        # transformers loads in eval mode; the only difference here is gradient checkpointing (dropout is off).
        if self.sharding and not self.spec:
            raise ModelError(
                "fsdp2 loads each rank's share of a model from its files, but the policy is in memory; save it with"
                " save_pretrained, and pass ModelSpec(folder)"
            )
        model = load_model(self.spec, self.sharding) if self.spec else self._in_memory
        assert model is not None
        noise = {} if self.spec else {name: p for name, p in noise_settings(base_model(model).config).items() if p > 0}
        if noise:
            listed = ", ".join(f"{name} {probability:g}" for name, probability in noise.items())
            rank_zero_warn(
                f"halos: the policy in memory is trained with dropout ({listed}), which its reference does not have;"
                " load it with these settings at 0 to train without"
            )
        options = {} if self.spec is None else {"compiled": self.spec.compile, "liger": self.spec.liger}
        if not self._needs.policy_logps:
            freeze_language_head(model)
        return Scorer(
            model.train(),
            prefix_sharing=self.prefix_sharing,
            name="the policy",
            sharding=self.sharding,
            scalar_head=self._needs.scalar,
            **options,
        )

    def bind(self, policy: Scorer, *, fresh: bool, data: Any) -> None:
        """Makes the reference.

        Args:
            policy: the model that is trained.
            fresh: whether it has just been loaded; otherwise a fit without a reference may have trained it.
            data: the DataModule, whose rows must fit the reference.
        """
        start = policy if fresh or self.spec is None else self.policy()
        self.reference_model.bind(start, self.spec, stored=self.stored)
        self.bound = True
        if self.stored:
            sharded = self.sharding is not None
            self.reference = StoredReference(self.reference_model, ReferenceStore(), lambda: policy.numerics, sharded)
        else:
            self.reference = self.reference_model
            with self.reference.scoring() as scorer:
                self.check_rows(scorer, data)

    def check_rows(self, scorer: Scorer, data: Any) -> None:
        """Refuses rows that are too long for a model, or contain tokens that it does not know."""
        check_length(scorer.model, getattr(data, "longest", 0))
        if hasattr(data, "tokens"):
            check_vocabulary(scorer.model, self.tokenizer, data.tokens())

    @property
    def reference_rows(self) -> dict[str, int]:
        """Numbers of rows whose reference log-probs came from the store, and of rows where they were computed."""
        names = ("stored", "computed")
        return {name: getattr(self.reference, f"rows_{name}", 0) for name in names}
