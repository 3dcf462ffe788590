"""The parameters of a value function, and value functions that are built anew with other values of them."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from halos_pl.proof.verify import RefusedError
from value_functions.ranges import ANY, Range

# By id of the module and attribute: the other value, or those of some entries if the attribute is a list.
Changes = Mapping[tuple[int, str], Mapping[int | None, float]]


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


def unknowns(v: nn.Module) -> dict[str, Unknown]:
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


def built(module: nn.Module, changes: Changes) -> nn.Module:
    """The module, built by its constructor from its attributes, some of them changed.

    Raises:
        TypeError, AttributeError: the attributes do not have the names of the constructor's arguments.
        ValueError: the constructor does not accept the values.
    """
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD and parameter.kind is not parameter.KEYWORD_ONLY:
            raise TypeError(f"{type(module).__name__} accepts any arguments")
        value = getattr(module, name)
        for index, other in changes.get((id(module), name), {}).items():
            value = other if index is None else [*value[:index], other, *value[index + 1 :]]
        arguments[name] = _with_modules(value, changes)
    return type(module)(**arguments).train(module.training)


def _with_modules(value: Any, changes: Changes) -> Any:
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_with_modules(each, changes) for each in value]
    owners = {owner for owner, _ in changes}
    if isinstance(value, nn.Module) and any(id(module) in owners for module in value.modules()):
        return built(value, changes)
    return value


def rebuilt(v: nn.Module, claimed: Mapping[str, Unknown], values: Mapping[str, Fraction]) -> nn.Module | None:
    """A copy of v with other values of parameters; None if its class does not accept them together.

    Raises:
        RefusedError: its constructor does not take these parameters, or does something else with them.
    """
    v = copy.deepcopy(v)
    modules, changes = [*v.modules()], dict[tuple[int, str], dict[int | None, float]]()
    for name, value in values.items():
        each = claimed[name]
        if not each.parameter:
            changes.setdefault((id(modules[each.module]), each.name), {})[each.index] = float(value)
    try:
        other = built(v, changes).to(torch.float64) if changes else v
    except ValueError:
        return None
    except (TypeError, AttributeError) as error:
        raise RefusedError(f"it is for ranges, but v cannot be built with other hyper-parameters: {error}") from error
    modules = [*other.modules()]
    with torch.no_grad():
        for name, value in values.items():
            if (each := claimed[name]).parameter:
                getattr(modules[each.module], each.name).data.reshape(-1)[each.index] = float(value)
    now = unknowns(other)
    for name, value in values.items():
        if name not in now or (not claimed[name].parameter and now[name].value != value):
            raise RefusedError(f"it is for a range of {name}, but v built with {float(value):g} has another {name}")
    return other
