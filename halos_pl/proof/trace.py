"""Records the operations of a value function on an expression graph; refuses what cannot be recorded faithfully."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halos_pl.proof import lowering
from halos_pl.proof.algebra import NoRuleError
from halos_pl.proof.program import Node, Program

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_RANDOM = ("rand", "bernoulli", "dropout", "normal", "uniform", "multinomial", "poisson", "exponential", "geometric")
# Their result depends on the shape of their operand alone.
_CREATE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty"}
_IGNORED = {"_to_copy", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "nan_to_num", "contiguous"}
_MOVES = {
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice"),
    *("select", "as_strided", "unbind", "split", "split_with_sizes", "chunk", "cat", "stack", "flip", "roll", "repeat"),
    *("movedim", "narrow", "diagonal", "unfold", "repeat_interleave", "broadcast_to", "flatten", "copy", "tile"),
}


class UntraceableError(ValueError):
    """v cannot be recorded; the message says where and why."""


def _place() -> str:
    """``file:line`` of the innermost frame outside torch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def refused(why: str) -> UntraceableError:
    """The error that names the line that is running."""
    return UntraceableError(f"cannot be traced at {_place()}: {why}")


class _Recorder(TorchDispatchMode):
    """Runs operations as usual, and keeps a graph node for each element of each tensor that depends on inputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = Program()
        self.ids: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []  # a tensor's id is only unique while it lives

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: skipping it means importing it, which takes long."""
        return False

    def track(self, tensor: Tensor, ids: Tensor) -> None:
        """Notes the nodes of a tensor's elements, an int64 tensor of its shape."""
        self.kept.append(tensor)
        self.ids[id(tensor)] = ids

    def nodes_of(self, x: Tensor) -> Tensor:
        """Nodes of the elements of a tensor; constants for one that does not depend on inputs."""
        if id(x) in self.ids:
            return self.ids[id(x)]
        values = x.detach().reshape(-1).tolist()
        if not all(abs(value) < float("inf") for value in values):
            raise refused("a constant is infinite or not a number")
        ids = [self.program.constant(int(v) if isinstance(v, bool) else v) for v in values]
        return torch.tensor(ids, dtype=torch.int64).view(x.shape)

    def _tracked(self, args: Any) -> bool:
        if isinstance(args, Tensor):
            return id(args) in self.ids
        return isinstance(args, list | tuple) and any(map(self._tracked, args))

    def _lifted(self, args: Any) -> Any:
        if isinstance(args, Tensor):
            return self.nodes_of(args)
        return type(args)(map(self._lifted, args)) if isinstance(args, list | tuple) else args

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if any(word in name for word in _RANDOM):
            raise refused(f"{name} is random")
        if not self._tracked([*args, *kwargs.values()]):
            return func(*args, **kwargs)
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item"):
            raise refused("the code depends on the value of a tensor")
        if name.endswith("_") and not name.endswith("__"):
            return self._in_place(func, name.rstrip("_"), args, kwargs)
        out = func(*args, **kwargs)
        if name not in _CREATE:
            with torch.utils._python_dispatch._disable_current_modes():
                self._record(func, name, args, kwargs, out)
        return out

    def _in_place(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        target = args[0]
        storage = target.untyped_storage().data_ptr()
        if any(other is not target and other.untyped_storage().data_ptr() == storage for other in self.kept):
            raise refused(f"{name}_ changes a tensor in place that has another view")
        with torch.utils._python_dispatch._disable_current_modes():
            before = self.nodes_of(target)
        out = func(*args, **kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            self.track(target, before)
            self._record(func, name, args, kwargs, target)
        return out

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        ids = self._lifted(list(args))
        keywords = {key: self._lifted(value) for key, value in kwargs.items()}
        if name in _IGNORED:
            result = ids[0]
            if name == "_to_copy" and not out.is_floating_point() and args[0].is_floating_point():
                lowered = lowering.truth if out.dtype == torch.bool else lowering.whole
                result = lowered(self.program, ids[0])
        elif name in _MOVES:
            result = ids[1] if name == "copy" else func(*ids, **keywords)
        else:
            try:
                result = lowering.lower(self.program, name, ids, keywords)
            except NoRuleError as error:
                raise refused(str(error)) from error
        outs, results = (out, result) if isinstance(out, list | tuple) else ([out], [result])
        for tensor, nodes in zip(outs, results, strict=False):
            self.track(tensor, nodes.expand(tensor.shape))


@contextmanager
def _own_backwards_refused() -> Iterator[None]:
    """Refuses autograd Functions other than torch's own: their backward is not that of what they compute."""
    apply = torch.autograd.Function.__dict__["apply"]

    def guarded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            raise refused(f"{cls.__name__} is an autograd Function with a backward of its own")
        return apply.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(guarded)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


@contextmanager
def _values(parameters: Mapping[str, Symbol], moved: bool) -> Iterator[dict[str, Tensor]]:
    """Puts a tensor in the place of each parameter; ``moved``: of another value, which must not change the graph."""
    placed = {}
    try:
        for name, symbol in parameters.items():
            placed[name] = symbol.place(0.25 if moved else 0.0)
        yield placed
    finally:
        for symbol in parameters.values():
            symbol.restore()


class Symbol:
    """A number of a module, or a learnable parameter, that the graph shall treat as an unknown.

    Args:
        module: its owner.
        name: its attribute.
        index: its place, if the attribute is a list of numbers.
    """

    def __init__(self, module: nn.Module, name: str, index: int | None = None) -> None:
        self.module, self.name, self.index = module, name, index
        self.before = getattr(module, name)

    @property
    def value(self) -> Any:
        """The number itself, or the learnable tensor."""
        return self.before if self.index is None else self.before[self.index]

    def place(self, shift: float) -> Tensor:
        """Replaces the number by a float64 tensor, moved by ``shift`` of itself; returns it."""
        if isinstance(self.before, nn.Parameter):
            self.saved = self.before.detach().clone()
            self.before.data.mul_(1 + shift).add_(shift / 4)
            return self.before
        tensor = torch.tensor(self.value * (1 + shift), dtype=torch.float64)
        if self.index is None:
            setattr(self.module, self.name, tensor)
        else:
            now = getattr(self.module, self.name)
            setattr(self.module, self.name, [*now[: self.index], tensor, *now[self.index + 1 :]])
        return tensor

    def restore(self) -> None:
        """Puts the number back."""
        if isinstance(self.before, nn.Parameter):
            if hasattr(self, "saved"):
                self.before.data.copy_(self.saved)
        else:
            setattr(self.module, self.name, self.before)


def _traced(
    v: Callable[[Tensor], Tensor], u: Tensor, parameters: Mapping[str, Symbol], moved: bool
) -> list[tuple[Node, ...]]:
    """The graph of each row."""
    with _values(parameters, moved) as placed, _own_backwards_refused():
        recorder = _Recorder()
        program = recorder.program
        recorder.track(u, torch.tensor([program.node("u", str(row)) for row in range(len(u))]))
        for name, tensor in placed.items():
            names = [name] if tensor.dim() == 0 else [f"{name}[{i}]" for i in range(tensor.numel())]
            ids = torch.tensor([program.node("parameter", each) for each in names])
            recorder.track(tensor, ids.view(tensor.shape))
        try:
            with recorder:
                out = v(u)
        except UntraceableError:
            raise
        except Exception as error:
            raise refused(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
        if not isinstance(out, Tensor) or out.shape != u.shape:
            raise UntraceableError("cannot be traced: v returns something else than a tensor of the shape of u")
        with torch.utils._python_dispatch._disable_current_modes():
            ids = recorder.nodes_of(out)
    try:
        return [program.of_row(int(output), row) for row, output in enumerate(ids.tolist())]
    except ValueError as error:
        raise UntraceableError(f"cannot be traced: {error}") from error


def trace(v: nn.Module, parameters: Mapping[str, Symbol]) -> tuple[Node, ...]:
    """The expression of v(u), equal for all rows.

    It is recorded several times: for other outcomes, other batch sizes and other values of the parameters, in training
    and in evaluation, with and without gradients. All recordings must agree.

    Args:
        v: a value function.
        parameters: what to treat as unknowns, by name.

    Raises:
        UntraceableError: v is random, keeps state, looks at the values of tensors, has a backward of its own, or uses
            an operation without a rule; the message names the line.
    """
    first = torch.tensor([0.37, -0.61], dtype=torch.float64)
    ways: list[tuple[str, Tensor, bool, bool, bool]] = [
        ("", first, False, True, True),
        ("for other outcomes", torch.tensor([-41.3, 5.2e3, 1e-3], dtype=torch.float64), False, True, True),
        ("without gradients", first, False, True, False),
        ("in evaluation", first, False, False, True),
    ]
    if parameters:
        ways.append(("for other parameters", first, True, True, True))
    modes = {module: module.training for module in v.modules()}
    graph: tuple[Node, ...] | None = None
    try:
        for how, u, moved, training, gradients in ways:
            v.train(training)
            with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                rows = _traced(v, u.clone().requires_grad_(gradients), parameters, moved)
            graph = rows[0] if graph is None else graph
            if any(row != graph for row in rows):
                raise UntraceableError(f"cannot be traced: v is another function {how or 'for each row'}")
    finally:
        for module, training in modes.items():
            module.training = training
    assert graph is not None
    return graph
