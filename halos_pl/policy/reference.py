"""Reference models: where log pi_ref comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from halos_pl.batch import TokenBatch
from halos_pl.policy.architecture import base_model
from halos_pl.policy.loading import ModelError, ModelSpec, load_model, load_tokenizer
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.store import fingerprint

_NAME = "the reference model"


class Reference(ABC):
    """What gives log pi_ref of rows.

    Attributes:
        rows_computed: rows that it has scored.
    """

    rows_computed = 0

    @abstractmethod
    def scoring(self) -> AbstractContextManager[Scorer]:
        """Entered to get the reference, in eval mode on the policy's device."""

    @torch.no_grad()
    def logps(self, batch: TokenBatch) -> Tensor:
        """Log-probs of the completion tokens, float32 [n, T], without gradient (see :meth:`Scorer.forward`)."""
        self.rows_computed += len(batch)
        with self.scoring() as scorer:
            logps: Tensor = scorer(batch)
            return logps


class FixedModel(Reference):
    """A model in memory, for evaluations and loops of one's own; a config cannot name it.

    Args:
        model: a causal language model.
        policy: what it is compared with; decides whether prefixes are shared, and the device.
    """

    def __init__(self, model: nn.Module, policy: Scorer) -> None:
        self._policy = policy
        self._scorer = policy.beside(model, _NAME).eval()

    def scoring(self) -> AbstractContextManager[Scorer]:
        return nullcontext(self._scorer.to(self._policy.device))


class ReferenceModel(Reference):
    """A reference that is made from the policy before it is trained.

    It is no submodule of the LightningModule: never trained, never wrapped by DDP, never written into a checkpoint.

    Attributes:
        storable: whether its log-probs can be kept for other runs: it never changes, and has a ``fingerprint``.
        fingerprint: a hash of its weights as they were loaded; set by ``bind`` with ``stored``, where ``storable``.
    """

    storable = False
    fingerprint: str

    def check(self, spec: ModelSpec) -> None:
        """Refuses, before anything is loaded, policies of ``spec`` that this reference cannot serve.

        Raises:
            ModelError: with the reason and what to choose instead.
        """
        return None

    @abstractmethod
    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        """Called once, when ``policy`` has just been loaded and not been trained yet.

        Args:
            policy: what is going to be trained.
            spec: what it was loaded from; None for a model that was already in memory.
            stored: its log-probs may all be in the reference store: it is asked for its ``fingerprint``, and
                may load weights only when ``scoring`` is entered.

        Raises:
            ModelError: where this reference cannot serve that policy.
        """

    def follow(self, step: int) -> None:
        """Called after optimizer step number ``step``, from 1; a frozen reference does nothing."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it: nothing of a frozen reference."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Puts back what ``state`` returned.

        Raises:
            ValueError: where the state is another reference's.
        """
        if state:
            raise ValueError(
                f"the checkpoint holds the weights of a reference that moves, but reference_model is"
                f" {type(self).__name__}: resume with the config of the checkpoint's own run"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def weights_fingerprint(model: nn.Module) -> str:
    """The :func:`fingerprint` of a model, of one with an adapter without it.

    Without frequencies of positions, which follow from the config: not to the last bit on every device.
    """
    kept = {_without_adapter(name) for name in model.state_dict()}
    weights = ((name, tensor) for name, tensor in _base_weights(model) if name in kept)
    return fingerprint(weights, base_model(model).config.to_dict())


def _without_adapter(name: str) -> str:
    """The name that a weight below a peft model has in the model without it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model without those of its adapter, by the names that they have without it."""
    return ((_without_adapter(name), tensor) for name, tensor in _tensors(model) if ".lora_" not in name)


def _cast_like(model: nn.Module, like: dict[str, Tensor]) -> None:
    """Gives each tensor of ``model`` the dtype and device of its namesake.

    The Trainer's precision may have changed the policy's dtypes. Another dtype of any tensor of the reference, a
    rotary embedding's float32 buffer among bfloat16 weights say, would make the first rewards differ from 0.
    """
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(like[name])


class FrozenCopy(ReferenceModel):
    """A second copy of the policy's initial weights, in the policy's dtypes."""

    storable = True

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        self._policy = policy
        self._spec = spec and replace(spec, lora=None)
        self._scorer: Scorer | None = None
        if stored:
            self.fingerprint = weights_fingerprint(policy.model)
        if self._spec is None or not stored:
            with_adapter = hasattr(policy.model, "peft_config")
            if with_adapter and self._spec is None:
                raise ModelError("FrozenCopy cannot copy a peft model in memory; choose reference_model: AdapterOff")
            model = load_model(self._spec) if with_adapter and self._spec else None
            self._keep(policy.beside(model, _NAME) if model is not None else deepcopy(policy))

    def _keep(self, scorer: Scorer) -> Scorer:
        self._scorer = scorer.eval().requires_grad_(False)
        return self._scorer

    def _loaded(self) -> Scorer:
        """From the files again, since the policy may have been trained."""
        assert self._spec is not None
        model = load_model(self._spec)
        if weights_fingerprint(model) != self.fingerprint:
            raise ModelError(
                f"the files of {self._spec.path} have changed since the policy was loaded from them, so the reference"
                " model is lost; start the run anew"
            )
        return self._keep(self._policy.beside(model, _NAME))

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        scorer = self._scorer or self._loaded()
        _cast_like(scorer.model, dict(_base_weights(self._policy.model)))
        yield scorer


class SyncedCopy(ReferenceModel):
    """A copy of the policy that follows it: every so many steps reference = mix * policy + (1 - mix) * reference.

    ``mix=1`` replaces the reference, as online and humanline alignment do; less is the soft update of TR-DPO
    (Gorbatovski et al. 2024, section 3). Only what is trained moves; it is written into checkpoints.

    Args:
        every: optimizer steps between two updates.
        mix: share of the policy, in (0, 1].

    Raises:
        ValueError: for a number outside its range.
    """

    def __init__(self, *, every: int, mix: float = 1.0) -> None:
        if every < 1 or not 0 < mix <= 1:
            raise ValueError(f"SyncedCopy: every is {every} and mix {mix}; it must be every >= 1 and 0 < mix <= 1")
        self.every, self.mix = every, float(mix)

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        self._policy = policy
        self._moving = {name for name, p in policy.model.named_parameters() if p.requires_grad}
        self._exact: dict[str, Tensor] = {}  # in float32: half precision would lose small moves, each time
        self._scorer = deepcopy(policy).eval().requires_grad_(False)  # with its adapter, if it has one

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        _cast_like(self._scorer.model, dict(_tensors(self._policy.model)))
        yield self._scorer

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._scorer.model.named_parameters() if name in self._moving)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if step % self.every:
            return
        of_policy = dict(self._policy.model.named_parameters())
        for name, parameter in self._parameters():
            before = self._exact.get(name, parameter.data).to(of_policy[name].device).float()
            self._exact[name] = before.lerp(of_policy[name].float(), self.mix)
            parameter.data = self._exact[name].to(of_policy[name])

    def state(self) -> dict[str, Tensor]:
        return {name: self._exact.get(name, p.detach()) for name, p in self._parameters()}

    def restore(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self._moving:
            raise ValueError(
                "the checkpoint does not hold the weights of this SyncedCopy: resume with the config of its own run"
            )
        for name, parameter in self._parameters():
            self._exact[name] = state[name].float()
            parameter.data = state[name].to(parameter)


class AdapterOff(ReferenceModel):
    """The policy itself with its LoRA adapter switched off: no second copy in memory."""

    storable = True

    def check(self, spec: ModelSpec) -> None:
        if spec.lora is None:
            raise ModelError(
                "reference_model: AdapterOff needs a policy with an adapter; set model.policy.lora, or choose"
                " reference_model: FrozenCopy"
            )

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        if not hasattr(policy.model, "disable_adapter"):
            raise ModelError("reference_model: AdapterOff needs a policy with an adapter; choose FrozenCopy")
        self._policy = policy
        if stored:
            self.fingerprint = weights_fingerprint(policy.model)

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        training = self._policy.training
        disable: Any = self._policy.model.disable_adapter
        try:
            with disable():
                yield self._policy.eval()
        finally:
            self._policy.train(training)


class OtherModel(ReferenceModel):
    """Another model than the policy's own start, e.g. a larger one. It must share the policy's vocabulary.

    Args:
        model: what to load.
    """

    storable = True

    def __init__(self, model: ModelSpec) -> None:
        self.spec = model

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        if spec and load_tokenizer(spec).get_vocab() != load_tokenizer(self.spec).get_vocab():
            raise ModelError(
                f"reference_model: {self.spec.path} and the policy {spec.path} have different vocabularies, so"
                " their log-probs of the same token ids cannot be compared"
            )
        self._policy = policy
        self._scorer = policy.beside(load_model(self.spec), _NAME).eval().requires_grad_(False)
        if stored:
            self.fingerprint = weights_fingerprint(self._scorer.model)

    def scoring(self) -> AbstractContextManager[Scorer]:
        return nullcontext(self._scorer.to(self._policy.device))


class NoReference(ReferenceModel):
    """None at all: an objective that needs one is refused."""

    def check(self, spec: ModelSpec) -> None:
        raise ModelError(
            "reference_model is NoReference, but the reward needs log pi_ref; choose reward: LogProb, or a reference"
        )

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        raise ModelError("NoReference has no model")

    def scoring(self) -> AbstractContextManager[Scorer]:
        raise ModelError("NoReference has no model")
