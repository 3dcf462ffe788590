"""The parts of a training step by time, for ``gpu.py``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Words in the names of an operation, or of one that calls it; the first match counts.
PLACES = {
    "optimizer": ("Optimizer.step",),
    "head": ("halos::head", "_LogProbs"),
    "attention": ("scaled_dot_product", "ScaledDotProduct", "flash", "varlen", "flex_attention", "efficient_attention"),
    "copies": ("Memcpy", "aten::copy_", "aten::_to_copy", "ToCopyBackward"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
}


@contextmanager
def head_marked() -> Iterator[None]:
    """Gives the passes of the head a name in the profile."""
    from halos_pl.policy import prefix_sharing

    patched: Any = prefix_sharing
    plain = patched.token_logps

    def marked(*args: Any) -> Any:
        with torch.profiler.record_function("halos::head"):
            return plain(*args)

    patched.token_logps = marked
    try:
        yield
    finally:
        patched.token_logps = plain


def place_of(event: Any) -> str:
    """The part of a step that an operation belongs to, by its name and those of its callers."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    matches = (place for place, words in PLACES.items() for word in words if any(word in name for name in names))
    return next(matches, "other")


def where(step: Callable[[], float], device: str) -> dict[str, float]:
    """Shares of a step's time by part; ``idle`` is time in which the device computed nothing."""
    cuda = device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with head_marked(), torch.profiler.profile(activities=kinds) as profile:
        wall = step()
    spent: dict[str, float] = defaultdict(float)
    total = 0.0
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            on_device = sum(kernel.duration for kernel in event.kernels)
            spent[place_of(event)] += (on_device if cuda else event.self_cpu_time_total) / 1e6
        elif cuda:
            total += event.device_time_total / 1e6
    busy = sum(spent.values())
    if cuda and total > busy:  # kernels that the profiler ties to no operation
        spent["other"] += total - busy
    wall = max(wall, sum(spent.values()))
    shares = {name: spent[name] / wall for name in (*PLACES, "other")}
    return shares | {"idle": 1 - sum(shares.values())}
