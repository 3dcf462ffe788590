"""Saves memory, and time spent on memory, without changing a bit of the result."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


def _product(node: Any) -> Tensor:
    return node._saved_self * node._saved_other  # type: ignore[no-any-return]


# Recomputes the result of an operation from the tensors that its own backward pass keeps anyway.
_AGAIN = {
    "MulBackward0": _product,
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}


@dataclass(frozen=True)
class _Recipe:
    """Stands for a tensor that is not kept: the operation that computed it, and the tensor's shape."""

    node: Any
    shape: torch.Size


def _maker(tensor: Tensor) -> Any:
    """The operation that can recompute ``tensor``; None if there is none."""
    node = tensor.grad_fn if tensor.is_contiguous() else None
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None or node.name() not in _AGAIN:
        return None
    # A product keeps a factor only if the other one has a gradient.
    return node if all(function is not None for function, _ in node.next_functions) else None


class recomputed(saved_tensors_hooks):
    """A context in which the results of cheap operations are recomputed in the backward pass instead of kept.

    These are products of two activations, and activation functions: in a Llama layer the normalised and the gated
    hidden states, two fifths of everything kept. It is checkpointing without the second forward pass: no matrix product
    is recomputed, and each result comes from the same operation on the same numbers.
    """

    def __init__(self) -> None:
        last: list[Any] = [None, None]  # consecutive matrix products often use the same tensor

        def pack(tensor: Tensor) -> Tensor | _Recipe:
            node = _maker(tensor)
            return tensor if node is None else _Recipe(node, tensor.shape)

        @torch.no_grad()
        def unpack(kept: Tensor | _Recipe) -> Tensor:
            if not isinstance(kept, _Recipe):
                return kept
            if last[0] is not kept.node:
                last[:] = kept.node, _AGAIN[kept.node.name()](kept.node)  # type: ignore[no-untyped-call]
            return last[1].view(kept.shape)  # type: ignore[no-any-return]

        super().__init__(pack, unpack)


def keep_freed_memory(device: torch.device) -> None:
    """Makes glibc keep freed memory instead of returning it to the kernel, if the model is on the CPU.

    Each step frees gigabytes that the next one allocates again, and the kernel has to zero every page: 5 to 10% of the
    time of a step on the CPU.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
