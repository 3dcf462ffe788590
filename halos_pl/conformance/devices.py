"""Whether a part would work on another device, without one.

The part runs on the CPU, but its inputs, parameters and buffers report the device ``meta``, which stands in for any
other. Unlike torch's own meta tensors they have data, so that code may read numbers; and torch need not load its
compiler, which takes longer than all clauses of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")


class _Elsewhere(Tensor):
    """A tensor that reports another device than the CPU; ``data_here`` is its data, on the CPU."""

    data_here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> _Elsewhere:
        made: _Elsewhere = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        made.data_here = here
        return made

    def tolist(self) -> Any:
        """The numbers, which code may read on any device; torch refuses it to subclasses."""
        return self.data_here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} outside of the mode that runs it")


def _tensors(args: Any) -> list[Tensor]:
    flat = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
    return [x for x in flat if isinstance(x, Tensor)]


def _is_elsewhere(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta


def _here(x: Any) -> Any:
    if isinstance(x, _Elsewhere):
        return x.data_here
    # ``torch.tensor(..., device=DEVICE)`` and ``new_tensor`` have lost the data.
    return torch.ones(x.shape, dtype=x.dtype) if _is_elsewhere(x) else x


def _there(x: Any) -> Any:
    return _Elsewhere(x) if isinstance(x, Tensor) and not _is_elsewhere(x) else x


class _Devices(TorchDispatchMode):
    """Runs operations on the other device, and notes the first that mixes its tensors with some on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mixed: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: skipping it means importing it, which takes as long as a check."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        everything = _tensors((*args, *kwargs.values()))
        elsewhere = [x for x in everything if _is_elsewhere(x)]
        stay = [x for x in everything if x.dim() and not _is_elsewhere(x)]  # numbers go to any device
        indexes_by_host = name.startswith("index") and _is_elsewhere(args[0])
        if elsewhere and stay and name.rstrip("_") != "copy" and not indexes_by_host:
            self.mixed = self.mixed or f"{name} mixes it with a tensor of shape {tuple(stay[0].shape)} on the CPU"
        to = kwargs.get("device")
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        if func is torch.ops.aten.empty.memory_format:  # of whose contents torch makes no use on meta
            func = torch.ops.aten.zeros.default
            kwargs.pop("memory_format", None)
        out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if name.endswith("_") or "out" in kwargs:
            return kwargs.get("out", args[0])
        goes = bool(elsewhere) if to is None else torch.device(to).type == DEVICE.type
        return tree_map(_there, out) if goes else out


def on_another_device(part: nn.Module, call: Callable[[nn.Module], Any]) -> str | None:
    """Calls a part as if it were on another device.

    Args:
        part: a copy; its parameters and buffers are moved.
        call: moves the inputs to :data:`DEVICE`, calls the part and returns a tensor.

    Returns:
        What would fail or stay behind on another device; None if nothing does, or if the part cannot run there.
    """
    devices = _Devices()
    try:
        with devices:
            result = call(part.to(DEVICE))
    except (Exception, SystemExit) as error:  # also whatever hands its data to other libraries
        numpy = "numpy()" in str(error)
        return "it is handed to NumPy, which takes tensors on the CPU" if numpy else devices.mixed
    if devices.mixed is None and isinstance(result, Tensor) and not _is_elsewhere(result):
        return "the result is on the CPU"
    return devices.mixed
