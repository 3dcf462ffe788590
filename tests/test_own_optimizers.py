"""An optimizer of the user's own that cannot train or be saved is refused before data and model are loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from halos_pl.training.optimizer_checks import check_optimizer


class WithoutClosure(SGD):
    def step(self) -> Any:  # type: ignore[override]
        return super().step()


class OtherName(SGD):
    def step(self, function: Any = None) -> Any:
        return super().step(function)


class Ignoring(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step()


class Twice(SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class RowMeans(Optimizer):
    """Its state has a number per row of a parameter; for a vector, that is a mean over the ranks."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mean"] = parameter.grad.square().mean(-1)
        return loss


def check(kind: Any, **options: bool) -> None:
    def make(parameters: list[nn.Parameter]) -> Any:
        return kind(parameters, lr=0.1)

    check_optimizer(make, torch.device("cpu"), vectors=True, **options)


@pytest.mark.parametrize(
    ("kind", "why"), [(WithoutClosure, "takes no"), (OtherName, "takes no"), (Ignoring, "does not call")]
)
def test_a_step_that_does_not_call_its_closure(kind: Any, why: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.optimizer: {kind.__name__}\.step {why}.*step\(self, closure=None\)"):
        check(kind)
    check(kind, closure=False)


@pytest.mark.parametrize("kind", [SGD, Twice, LBFGS, RowMeans])
def test_a_step_that_calls_its_closure(kind: Any) -> None:
    check(kind)


def test_a_state_that_is_not_added_up_over_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"RowMeans keeps a state .*\.mean is not added up over the ranks\); choose"):
        check(RowMeans, sharded=True, folders=True)
