"""Counts the memory of a computation on fake tensors, which have shapes but no data."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

DEQUANTIZED = "dequantized weights"
#: Parts of the memory that a step takes beside weights and gradients.
PARTS = ("activations", "autocast copies", DEQUANTIZED, "logits", "working memory")


@dataclass
class Moment:
    """The moment of the most memory in a phase while some parameters have a gradient and the others do not.

    Attributes:
        micro_batch: number of the micro-batch, from 0.
        lowest: lowest decoder layer with a gradient from this micro-batch; the number of layers if none has one.
        phase: whether this is in the backward pass, and whether autograd records: it does in a forward pass with
            gradient, and where the backward pass recomputes a layer.
        gradients: bytes of gradients.
        parts: bytes of everything else that the step has allocated, by ``PARTS``.
    """

    micro_batch: int
    lowest: int
    phase: tuple[bool, bool]
    gradients: int
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes without gradients."""
        return sum(self.parts.values())


class LiveMemory(TorchDispatchMode):
    """Follows each storage from its creation to its end.

    Args:
        model: model that is trained, with fake weights.
        vocabulary: size of the vocabulary; tensors with such a dimension count as logits.
        layers: number of decoder layers.
    """

    def __init__(self, model: nn.Module, vocabulary: int, layers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self._layers = vocabulary, layers
        self._part_of: dict[int, tuple[str, int]] = {}
        self._now: Counter[str] = Counter()
        self._moments: dict[tuple[object, ...], Moment] = {}
        self._micro_batch, self._lowest, self.backward = 0, layers, False
        for parameter in model.parameters():
            self.ignore(parameter)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def ignore(self, tensor: Tensor) -> None:
        """Leaves a tensor out, such as a weight."""
        storage = tensor.untyped_storage()
        self._part_of[id(storage)] = ("weights", 0)
        weakref.finalize(storage, self._part_of.pop, id(storage), None)

    @property
    def moments(self) -> list[Moment]:
        """The largest moment of each phase and set of gradients."""
        return list(self._moments.values())

    def next_micro_batch(self) -> None:
        """Must be called after the backward pass of each micro-batch."""
        self._micro_batch, self._lowest, self.backward = self._micro_batch + 1, self._layers, False

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        layer = numbers[0] if numbers else self._layers

        def accumulated(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._lowest = min(self._lowest, layer)
            storage = parameter.grad.untyped_storage()
            part, size = self._part_of.get(id(storage), ("gradients", 0))
            if part != "gradients":
                self._part_of[id(storage)] = ("gradients", size)
                self._now[part] -= size
                self._now["gradients"] += size

        return accumulated

    def _end(self, key: int) -> None:
        part, size = self._part_of.pop(key)
        self._now[part] -= size

    def _kind(self, function: Any, args: Any, tensor: Tensor) -> str:
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            source, _ = self._part_of.get(id(args[0].untyped_storage()), ("", 0))
            if source == DEQUANTIZED or (source == "weights" and function is torch.ops.aten.clone.default):
                return DEQUANTIZED
            if source == "weights" and tensor.dtype != torch.float32:
                return "autocast copies"
        if self.vocabulary in tensor.shape:
            return "logits"
        return "activations" if torch.is_grad_enabled() and not self.backward else "working memory"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._part_of:
                continue
            part, size = self._kind(func, args, tensor), storage.nbytes()
            self._part_of[id(storage)] = (part, size)
            weakref.finalize(storage, self._end, id(storage))
            self._now[part] += size
            self._measure()
        return out

    def _measure(self) -> None:
        gradients = self._now["gradients"]
        when = self._micro_batch, self._lowest, (self.backward, torch.is_grad_enabled()), gradients
        moment = self._moments.setdefault(when, Moment(*when))
        if sum(self._now.values()) - gradients > moment.size:
            moment.parts = {part: self._now[part] for part in PARTS}
