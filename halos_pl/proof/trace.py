"""The expression of a value function: recorded in several ways, which must agree."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from halos_pl.common.messages import raised
from halos_pl.proof.program import Node
from halos_pl.proof.recorder import Recorded, Recorder, UntraceableError, refusals, refused
from value_functions.by_slope import Integral

# Constants of float32 and float64 may differ by this share, those of a table by this share of the largest.
_ROUNDED = Fraction(1, 2**16)


@contextmanager
def _own_backwards_refused() -> Iterator[None]:
    """Refuses autograd Functions other than torch's own: their backward is not that of what they compute."""
    apply = torch.autograd.Function.__dict__["apply"]

    def guarded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is Integral:
            raise refused("it contains a value function that is given by its slope, which is proved only by itself")
        if not cls.__module__.startswith("torch."):
            raise refused(f"{cls.__name__} is an autograd Function with a backward of its own")
        return apply.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(guarded)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


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

    def place(self, tensor: Recorded) -> None:
        """Puts a tensor without numbers in the place of the number."""
        if isinstance(self.before, nn.Parameter):
            tensor._is_param = True
            self.module._parameters[self.name] = tensor  # type: ignore[assignment]
        elif self.index is None:
            setattr(self.module, self.name, tensor)
        else:
            now = getattr(self.module, self.name)
            setattr(self.module, self.name, [*now[: self.index], tensor, *now[self.index + 1 :]])

    def restore(self) -> None:
        """Puts the number back."""
        if isinstance(self.before, nn.Parameter):
            self.module._parameters[self.name] = self.before
        else:
            setattr(self.module, self.name, self.before)


@contextmanager
def _placed(parameters: Mapping[str, Symbol], recorder: Recorder) -> Iterator[None]:
    """Puts unknowns in the place of parameters; one that has several names is one unknown."""
    shared: dict[int, Recorded] = {}
    try:
        for name, symbol in parameters.items():
            learnable = isinstance(symbol.before, nn.Parameter)
            if not (learnable and id(symbol.before) in shared):
                shape = symbol.before.shape if learnable else torch.Size([])
                names = [name] if not shape else [f"{name}[{i}]" for i in range(shape.numel())]
                ids = torch.tensor([recorder.program.node("parameter", each) for each in names]).view(shape)
                dtype = symbol.before.dtype if learnable else torch.float64
                tensor = Recorded(ids, dtype, requires_grad=learnable)
                if learnable:
                    shared[id(symbol.before)] = tensor
            symbol.place(shared[id(symbol.before)] if learnable else tensor)
        yield
    finally:
        for symbol in parameters.values():
            symbol.restore()


def _state(v: nn.Module) -> dict[tuple[int, str], list[Any]]:
    """What the modules and classes of v keep between calls, by owner and name; other objects after a change of it."""
    kept: dict[tuple[int, str], list[Any]] = {}
    modules = list(v.modules())
    classes = {c for m in modules for c in type(m).__mro__ if not c.__module__.startswith(("torch", "builtins", "abc"))}
    for owner in (*modules, *classes):
        for name, value in list(vars(owner).items()):
            if name not in ("training", "_abc_impl") and not name.startswith("__"):
                items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
                kept[id(owner), name] = [value, *items, *(x._version for x in items if isinstance(x, Tensor))]
    return kept


@contextmanager
def _stateless(v: nn.Module) -> Iterator[None]:
    """Refuses code that changes the module or draws a random number; its attributes are put back."""
    before, attributes, dice = _state(v), [(m, dict(vars(m))) for m in v.modules()], random.getstate()
    try:
        yield
    finally:
        after = _state(v)
        changed = {key for key in before.keys() | after.keys() if not _same(before.get(key, []), after.get(key, []))}
        for module, values in attributes:
            if any(owner == id(module) for owner, _ in changed):
                vars(module).clear()
                vars(module).update(values)
    if changed:
        raise UntraceableError(f"cannot be traced: v keeps state in {', '.join(sorted(name for _, name in changed))}")
    if random.getstate() != dice:
        raise UntraceableError("cannot be traced: v is random")


def _same(before: list[Any], after: list[Any]) -> bool:
    """Whether the objects are the same; versions of tensors are compared by value."""
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(a is b or (type(a) is type(b) is int and a == b) for a, b in pairs)


@dataclass(frozen=True)
class _Way:
    """How v is called when it is recorded."""

    text: str
    shape: tuple[int, ...] = (2,)
    dtype: torch.dtype = torch.float64
    training: bool = True
    gradients: bool = True
    inference: bool = False


_WAYS = (
    _Way(""),
    _Way("for a single outcome", (1,)),
    _Way("for a batch of 5", (5,)),
    _Way("for a table of outcomes", (2, 2)),
    _Way("in float32", dtype=torch.float32),
    _Way("without gradients", gradients=False),
    _Way("in inference mode", gradients=False, inference=True),
    _Way("in evaluation", training=False),
)


def _traced(v: Callable[[Tensor], Tensor], way: _Way, parameters: Mapping[str, Symbol]) -> list[tuple[Node, ...]]:
    """The graph of each outcome."""
    originals = [symbol.before for symbol in parameters.values() if isinstance(symbol.before, nn.Parameter)]
    recorder = Recorder(originals)
    refusals.clear()
    count = torch.Size(way.shape).numel()
    rows = torch.tensor([recorder.program.node("u", str(row)) for row in range(count)]).view(way.shape)
    with _own_backwards_refused():
        try:
            with (
                torch.inference_mode(way.inference),
                torch.set_grad_enabled(way.gradients),
                _placed(parameters, recorder),
            ):
                u = Recorded(rows, way.dtype, requires_grad=way.gradients)
                with recorder:
                    out = v(u)
        except UntraceableError:
            raise refusals[0] from None
        except Exception as error:
            raise (refusals[0] if refusals else refused(raised(error, 120), error.__traceback__)) from error
    if refusals:  # and the code went on
        raise refusals[0]
    if not isinstance(out, Tensor) or out.shape != way.shape:
        raise UntraceableError("cannot be traced: v returns something else than a tensor of the shape of u")
    if out.dtype not in (torch.float32, torch.float64):
        raise UntraceableError(f"cannot be traced: v returns {str(out.dtype).removeprefix('torch.')}")
    ids = recorder.nodes_of(out)
    try:
        return [recorder.program.of_row(output, row) for row, output in enumerate(ids.reshape(-1).tolist())]
    except ValueError as error:
        raise UntraceableError(f"cannot be traced: {error}") from error


def _alike(one: tuple[Node, ...], other: tuple[Node, ...]) -> bool:
    """Whether two expressions are the same but for the rounding of constants in float32."""
    seen: set[tuple[int, int]] = set()
    todo = [] if one == other else [(len(one) - 1, len(other) - 1)]
    while todo:
        pair = todo.pop()
        if pair in seen:
            continue
        seen.add(pair)
        (name, *xs), (other_name, *ys) = one[pair[0]], other[pair[1]]
        if name != other_name or len(xs) != len(ys):
            return False
        largest = Fraction(0)  # of the constants of a table
        constants: list[tuple[Fraction, Fraction]] = []
        for x, y in zip(xs, ys, strict=True):
            if not (isinstance(x, int) and isinstance(y, int)):
                if x != y:
                    return False
            elif one[x][0] == other[y][0] == "constant":
                constants.append((Fraction(str(one[x][-1])), Fraction(str(other[y][-1]))))
                largest = max(largest, abs(constants[-1][0]))
            else:
                todo.append((x, y))
        if any(abs(a - b) > _ROUNDED * largest for a, b in constants):
            return False
    return True


def trace(v: nn.Module, parameters: Mapping[str, Symbol], once: bool = False) -> tuple[Node, ...]:
    """The expression of v(u), equal for all outcomes.

    It is recorded several times: for other batch sizes and shapes, in float32, in training and in evaluation, with and
    without gradients. All recordings must agree. No numbers are there that the code could look at.

    Args:
        v: a value function.
        parameters: what to treat as unknowns, by name.
        once: record it in one way only.

    Raises:
        UntraceableError: v is random, keeps state, looks at the values of tensors, has a backward of its own, or uses
            an operation without a rule; the message names the line.
    """
    modes = {module: module.training for module in v.modules()}
    graph: tuple[Node, ...] | None = None
    try:
        for way in _WAYS[:1] if once else _WAYS:
            v.train(way.training)
            with _stateless(v):
                rows = _traced(v, way, parameters)
            graph = rows[0] if graph is None else graph
            same = _alike if way.dtype == torch.float32 else tuple.__eq__
            if not all(same(graph, row) for row in rows):
                raise UntraceableError(f"cannot be traced: v is another function {way.text or 'for each row'}")
    finally:
        for module, training in modes.items():
            module.training = training
    assert graph is not None
    return graph
