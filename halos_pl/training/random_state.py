"""Saves and restores the random states of a run's processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states

from halos_pl.distributed import world_size


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The random states of all ranks, in types that ``torch.load(weights_only=True)`` accepts.

    Each has the state of its own GPU only, as the run may resume on a machine with other GPUs.
    """
    state = _collect_rng_states(include_cuda=False)
    name, keys, *rest = state["numpy"]
    cuda = {"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    of_rank = {**state, **cuda, "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest)}
    states: list[Any] = [of_rank] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(states, of_rank)
    return states


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores a process's random state."""
    name, keys, *rest = state["numpy"]
    kept = {k: v for k, v in state.items() if k not in ("cuda", "device")}
    _set_rng_states({**kept, "numpy": (name, keys.numpy().astype("uint32"), *rest)})
    if "device" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"].cpu(), device)
