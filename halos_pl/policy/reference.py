"""Reference models: where log pi_ref comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from halos_pl.policy.loading import ModelError, ModelSpec, base_model, load_model, load_tokenizer
from halos_pl.policy.store import fingerprint


class ReferenceModel(ABC):
    """Provides the model that log pi_ref is read from.

    It is no submodule of the LightningModule: never trained, never wrapped by DDP, never written into a
    checkpoint.

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
    def bind(self, policy: nn.Module, spec: ModelSpec, *, stored: bool = False) -> None:
        """Called once, when ``policy`` has just been loaded from ``spec`` and not been trained yet.

        Args:
            policy: what is going to be trained.
            spec: what it was loaded from.
            stored: its log-probs may all be in the reference store: it is asked for its ``fingerprint``, and
                may wait with loading weights until ``scoring`` is entered.

        Raises:
            ModelError: where this reference cannot serve that policy.
        """

    @contextmanager
    @abstractmethod
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Yields the reference in eval mode on the policy's device."""

    def follow(self, policy: nn.Module, step: int) -> None:
        """Called after optimizer step number ``step``, from 1; a frozen reference does nothing."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it: nothing of a frozen reference."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Puts back what ``state`` returned.

        Raises:
            ValueError: where the state is another reference's.
        """
        if state:
            raise ValueError(
                f"the checkpoint holds the weights of a reference that moves, but reference_model is"
                f" {type(self).__name__}: resume with the config of the checkpoint's own run"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
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


def _base_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model without those of its adapter, by the names that they have without it."""
    return ((_without_adapter(name), tensor) for name, tensor in _tensors(model) if ".lora_" not in name)


def _cast_like(model: nn.Module, like: dict[str, torch.Tensor]) -> None:
    """Gives each tensor of ``model`` the dtype and device of its namesake.

    The Trainer's precision may have changed the policy's dtypes. Another dtype of any tensor of the reference, a
    rotary embedding's float32 buffer among bfloat16 weights say, would make the first rewards differ from 0.
    """
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(like[name])


class FrozenCopy(ReferenceModel):
    """A second copy of the policy's initial weights, in the policy's dtypes."""

    storable = True

    def bind(self, policy: nn.Module, spec: ModelSpec, *, stored: bool = False) -> None:
        self._spec = replace(spec, lora=None)
        self._model: nn.Module | None = None
        if stored:
            self.fingerprint = weights_fingerprint(policy)
        else:
            self._keep(load_model(self._spec) if spec.lora else deepcopy(policy))

    def _keep(self, model: nn.Module) -> nn.Module:
        self._model = model.eval().requires_grad_(False)
        return self._model

    def _loaded(self) -> nn.Module:
        """From the files again, since the policy may have been trained."""
        model = load_model(self._spec)
        if weights_fingerprint(model) != self.fingerprint:
            raise ModelError(
                f"the files of {self._spec.path} have changed since the policy was loaded from them, so the reference"
                " model is lost; start the run anew"
            )
        return self._keep(model)

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        model = self._model or self._loaded()
        _cast_like(model, dict(_base_weights(policy)))
        yield model


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

    def bind(self, policy: nn.Module, spec: ModelSpec, *, stored: bool = False) -> None:
        self._moving = {name for name, p in policy.named_parameters() if p.requires_grad}
        self._exact: dict[str, torch.Tensor] = {}  # in float32: half precision would lose small moves, each time
        self._model = deepcopy(policy).eval().requires_grad_(False)  # with its adapter, if it has one

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        _cast_like(self._model, dict(_tensors(policy)))
        yield self._model

    @torch.no_grad()
    def follow(self, policy: nn.Module, step: int) -> None:
        if step % self.every:
            return
        theirs = dict(policy.named_parameters())
        for name, own in self._model.named_parameters():
            if name in self._moving:
                before = self._exact.get(name, own.data).to(theirs[name].device).float()
                self._exact[name] = before.lerp(theirs[name].float(), self.mix)
                own.data = self._exact[name].to(theirs[name])

    def state(self) -> dict[str, torch.Tensor]:
        return {n: self._exact.get(n, p.detach()) for n, p in self._model.named_parameters() if n in self._moving}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        if state.keys() != self._moving:
            raise ValueError(
                "the checkpoint does not hold the weights of this SyncedCopy: resume with the config of its own run"
            )
        for name, own in self._model.named_parameters():
            if name in self._moving:
                self._exact[name] = state[name].float()
                own.data = state[name].to(own)


class AdapterOff(ReferenceModel):
    """The policy itself with its LoRA adapter switched off: no second copy in memory."""

    storable = True

    def check(self, spec: ModelSpec) -> None:
        if spec.lora is None:
            raise ModelError(
                "reference_model: AdapterOff needs a policy with an adapter; set model.policy.lora, or choose"
                " reference_model: FrozenCopy"
            )

    def bind(self, policy: nn.Module, spec: ModelSpec, *, stored: bool = False) -> None:
        if stored:
            self.fingerprint = weights_fingerprint(policy)

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        training = policy.training
        disable: Any = policy.disable_adapter
        try:
            with disable():
                yield policy.eval()
        finally:
            policy.train(training)


class OtherModel(ReferenceModel):
    """Another model than the policy's own start, e.g. a larger one. It must share the policy's vocabulary.

    Args:
        model: what to load.
    """

    storable = True

    def __init__(self, model: ModelSpec) -> None:
        self.spec = model

    def bind(self, policy: nn.Module, spec: ModelSpec, *, stored: bool = False) -> None:
        if load_tokenizer(spec).get_vocab() != load_tokenizer(self.spec).get_vocab():
            raise ModelError(
                f"reference_model: {self.spec.path} and the policy {spec.path} have different vocabularies, so"
                " their log-probs of the same token ids cannot be compared"
            )
        self._model = load_model(self.spec).eval().requires_grad_(False)
        if stored:
            self.fingerprint = weights_fingerprint(self._model)

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self._model.to(next(policy.parameters()).device)


class NoReference(ReferenceModel):
    """None at all: an objective that needs one is refused."""

    def check(self, spec: ModelSpec) -> None:
        raise ModelError(
            "reference_model is NoReference, but the reward needs log pi_ref; choose reward: LogProb, or a reference"
        )

    def bind(self, policy: nn.Module, spec: ModelSpec, *, stored: bool = False) -> None:
        self.check(spec)

    @contextmanager
    def scoring(self, policy: nn.Module) -> Iterator[nn.Module]:
        raise ModelError("NoReference has no model")
        yield
