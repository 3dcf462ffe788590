"""Models of the right shapes without data, and one optimizer step on them by the engine that trains."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from halos_pl.batch import LogProbBatch, Needs, TokenBatch
from halos_pl.objective.halo import Objective, Result
from halos_pl.plan.error import PlanError
from halos_pl.plan.live import LiveMemory, Moment
from halos_pl.policy import head
from halos_pl.policy.adapters import with_lora
from halos_pl.policy.architecture import adapter_off, base_model, evaluating, switch_noise_off, vocabulary_size
from halos_pl.policy.reference import Reference
from halos_pl.policy.scalar_head import freeze_language_head
from halos_pl.policy.scorer import PrefixSharing, Scorer
from halos_pl.policy.spec import LoRASpec, ModelError, QuantizeSpec, reason
from halos_pl.training.engine import StepEngine
from halos_pl.training.scored_rows import differentiable


def meta_model(config: Any, *, lora: LoRASpec | None = None) -> Any:
    """A float32 model on the meta device: its parameters have shapes, but no data.

    Raises:
        ModelError: if the adapter does not fit it.
        PlanError: if transformers cannot build it there.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # each architecture raises its own
        raise PlanError(f"a {getattr(config, 'model_type', 'model')} cannot be planned: {reason(error)}") from error
    return model if lora is None else with_lora(model, lora)


def with_layers(config: Any, layers: int) -> Any:
    """The config with another number of decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def fake_model(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype, adapter: torch.dtype) -> Any:
    """Replaces the meta tensors of ``model`` with fake ones on the CPU.

    Args:
        model: model on the meta device.
        mode: mode of the fake tensors.
        dtype: dtype of its weights.
        adapter: dtype of those of its adapter.
    """
    replaced: dict[int, Any] = {}

    def fake(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    for path, module in model.named_modules():
        cast = adapter if ".lora_" in path else dtype
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = nn.Parameter(fake(parameter, cast), requires_grad=parameter.requires_grad)
                module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, buffer.dtype)
    return model


class _AgainProduct(torch.autograd.Function):
    """The product with a matrix that is dequantized in the forward pass and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.clone().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.clone().to(gradient.dtype), None, None


def _dequantize(model: nn.Module) -> None:
    """Makes the linear layers of a model, without its head and adapter, copy their weight as a quantized layer does.

    Args:
        model: model with fake weights.
    """

    def product(layer: nn.Linear, x: Tensor) -> Tensor:
        return _AgainProduct.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return, no-untyped-call]

    for name, layer in base_model(model).named_modules():
        if type(layer) is nn.Linear and any(part.isdigit() for part in name.split(".")) and ".lora_" not in name:
            layer.forward = MethodType(product, layer)  # type: ignore[method-assign]


class _FakeScorer(Scorer):
    """A scorer of a model without data, whose log-probs cannot be tested."""

    def _test(self) -> None:
        self._tested.add(self._kernels)
        if self.shares_prefixes:
            base_model(self.model).set_attn_implementation(self.attention)

    def _test_scalar_head(self) -> None:
        """Does nothing: its scalars have no values."""


class _FakeReference(Reference):
    """log pi_ref from a second model, or from the policy with its adapter off."""

    def __init__(self, policy: Scorer, model: Scorer | None) -> None:
        self._policy, self._model = policy, model

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        if self._model is not None:
            yield self._model
            return
        switched_off = adapter_off(self._policy.model)
        assert switched_off is not None
        with switched_off(), evaluating(self._policy):
            yield self._policy


class _SameContext:
    def select(self, index: Tensor) -> _SameContext:
        return self


class _AnyLoss(Objective):
    """A loss with the needs of another, whose own memory is negligible: it sees a number per token."""

    def __init__(self, needs: Needs) -> None:
        super().__init__()
        self._needs = needs

    @property
    def needs(self) -> Needs:
        return self._needs

    def prepare(self, rows: LogProbBatch) -> _SameContext:
        return _SameContext()

    def compute_loss(self, rows: LogProbBatch, context: Any) -> Result:
        return Result(torch.stack([scores.sum() for scores in differentiable(rows)]).sum())


@dataclass(frozen=True)
class Work:
    """All that determines the memory of a step beside weights and optimizer.

    Attributes:
        config: config of the policy.
        alike: whether its decoder layers all have the same number of weights.
        lora: adapter that is trained; None to train the whole model.
        quantize: quantization of the base; None for none.
        weights: dtype of the weights when they are used.
        adapter: dtype of those of the adapter.
        autocast: dtype of autocast; None without.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        shares_prefixes: whether rows share prompts.
        needs: needs of the objective.
        reference: config of the reference; None without; the policy's config also for a reference with adapter off.
        adapter_off: whether the reference is the policy with its adapter off.
        micro_batch_rows: as in the engine.
        logits: maximum number of logits in memory at a time.
    """

    config: Any
    alike: bool
    lora: LoRASpec | None
    quantize: QuantizeSpec | None
    weights: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None
    gradient_checkpointing: bool
    shares_prefixes: bool
    needs: Needs
    reference: Any
    adapter_off: bool
    micro_batch_rows: int | None
    logits: int = head.LOGITS


def _step(work: Work, batch: TokenBatch, layers: int) -> list[Moment]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def scorer(config: Any, lora: LoRASpec | None, needs: Needs) -> Scorer:
        whole = meta_model(with_layers(config, min(layers, layers_of(config))), lora=lora)
        model = fake_model(whole, mode, work.weights, work.adapter)
        switch_noise_off(model)
        if not needs.policy_logps:
            freeze_language_head(model)
        sharing: PrefixSharing = "auto" if work.shares_prefixes else "never"
        created = _FakeScorer(model, prefix_sharing=sharing, scalar_head=needs.scalar)
        if created.scalar_head is not None:
            fake_model(created.scalar_head, mode, torch.float32, torch.float32)
        return created

    policy = scorer(work.config, work.lora, work.needs).train()
    if work.quantize is not None:
        _dequantize(policy.model)
    if work.gradient_checkpointing:
        with warnings.catch_warnings(action="ignore"):
            base_model(policy.model).gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    needs, reference = replace(work.needs, samples=0, routing=False), None
    if work.needs.reference:
        other = None if work.adapter_off else scorer(work.reference, None, Needs()).eval().requires_grad_(False)
        reference = _FakeReference(policy, other)
    engine = StepEngine(_AnyLoss(needs), policy, reference, work.micro_batch_rows)
    live = LiveMemory(policy.model, vocabulary_size(policy.model), layers)
    for parameter in reference._model.parameters() if reference and reference._model else ():
        live.ignore(parameter)

    def backward(loss: Tensor) -> None:
        live.backward = True
        loss.backward()
        live.next_micro_batch()

    with live, _autocast(work.autocast), _logits_at_once(work.logits):
        engine.step(batch, backward=backward)
    return live.moments


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def _logits_at_once(number: int) -> Iterator[None]:
    """Makes the head compute so many logits at a time, as on the device that is planned for."""
    before = head.most_logits
    head.most_logits = lambda device: number
    try:
        yield
    finally:
        head.most_logits = before


def layers_of(config: Any) -> int:
    """Number of decoder layers."""
    return int(config.get_text_config().num_hidden_layers)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps torch from logging the traceback of an operation that fails on fake tensors; it is an error as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@_unlogged()
def step_memory(work: Work, batch: TokenBatch) -> list[Moment]:
    """The memory of one optimizer step on one device, without weights: the engine's own step, on fake tensors.

    Layers of the same size need the same memory each, so a deep model is computed from two and three of its layers.

    Raises:
        PlanError: if the model cannot be run without data.
    """
    depth = layers_of(work.config)
    try:
        if depth <= 3 or not work.alike or (work.reference and layers_of(work.reference) != depth):
            return _step(work, batch, depth)
        return _deeper(_step(work, batch, 2), _step(work, batch, 3), depth)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        if isinstance(error, (PlanError, ModelError)):  # an adapter may not fit the model
            raise
        raise PlanError(
            f"the memory of a {work.config.model_type} cannot be computed without its weights: {reason(error)}"
        ) from error


def _deeper(two: list[Moment], three: list[Moment], depth: int) -> list[Moment]:
    """The moments of ``depth`` layers from those of two and three.

    In the backward pass of the last layer, the activations of all layers are in memory; in that of the first, all
    gradients. In between, memory grows or shrinks by the same amount in each layer, so one of the two is the peak.
    """
    more = depth - 2
    layer = max(m.gradients for m in three) - max(m.gradients for m in two)
    result = []
    for moment in two:
        k, top = moment.micro_batch, moment.lowest > 0
        before = _largest(two, (k, moment.lowest, moment.phase))
        after = _largest(three, (k, moment.lowest + top, moment.phase))  # its middle layer is neither
        parts = {part: size + more * (after[part] - before[part]) for part, size in moment.parts.items()}
        gradients = moment.gradients + more * layer * (k > 0 or not top)
        result.append(Moment(k, (depth - 1) * top, moment.phase, gradients, parts))
    return result


def _largest(moments: list[Moment], when: tuple[object, ...]) -> dict[str, int]:
    return max((m for m in moments if (m.micro_batch, m.lowest, m.phase) == when), key=lambda m: m.size).parts
