"""Places where the code of a value function switches branches, recorded from the operations that it executes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halos_pl.conformance.rounding import Function

_COMPARISONS = {"gt", "lt", "ge", "le", "eq", "ne"}
_BOUNDS = {"clamp", "clamp_min", "clamp_max", "hardtanh", "relu", "threshold", "leaky_relu", "elu", "celu"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution", "linear"}
_STEPS = {"sign", "sgn", "floor", "ceil", "round", "trunc"}


class Switches(TorchDispatchMode):
    """Records which branch each element takes in each operation that branches (a comparison, a clamp, abs …).

    Attributes:
        states: a float64 [count] for each such operation, in the order of the calls.
        operations: number of operations with a result in floating point.
        products: whether one of them multiplies matrices.
        seams: places in ``states`` of ``F.softplus``, which becomes linear with a jump.
        unknown_seams: whether there is one of many numbers per element. One of fewer is that of a parameter.
    """

    def __init__(self, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count
        self.states: list[Tensor] = []
        self.seams: list[int] = []
        self.unknown_seams = False
        self.operations = 0
        self.products = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: skipping it means importing it, which takes as long as a check."""
        return False

    def _columns(self, operand: Tensor) -> list[Tensor]:
        """The numbers of each element, if there are few: one, or those of a small network."""
        if operand.numel() == self.count:
            return [operand.flatten()]
        few = operand.shape[:1] == (self.count,) and operand.numel() <= 256 * self.count
        return list(operand.reshape(self.count, -1).T) if few else []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        before = args[0].clone() if name.endswith("_") and args and isinstance(args[0], Tensor) else None
        out = func(*args, **(kwargs or {}))
        name = name.rstrip("_")
        if isinstance(out, Tensor) and out.is_floating_point():
            self.operations += 1
        self.products |= name in _PRODUCTS or "attention" in name or "rnn" in name
        operand = before if before is not None else (args[0] if args else None)
        if name == "softplus" and isinstance(operand, Tensor):
            beta, threshold = (float(x) for x in (*args[1:], *(1, 20)[len(args) - 1 :]))
            columns = self._columns(operand)
            for column in columns:
                self.seams.append(len(self.states))
                self.states.append((column * beta > threshold).detach().double())
            self.unknown_seams |= not columns and operand.numel() % self.count == 0
        if isinstance(out, Tensor) and out.numel() == self.count and isinstance(operand, Tensor):
            state = None
            if name in _COMPARISONS:
                state = out
            elif name in _BOUNDS and operand.numel() == self.count:
                state = (out - operand).sign()
            elif name in ("minimum", "maximum", "fmin", "fmax") and operand.numel() == self.count:
                state = out == operand
            elif name == "abs":
                state = operand.sign()
            elif name in _STEPS:
                state = out
            if state is not None:
                self.states.append(state.detach().flatten().double())
        return out


def switches(v: Function, u: Tensor) -> Switches:
    """The recording of v(u)."""
    mode = Switches(u.numel())
    with torch.no_grad(), mode:
        v(u.clone())
    return mode


def operations(v: Function) -> int:
    """Number of float operations in one call of v; each may round once."""
    mode = Switches(-1)
    with torch.no_grad(), mode:
        v(torch.tensor([0.5, -0.5]))
    return mode.operations


def multiplies_matrices(call: Callable[[], Any]) -> bool:
    """Whether a call multiplies matrices, which autocast rounds."""
    mode = Switches(-1)
    with torch.no_grad(), mode:
        call()
    return mode.products


def breakpoints(v: Function, u: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Points on either side of each place where the code inside v switches branches.

    Args:
        v: a value function.
        u: nats, float64 [n], ascending.
        rows: number of outcomes in a call of v.

    Returns:
        nats, float64 [m]: for each place the two sides, found by bisection; and those of them, float64 [2, k], where
        ``F.softplus`` becomes linear.
    """
    # For each place: the number of the operation that switches, its place in u, and its state before and after.
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    mode = switches(v, u[: rows + 1])
    for start in range(0, len(u) - 1, rows):
        piece = u[start : start + rows + 1]  # with one point of the next piece, so that no place is missed
        for number, state in enumerate((switches(v, piece) if start else mode).states):
            change = (state[1:] != state[:-1]).nonzero().squeeze(1)
            change = change[:: max(1, len(change) // 200)]
            found.append((torch.full_like(change, number), start + change, state[change], state[change + 1]))
    everywhere = u.new_tensor([[-torch.inf], [torch.inf]])
    event, place, before, after = (torch.cat(parts) for parts in zip(*found, strict=True)) if found else (u[:0],) * 4
    if not len(event):
        return u.new_empty(0), everywhere if mode.unknown_seams else everywhere[:, :0]
    # Twice: for the end of the left branch and for the start of the right one; a third may lie between them.
    event, place, start_state, end_state = (part.repeat(2) for part in (event, place, before, after))
    leaving = torch.arange(len(event)) < len(event) // 2
    low, high = u[place], u[place + 1]
    for _ in range(60):
        middle = (low + high) / 2
        way = _states_of(v, middle, event, rows)
        if way is None:
            break
        left = torch.where(leaving, way == start_state, way != end_state)
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    seam = torch.isin(event, torch.tensor(mode.seams))
    seams = everywhere if mode.unknown_seams else torch.stack([low[seam], high[seam]])
    return torch.cat([low, high]), seams


def _states_of(v: Function, u: Tensor, event: Tensor, rows: int) -> Tensor | None:
    """The state at each point of the operation of that number; None if v runs other operations than before."""
    states = []
    for piece, numbers in zip(u.split(rows), event.split(rows), strict=True):
        of_piece = switches(v, piece).states
        if len(of_piece) <= int(numbers.max()):
            return None
        states.append(torch.stack(of_piece)[numbers, torch.arange(len(numbers))])
    return torch.cat(states)
