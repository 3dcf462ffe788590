"""Less memory, and less time spent on memory, for the same numbers bit by bit."""

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


# How the result of an operation is made again from what its own backward keeps anyway.
_AGAIN = {
    "MulBackward0": _product,
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}


@dataclass(frozen=True)
class _Recipe:
    """Stands for a tensor that is not kept: what made it, and the shape that it is wanted in."""

    node: Any
    shape: torch.Size


def _maker(tensor: Tensor) -> Any:
    """The operation that ``tensor`` can be made again by, None where there is none."""
    node = tensor.grad_fn if tensor.is_contiguous() else None
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is None or node.name() not in _AGAIN:
        return None
    # A product keeps a factor only where the other one has a gradient.
    return node if all(function is not None for function, _ in node.next_functions) else None


class recomputed(saved_tensors_hooks):
    """While entered, results of cheap operations are not kept for the backward pass, but made again there.

    Those are products of two activations and activation functions: of a Llama layer the normalised and the gated
    hidden states, two fifths of all that is kept. As checkpointing without its second forward pass: no matrix product
    is computed again, and what is, is computed from the same numbers by the same operation.
    """

    def __init__(self) -> None:
        last: list[Any] = [None, None]  # several matrix products in a row ask for the same tensor

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
    """Makes the C library keep freed memory instead of handing it back to the kernel, where that is glibc's and the
    model is on the CPU.

    A step frees gigabytes and asks for them again in the next one, and for each page the kernel has to fill in zeros:
    5 to 10 % of a CPU step's time.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
