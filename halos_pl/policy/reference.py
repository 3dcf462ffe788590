"""Reference models, which give log pi_ref."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from halos_pl.batch import Needs, TokenBatch
from halos_pl.policy.architecture import (
    adapter_off,
    base_model,
    evaluating,
    has_adapter,
    is_adapter_weight,
    keeps_quantised,
    name_in_base,
)
from halos_pl.policy.loading import (
    ModelError,
    ModelSpec,
    load_reference,
    load_tokenizer,
    stored_quantisation,
)
from halos_pl.policy.quantized_weights import plain_parts, quantized_layers
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.sharding import whole
from halos_pl.policy.store import fingerprint

NAME = "the reference model"
#: A copy would be quantized to the same weights.
_QUANTIZED = (
    "reference_model: FrozenCopy would be a second copy of the quantized model, and give the same log-probs as the"
    " policy with its adapter off; choose reference_model: AdapterOff"
)


class Reference(ABC):
    """Gives log pi_ref of rows.

    Attributes:
        one_model: whether it is a single model, so that its probabilities sum to 1.
        rows_computed: number of rows that it has scored.
    """

    one_model = True
    rows_computed = 0

    @abstractmethod
    def scoring(self) -> AbstractContextManager[Scorer]:
        """A context manager that gives the reference as a scorer, in eval mode on the policy's device."""

    @torch.no_grad()
    def logps(self, batch: TokenBatch) -> Tensor:
        """Log-probs of the completion tokens, float32 [n, T], without gradient (see :meth:`Scorer.forward`)."""
        self.rows_computed += len(batch)
        with self.scoring() as scorer:
            logps: Tensor = scorer(batch)
            return logps


def check_divergence(reference: object, needs: Needs) -> None:
    """Refuses a reference of several models where a KL divergence over the whole vocabulary is needed.

    Raises:
        ValueError: names the class of ``reference``.
    """
    if needs.exact_kl and not getattr(reference, "one_model", True):
        raise ValueError(
            f"{type(reference).__name__} is a mean of several models and no distribution, but the reference point needs"
            " a KL divergence over the whole vocabulary; choose another reference_point, such as MismatchedKL"
        )


class FixedModel(Reference):
    """A model in memory, for evaluations and custom loops; not available in a config.

    Args:
        model: causal language model.
        policy: policy that it is compared with; it determines the device and whether prefixes are shared.

    Raises:
        ValueError: the model is the policy's own.
    """

    def __init__(self, model: nn.Module, policy: Scorer) -> None:
        if model is policy.model:
            raise ValueError("FixedModel: the model is the policy itself, which training changes; give it a copy")
        self._policy = policy
        self._scorer = policy.beside(model, NAME).eval()

    def scoring(self) -> AbstractContextManager[Scorer]:
        return nullcontext(self._scorer.to(self._policy.device))


class ReferenceModel(Reference):
    """A reference derived from the policy before training.

    It is not a submodule of the LightningModule: it is never trained, wrapped by DDP, or saved in a checkpoint.

    Attributes:
        initial: whether it is, and stays, the policy before training.
        storable: whether its log-probs can be stored for other runs: it never changes, and has a ``fingerprint``.
        fingerprint: hash of its weights as loaded; set by ``bind`` with ``stored``, if ``storable``.
    """

    initial = False
    storable = False
    fingerprint: str

    def check(self, spec: ModelSpec) -> None:
        """Refuses policies that this reference does not work with, before anything is loaded.

        Raises:
            ModelError: names the reason and an alternative.
        """
        return None

    def check_files(self, spec: ModelSpec) -> None:
        """Refuses policies by their configuration, and references by their own, before weights are loaded.

        Raises:
            ModelError: names the reason and an alternative.
        """
        return None

    @abstractmethod
    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        """Called once, after ``policy`` has been loaded and before it is trained.

        Args:
            policy: policy that will be trained.
            spec: specification that it was loaded from; None for a model that was already in memory.
            stored: whether its log-probs come from the reference store. It must then set ``fingerprint``, and should
                load weights only when ``scoring`` is entered, as the store may contain all log-probs.

        Raises:
            ModelError: this reference does not work with that policy.
        """

    def follow(self, step: int) -> None:
        """Called after optimizer step ``step``, counted from 1; a frozen reference does nothing."""
        return None

    def state(self) -> dict[str, Tensor]:
        """The weights that a checkpoint must contain; none for a frozen reference."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restores the weights that ``state`` returned.

        Raises:
            ValueError: the weights are those of another reference.
        """
        if state:
            raise ValueError(
                f"the checkpoint contains the weights of a moving reference, but reference_model is"
                f" {type(self).__name__}; resume with the config that the checkpoint was trained with"
            )


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names."""
    return chain(model.named_parameters(), model.named_buffers())


def weights_fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """The :func:`fingerprint` of a model, without its adapter if it has one; all ranks must call it if it is sharded.

    With ``dtype``, its fingerprint in that dtype.

    Leaves out the frequencies of rotary positions: they follow from the config, but may differ in the last bit between
    devices.
    """
    kept = {name_in_base(name) for name in model.state_dict()}
    layers = {name_in_base(f"{name}.weight"): layer for name, layer in quantized_layers(model)}
    weights = (
        (f"{name}{part}", value)
        for name, tensor in _base_weights(model)
        if name in kept
        for part, value in (plain_parts(layers[name]) if name in layers else {"": whole(tensor).to(dtype)}).items()
    )
    return fingerprint(weights, base_model(model).config.to_dict())


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model without its adapter, with their names in that model."""
    return ((name_in_base(name), tensor) for name, tensor in tensors_of(model) if not is_adapter_weight(name))


def match(scorer: Scorer, policy: Scorer, tensors: Callable[[nn.Module], Iterator[tuple[str, Tensor]]]) -> None:
    """Gives each tensor of a reference the dtype and device of the policy's tensor with the same name.

    The Trainer's precision may have changed the policy's dtypes. If a single tensor of the reference has another dtype,
    such as a float32 rotary buffer among bfloat16 weights, the first rewards differ from 0.

    The reference of a sharded policy only gets its device: it was loaded in the dtype in which the policy's weights are
    gathered.
    """
    if policy.sharding is not None:
        if scorer.device != policy.device:
            scorer.to(policy.device)
        return
    like = dict(tensors(policy.model))
    for name, tensor in tensors_of(scorer.model):
        if (tensor.dtype, tensor.device) != (like[name].dtype, like[name].device):
            tensor.data = tensor.data.to(like[name])


class FrozenCopy(ReferenceModel):
    """A second copy of the policy's initial weights, in the policy's dtypes."""

    initial = storable = True

    def check(self, spec: ModelSpec) -> None:
        if spec.quantize is not None:
            raise ModelError(_QUANTIZED)

    def check_files(self, spec: ModelSpec) -> None:
        if stored_quantisation(spec):
            raise ModelError(_QUANTIZED)

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        if keeps_quantised(base_model(policy.model)):
            raise ModelError(_QUANTIZED)
        self._policy = policy
        self._spec = spec and replace(spec, lora=None)
        self._scorer: Scorer | None = None
        if stored:
            half = policy.sharding is not None and policy.sharding.half
            self.fingerprint = weights_fingerprint(policy.model, torch.bfloat16 if half else None)
        if self._spec is None or not stored:
            with_adapter = has_adapter(policy.model)
            if with_adapter and self._spec is None:
                raise ModelError("FrozenCopy cannot copy a peft model in memory; choose reference_model: AdapterOff")
            if self._spec and (with_adapter or policy.sharding):
                self._keep(policy.beside(load_reference(self._spec, policy.sharding), NAME))
            else:
                self._keep(policy.copy())

    def _keep(self, scorer: Scorer) -> Scorer:
        self._scorer = scorer.eval().requires_grad_(False)
        return self._scorer

    def _loaded(self) -> Scorer:
        """The reference loaded from its files, as the policy may already have been trained."""
        assert self._spec is not None
        model = load_reference(self._spec, self._policy.sharding)
        if weights_fingerprint(model) != self.fingerprint:
            raise ModelError(
                f"the files of {self._spec.path} have changed since the policy was loaded from them, so the reference"
                " model is lost; start a new run"
            )
        return self._keep(self._policy.beside(model, NAME))

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        scorer = self._scorer or self._loaded()
        match(scorer, self._policy, _base_weights)
        yield scorer


class AdapterOff(ReferenceModel):
    """The policy itself with its LoRA adapter switched off: no second copy in memory."""

    initial = storable = True

    def check(self, spec: ModelSpec) -> None:
        if spec.lora is None:
            raise ModelError(
                "reference_model: AdapterOff needs a policy with an adapter; set model.policy.lora, or choose"
                " reference_model: FrozenCopy"
            )

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        switched_off = adapter_off(policy.model)
        if switched_off is None:
            raise ModelError("reference_model: AdapterOff needs a policy with an adapter; choose FrozenCopy")
        self._policy, self._switched_off = policy, switched_off
        if stored:
            self.fingerprint = weights_fingerprint(policy.model)

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        with self._switched_off(), evaluating(self._policy):
            yield self._policy


class OtherModel(ReferenceModel):
    """A model other than the initial policy, such as a larger one, with the same vocabulary.

    Args:
        model: specification of the model.
    """

    storable = True

    def __init__(self, model: ModelSpec) -> None:
        self.spec = model

    def check_files(self, spec: ModelSpec) -> None:
        if method := stored_quantisation(self.spec):
            raise ModelError(
                f"reference_model: {self.spec.path} is quantized ({method}), which only a policy with"
                " model.policy.lora may be; use the original model"
            )

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        if spec and load_tokenizer(spec).get_vocab() != load_tokenizer(self.spec).get_vocab():
            raise ModelError(
                f"reference_model: {self.spec.path} and the policy {spec.path} have different vocabularies, so"
                " their log-probs of the same token ids cannot be compared"
            )
        self._policy = policy
        model = load_reference(self.spec, policy.sharding)
        self._scorer = policy.beside(model, NAME).eval().requires_grad_(False)
        if stored:
            self.fingerprint = weights_fingerprint(self._scorer.model)

    def scoring(self) -> AbstractContextManager[Scorer]:
        if self._scorer.device != self._policy.device:
            self._scorer.to(self._policy.device)
        return nullcontext(self._scorer)


class NoReference(ReferenceModel):
    """No reference: objectives that need one are refused."""

    def check(self, spec: ModelSpec) -> None:
        raise ModelError(
            "reference_model is NoReference, but the reward needs log pi_ref; choose a reference, or reward: LogProb"
        )

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        raise ModelError("NoReference has no model")

    def scoring(self) -> AbstractContextManager[Scorer]:
        raise ModelError("NoReference has no model")
