"""The memory of an optimizer, measured: it takes steps on small tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from halos_pl.training.optim import make_optimizer

#: Side of the matrices. bitsandbytes quantises states from 4,096 elements on; the sums that factored optimizers keep
#: per row and column hardly count at this size.
_SIDE = 256


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes per element of float32 parameters.

    Attributes:
        name: name of the class.
        matrix: state per element of a matrix.
        vector: state per element of a vector.
        step: temporary memory of a step, per element of all parameters.
        largest: temporary memory of a step, per element of the largest parameter.
    """

    name: str
    matrix: float
    vector: float
    step: float
    largest: float


class _Temporary(TorchDispatchMode):
    """Sums up the sizes of storages that appear and do not exist afterwards."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = {t.untyped_storage().data_ptr(): 0 for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is None or storage.data_ptr() in self._live:
                continue
            self._live[storage.data_ptr()] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, storage.data_ptr())
        return out

    def _end(self, place: int) -> None:
        self.now -= self._live.pop(place)


def optimizer_memory(make: Callable[[list[nn.Parameter]], Optimizer], *, vectors: bool, cuda: bool) -> OptimizerMemory:
    """Measures the state of an optimizer and the temporary memory of its step.

    Args:
        make: makes the optimizer from the trained parameters.
        vectors: whether vectors are trained too.
        cuda: whether to measure the implementation that torch chooses on a GPU, which updates all parameters together.

    Raises:
        ValueError: if the optimizer refuses its settings.
    """
    matrix, vector = (_SIDE, _SIDE), (_SIDE * _SIDE,)
    of_matrix, *_ = _state(make, [matrix], cuda)
    name = type(make_optimizer(make, _parameters([matrix]))).__name__
    of_vector = _state(make, [vector], cuda)[0] if vectors else 0
    two, four = (_state(make, [matrix] * number, cuda)[1] for number in (2, 4))
    size = _SIDE * _SIDE
    each = (four - two) / 2
    return OptimizerMemory(
        name=name,
        matrix=of_matrix / size,
        vector=of_vector / size,
        step=each / size,
        largest=(two - 2 * each) / size,
    )


def _parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def _state(
    make: Callable[[list[nn.Parameter]], Optimizer], shapes: list[tuple[int, ...]], cuda: bool
) -> tuple[int, int]:
    """Bytes of the state after two steps, and of the temporary memory of the second."""
    parameters = _parameters(shapes)
    optimizer = make_optimizer(make, parameters)
    for group in optimizer.param_groups:
        if cuda and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(lambda: torch.zeros(()))
    tensors = [t for state in optimizer.state.values() for t in tree_iter(state) if isinstance(t, Tensor)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    with _Temporary([*tensors, *parameters, *gradients]) as temporary:
        optimizer.step(lambda: torch.zeros(()))
    size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim()}.values())
    return size, temporary.peak
