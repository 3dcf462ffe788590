"""All that a plan needs to know of a run, from its module's settings and the shapes of its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from halos_pl.batch import Needs
from halos_pl.plan.error import PlanError
from halos_pl.plan.fake import meta_model
from halos_pl.plan.optimizer_state import OptimizerMemory, optimizer_memory
from halos_pl.plan.shapes import Shape
from halos_pl.policy.architecture import decoder_and_head, text_config
from halos_pl.policy.moving_reference import PastPolicies, SyncedCopy
from halos_pl.policy.reference import AdapterOff, FrozenCopy, NoReference, OtherModel, ReferenceModel
from halos_pl.policy.scalar_head import freeze_language_head
from halos_pl.policy.spec import LoRASpec, QuantizeSpec
from halos_pl.training.lost_updates import HALF
from halos_pl.training.throughput import Cost, cost

#: Precisions of the Trainer that change the dtype of the weights, or of their use.
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16": torch.bfloat16, "16": torch.float16}
_NONE = ("None", "32-true", "32")


class Numerics(NamedTuple):
    """The dtypes of a run.

    Attributes:
        weights: of the base model's weights.
        adapter: of the adapter's weights.
        gathered: of the weights when a sharded model is gathered; None: as ``weights``.
        autocast: of autocast; None without.
    """

    weights: torch.dtype
    adapter: torch.dtype
    gathered: torch.dtype | None
    autocast: torch.dtype | None

    @property
    def used(self) -> torch.dtype:
        """dtype of the weights in memory when they are used."""
        return self.gathered or self.weights


@dataclass(frozen=True)
class Parameters:
    """Counts of a model's parameters.

    Attributes:
        total: all, tied ones once, without the adapter.
        trained: those with a gradient.
        adapter: those of the adapter, and of modules that are trained whole beside it.
        trained_vectors: trained ones in vectors, such as weights of norms.
        largest: those of the largest trained tensor.
        block: those of the largest decoder layer.
        alike: whether all decoder layers have the same number.
        outside: those outside the decoder layers: embedding, head, last norm.
        trained_block, trained_outside: the trained ones among these.
        bits: mean bits per parameter in memory; None: those of the dtype. For a quantised base.
        block_bits: mean bits per parameter of the decoder layers, for a quantised base.
    """

    total: int
    trained: int
    adapter: int
    trained_vectors: int
    largest: int
    block: int
    alike: bool
    outside: int
    trained_block: int
    trained_outside: int
    bits: float | None = None
    block_bits: float = 0.0


def parameters_of(model: nn.Module, bits: float | None = None, plain_bits: int = 32) -> Parameters:
    """Counts of a model on the meta device.

    Args:
        model: the model.
        bits: bits per weight of the layers' matrices, if they are quantised.
        plain_bits: bits of all other parameters, if these are.
    """
    layers: dict[int, list[nn.Parameter]] = {}
    outside: list[nn.Parameter] = []
    adapter = 0
    for name, parameter in model.named_parameters():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        (layers.setdefault(numbers[0], []) if numbers else outside).append(parameter)
        adapter += parameter.numel() * (".lora_" in name or ".modules_to_save." in name)
    every = list(model.parameters())
    trained = [p for p in every if p.requires_grad]
    block = max(layers.values(), key=_count, default=[])
    total = _count(every) - adapter
    block_bits = 0.0
    if bits is not None:
        own = (".lora_", ".modules_to_save.")
        names = (
            (name, p) for name, p in model.named_parameters() if p.dim() == 2 and not any(part in name for part in own)
        )
        matrices = sum(p.numel() for name, p in names if any(part.isdigit() for part in name.split(".")))
        in_layers = total - _count(outside)
        block_bits = (matrices * bits + (in_layers - matrices) * plain_bits) / in_layers
        bits = (matrices * bits + (total - matrices) * plain_bits) / total
    return Parameters(
        total=total,
        trained=_count(trained),
        adapter=adapter,
        trained_vectors=_count([p for p in trained if p.dim() < 2]),
        largest=max((p.numel() for p in trained), default=0),
        block=_count(block),
        alike=len(set(map(_count, layers.values()))) <= 1,
        outside=_count(outside),
        trained_block=_count([p for p in block if p.requires_grad]),
        trained_outside=_count([p for p in outside if p.requires_grad]),
        bits=bits,
        block_bits=block_bits,
    )


def _with_scalar_head(counts: Parameters, size: int) -> Parameters:
    """The counts of a policy with a scalar head, whose ``size`` weights each rank holds whole, like an adapter's."""
    return replace(
        counts, trained=counts.trained + size, adapter=counts.adapter + size, largest=max(counts.largest, size)
    )


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


@dataclass(frozen=True)
class Settings:
    """A run's settings.

    Attributes:
        policy: shape of the policy.
        dtype: ``model.policy.dtype``.
        precision: ``trainer.precision``.
        lora: adapter that is trained; None to train the whole model.
        gradient_checkpointing: as in ``model.policy``.
        reference_model: as in ``HALOModule``.
        other: shape of another model as reference; None for all other references.
        other_dtype: its dtype.
        stored: whether the reference's log-probs are stored.
        needs: needs of the objective.
        shares_prefixes: whether rows share prompts.
        micro_batch_rows: as in ``HALOModule``.
        batch_size: ``data.batch_size``.
        make_optimizer: ``model.optimizer``.
        master_weights: as in ``HALOModule``.
        quantize: quantization of the base; None for none.
        unsharded: why ``fsdp2`` refuses the run; empty if it does not.
    """

    policy: Shape
    dtype: str
    precision: str
    lora: LoRASpec | None
    gradient_checkpointing: bool
    reference_model: ReferenceModel
    other: Shape | None
    other_dtype: str
    stored: bool
    needs: Needs
    shares_prefixes: bool
    micro_batch_rows: int | None
    batch_size: int
    make_optimizer: Callable[[list[nn.Parameter]], Any]
    master_weights: bool
    quantize: QuantizeSpec | None = None
    unsharded: str = ""

    @property
    def bits(self) -> float | None:
        """Bits per weight of a quantized base's matrices, with their scales; None without quantization."""
        return None if self.quantize is None else self.quantize.stored_bits(getattr(torch, self.dtype).itemsize)

    def numerics(self, *, sharded: bool) -> Numerics:
        """The dtypes of the run.

        A sharded model is cast when it is gathered, as autocast would keep whole copies of the weights. peft makes
        adapters in float32; only a Trainer that casts all weights casts them too.

        Raises:
            PlanError: if the precision is unknown, or not for sharded models.
        """
        weights, adapter = getattr(torch, self.dtype), torch.float32
        if sharded and self.precision.startswith("16"):
            raise PlanError(f"trainer.precision {self.precision} is not for fsdp2; choose bf16-mixed or bf16-true")
        if self.precision in _TRUE:
            return Numerics(_TRUE[self.precision], _TRUE[self.precision], None, None)
        if self.precision in _MIXED:
            half = _MIXED[self.precision]
            return Numerics(weights, adapter, half if sharded else None, None if sharded else half)
        if self.precision not in _NONE:
            known = ", ".join([*_TRUE, *_MIXED, *_NONE[1:]])
            raise PlanError(f"trainer.precision {self.precision} cannot be planned; one of {known} can")
        return Numerics(weights, adapter, None, None)

    @cached_property
    def model(self) -> Any:
        """The policy on the meta device, in float32, without a scalar head."""
        model = meta_model(self.policy.config, lora=self.lora)
        if not self.needs.policy_logps:
            freeze_language_head(model)
        return model

    @cached_property
    def parameters(self) -> Parameters:
        """Counts of the policy.

        Raises:
            PlanError: if they differ from the published number.
        """
        counts = parameters_of(self.model, self.bits, 8 * getattr(torch, self.dtype).itemsize)
        published = self.policy.parameters
        if published not in (None, counts.total):
            raise PlanError(
                f"{self.policy.source}: its config has {counts.total:,} parameters, but parameters is {published:,};"
                " correct one of them"
            )
        return counts if not self.needs.scalar else _with_scalar_head(counts, text_config(self.model).hidden_size)

    @property
    def adapter_off(self) -> bool:
        """Whether the reference is the policy with its adapter off."""
        return isinstance(self.reference_model, AdapterOff)

    @property
    def has_reference(self) -> bool:
        """Whether training needs the reference."""
        return self.needs.reference and not isinstance(self.reference_model, NoReference)

    @property
    def reference_name(self) -> str:
        """The class of the reference."""
        return type(self.reference_model).__name__ if self.has_reference else "none"

    @property
    def reference_is_assumed(self) -> bool:
        """Whether the reference is of a class whose memory is unknown; a copy of the policy is assumed."""
        known = (AdapterOff, FrozenCopy, SyncedCopy, PastPolicies, OtherModel)
        return self.has_reference and not isinstance(self.reference_model, known)

    @cached_property
    def reference_counts(self) -> tuple[int, int]:
        """Weights of the reference, and those that it also keeps in float32 because it follows the policy."""
        if not self.has_reference or self.adapter_off:
            return 0, 0
        if self.other is not None:
            return sum(p.numel() for p in meta_model(self.other.config).parameters()), 0
        if isinstance(self.reference_model, SyncedCopy):  # with its adapter, if any
            return self.parameters.total + self.parameters.adapter, self.parameters.trained
        if isinstance(self.reference_model, PastPolicies):
            one = self.parameters.total + self.parameters.adapter
            return one + self.reference_model.keep * self.parameters.trained, 0
        return self.parameters.total, 0

    def reference_itemsize(self, *, sharded: bool) -> int:
        """Bytes of a weight of the reference: another model is loaded in its own dtype, a copy gets the policy's."""
        numerics = self.numerics(sharded=sharded)
        if self.other is not None and not (sharded and self.precision.startswith("bf16")):
            return int(getattr(torch, self.other_dtype).itemsize)
        return (numerics.used if sharded else numerics.weights).itemsize

    @cached_property
    def optimizers(self) -> dict[bool, OptimizerMemory]:
        """The optimizer's memory on a CPU (False) and on a GPU (True)."""
        vectors = self.parameters.trained_vectors > 0
        return {cuda: optimizer_memory(self.make_optimizer, vectors=vectors, cuda=cuda) for cuda in (False, True)}

    @cached_property
    def cost(self) -> Cost | None:
        """FLOP per token; None for a mixture of experts."""
        try:
            return cost(self.model, logps=self.needs.policy_logps)
        except TypeError:
            return None

    @cached_property
    def reference_share(self) -> float:
        """FLOP of the reference's forward pass relative to that of the policy."""
        if not self.has_reference:
            return 0.0
        if isinstance(self.reference_model, PastPolicies):
            return 1.0 + self.reference_model.keep
        if self.other is None or self.cost is None:
            return 1.0
        return cost(meta_model(self.other.config)).token / self.cost.token

    @property
    def head_rows(self) -> int:
        """Size of the vocabulary in the head."""
        return int(decoder_and_head(self.model)[1].weight.shape[0])

    def trained_dtype(self, numerics: Numerics) -> torch.dtype:
        """dtype of the trained weights and of their gradients."""
        return numerics.adapter if self.lora else numerics.weights

    def masters(self, numerics: Numerics) -> int:
        """Number of trained parameters with a float32 copy."""
        return self.parameters.trained if self.master_weights and self.trained_dtype(numerics) in HALF else 0
