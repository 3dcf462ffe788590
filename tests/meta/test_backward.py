"""Which value functions are held to a backward pass on each of 5,000 calls, and what is found with fewer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutant import Value
from torch import Tensor

from halos_pl.conformance import value_function
from halos_pl.conformance.backward import alike_graphs, runs_code_backwards
from halos_pl.conformance.value_case import ValueFunctionCase
from halos_pl.conformance.value_states import deterministic
from value_functions import CARA, Identity, KahnemanTversky, RatioClip, ValueFunction

U = torch.tensor([0.5, -0.25, 3.0])


class _Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:  # type: ignore[override]
        return u.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def _counting(u: Tensor) -> Tensor:
    counted: Tensor = _Counting.apply(u)
    return torch.sigmoid(counted)


def _hook_in_python(u: Tensor) -> Tensor:
    value = torch.sigmoid(u)
    value.register_hook(lambda gradient: None)
    return value


def _hook_in_c(u: Tensor) -> Tensor:
    """... on a tensor that is not returned."""
    value = torch.sigmoid(u)
    value.register_hook([].append)
    return value * 2


def _hook_of_a_node(u: Tensor) -> Tensor:
    value = torch.sigmoid(u)
    assert value.grad_fn is not None
    value.grad_fn.register_hook(lambda inward, outward: None)
    return value


def _unpacked(u: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        return torch.sigmoid(u)


def _module_hook() -> ValueFunction:
    v = CARA()
    v.register_full_backward_hook(lambda module, inward, outward: None)
    return v


@pytest.mark.parametrize("formula", [_counting, _hook_in_python, _hook_in_c, _hook_of_a_node, _unpacked])
def test_code_in_a_backward_pass_is_noticed(formula: Callable[[Tensor], Tensor]) -> None:
    assert runs_code_backwards(Value(formula), U)


def test_a_hook_of_the_module_is_noticed_and_torch_itself_is_not() -> None:
    assert runs_code_backwards(_module_hook(), U)
    for v in (CARA(), KahnemanTversky(), RatioClip(), Identity(), Value(lambda u: u.detach())):
        assert not runs_code_backwards(v, U)


def test_a_call_with_another_graph_is_noticed() -> None:
    leaf = U.clone().requires_grad_()
    assert alike_graphs([torch.sigmoid(leaf) for _ in range(5)])
    assert not alike_graphs([torch.sigmoid(leaf * 1 if i == 3 else leaf) for i in range(5)])
    assert not alike_graphs([torch.sigmoid(leaf.detach() if i == 3 else leaf) for i in range(5)])


class _LosesItsGradient(ValueFunction):
    """The gradient of a single call, of a number that few calls with a backward pass would meet."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, u: Tensor) -> Tensor:
        self.calls += 1
        return torch.sigmoid(0.3 * (u.detach() + 0 * u if self.calls == self.at else u))


def test_a_single_call_that_loses_its_gradient_is_found() -> None:
    witness = ValueFunctionCase(_LosesItsGradient(4997), value_function.CLAUSES).witness(deterministic)
    assert witness is not None
    assert witness.startswith("v'")
