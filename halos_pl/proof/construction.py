"""The parameters of a value function, and value functions that are constructed anew with other values of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from typing import Any

import torch

from halos_pl.common.subclasses import every_subclass
from halos_pl.proof.verify import RefusedError
from value_functions import ValueFunction
from value_functions.ranges import ANY, Range

Build = Callable[[], ValueFunction]
Changes = dict[tuple[str, int | None], float]  # by argument, and by index if that is a list


@dataclass(frozen=True)
class Unknown:
    """A hyper-parameter with a range, or an entry of a learnable parameter.

    Attributes:
        module: number of its owner among the modules of v.
        name: its attribute.
        index: its place, if the attribute is a list or tensor.
        range: what it may be.
        number: its value.
        learnable: whether training changes it.
        parameter: whether it is a tensor.
    """

    module: int
    name: str
    index: int | None
    range: Range
    number: float
    learnable: bool = False
    parameter: bool = False

    @property
    def value(self) -> Fraction:
        """The shortest decimal that rounds to its value, as a proof takes it."""
        return Fraction(repr(self.number))

    @property
    def inside(self) -> bool:
        """Whether its value is in its range."""
        return self.number in self.range

    @property
    def limits(self) -> tuple[str | None, str | None, bool, bool]:
        """Its range as a certificate states it: ends, and whether each is excluded."""
        low, high = (
            None if math.isinf(end) else str(Fraction(repr(float(end)))) for end in (self.range.low, self.range.high)
        )
        return low, high, low is None or not self.range.with_low, high is None or not self.range.with_high

    def others(self) -> list[Fraction]:
        """Five values within its range, and the ends that belong to it."""
        low, high = self.range.low, self.range.high
        if math.isinf(low) and math.isinf(high):
            found = [1.3, -2.1, 0.2, -0.4, 4.0]
        elif math.isinf(high):
            found = [low + x for x in (2.7, 0.06, 0.4, 1.0, 20.0)]
        elif math.isinf(low):
            found = [high - x for x in (2.7, 0.06, 0.4, 1.0, 20.0)]
        else:
            found = [low + (high - low) * x for x in (0.31, 0.83, 0.04, 0.5, 0.97)]
        found += [low] * self.range.with_low + [high] * self.range.with_high
        return [Fraction(repr(x)) for x in found if x in self.range and not math.isinf(x)]


def unknowns(v: ValueFunction) -> dict[str, Unknown]:
    """The learnable parameters of v and the hyper-parameters with a range, by name."""
    found = {}
    for number, (path, module) in enumerate(v.named_modules()):
        prefix = f"{path}." if path else ""
        for name, tensor in module.named_parameters(recurse=False):
            for i, value in enumerate(tensor.detach().double().reshape(-1).tolist()):
                label = f"{prefix}{name}" + ("" if tensor.dim() == 0 else f"[{i}]")
                found[label] = Unknown(number, name, i, ANY, value, tensor.requires_grad, True)
        for name, limits in getattr(module, "ranges", {}).items():
            value = vars(module).get(name)
            for i, each in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(each, float) and not math.isinf(each):
                    index, text = (i, f"[{i}]") if isinstance(value, list) else (None, "")
                    found[f"{prefix}{name}{text}"] = Unknown(number, name, index, limits, each)
    return found


def constructed(build: Build) -> tuple[ValueFunction, dict[int, int]]:
    """v in float64, and for the number of each of its modules when that was constructed: first, second, ..."""
    with _constructing({}) as made:
        v = build().double()
    order = {id(each): i for i, each in enumerate(made)}
    return v, {i: order[id(module)] for i, module in enumerate(v.modules()) if id(module) in order}


def rebuilt(
    build: Build, made: Mapping[int, int], claimed: Mapping[str, Unknown], values: Mapping[str, Fraction]
) -> ValueFunction | None:
    """v in float64 with other values of parameters; None if its class does not accept them together.

    Raises:
        RefusedError: its constructor does not take these parameters, or does something else with them.
    """
    wanted: dict[int, Changes] = {}
    for name, value in values.items():
        each = claimed[name]
        if not each.parameter:
            if each.module not in made:
                raise RefusedError(f"it is for a range of {name}, which no constructor sets")
            wanted.setdefault(made[each.module], {})[each.name, each.index] = float(value)
    with _constructing(wanted):
        try:
            v = build().double()
        except RefusedError:
            raise
        except Exception:
            return None
    if left := [name for changes in wanted.values() for name, _ in changes]:
        raise RefusedError(f"it is for a range of {left[0]}, which is no argument of its class")
    modules = [*v.modules()]
    with torch.no_grad():
        for name, value in values.items():
            if (each := claimed[name]).parameter:
                getattr(modules[each.module], each.name).data.reshape(-1)[each.index] = float(value)
    now = unknowns(v)
    for name, value in values.items():
        if name not in now or (not claimed[name].parameter and now[name].value != value):
            raise RefusedError(f"it is for a range of {name}, but v made with {float(value):g} has another {name}")
    return v


@contextmanager
def _constructing(wanted: dict[int, Changes]) -> Iterator[list[ValueFunction]]:
    """Collects value functions in the order in which they are constructed, with changes to their arguments.

    A change is removed from ``wanted`` once it has been made: in the constructor of the class itself if that has the
    argument, else in the one that it calls.
    """
    made: list[ValueFunction] = []
    originals: list[tuple[Any, Any]] = []

    def watch(cls: Any) -> None:
        if "__init__" not in vars(cls):
            return
        init = cls.__init__

        @wraps(init)
        def constructor(self: ValueFunction, *args: Any, **kwargs: Any) -> None:
            number = next((i for i, other in enumerate(made) if other is self), len(made))
            if number == len(made):
                made.append(self)
            if changes := wanted.get(number):
                bound = inspect.signature(init).bind(self, *args, **kwargs)
                bound.apply_defaults()
                for name, index in [key for key in changes if key[0] in bound.arguments]:
                    value = changes.pop((name, index))
                    if index is not None:
                        entries = list(bound.arguments[name])
                        entries[index] = value
                    bound.arguments[name] = value if index is None else entries
                args, kwargs = bound.args[1:], bound.kwargs
            init(self, *args, **kwargs)

        originals.append((cls, init))
        cls.__init__ = constructor

    def watch_new(cls: Any, **kwargs: Any) -> None:
        super(ValueFunction, cls).__init_subclass__(**kwargs)
        watch(cls)

    for cls in [*every_subclass(ValueFunction)]:
        watch(cls)
    ValueFunction.__init_subclass__ = classmethod(watch_new)  # type: ignore[assignment, arg-type]
    try:
        yield made
    finally:
        del ValueFunction.__init_subclass__
        for cls, init in originals:
            cls.__init__ = init
