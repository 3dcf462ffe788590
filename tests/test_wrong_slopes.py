"""Value functions that are given by their slope."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from value_functions import GammaWeight
from value_functions.by_slope import BySlope


class Given(BySlope):
    """Its slope is what a function makes of u."""

    def __init__(self, made) -> None:
        super().__init__()
        self.made = made

    def slope(self, u: Tensor) -> Tensor:
        return self.made(u)


@given(u=st.lists(st.floats(-300, 300, width=32), max_size=5))
def test_a_constant_slope_is_the_identity(u: list[float]) -> None:
    x = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    value = Given(torch.ones_like)(x)
    torch.testing.assert_close(value, x)
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("made", [lambda u: 0.1, lambda u: u.sum(), lambda u: None, lambda u: u[..., None]])
def test_a_slope_has_the_shape_of_the_outcomes(made) -> None:
    with pytest.raises(ValueError, match=r"^Given: slope returns"):
        Given(made)(torch.zeros(3))


@given(power=st.floats(1e-3, 1e4), decay=st.floats(1e-3, 1e4))
def test_the_slope_of_a_gamma_weight_is_finite_or_refused(power: float, decay: float) -> None:
    if power * math.log(power / decay) - power + decay > 40:
        with pytest.raises(ValueError, match=r"power is .* decay"):
            GammaWeight(power=power, decay=decay)
        return
    v = GammaWeight(power=power, decay=decay)
    u = torch.cat([torch.linspace(-90, 90, 181), torch.tensor([power / decay]).log()]).requires_grad_()
    value = v(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert slope.max() <= 1.01 * torch.tensor(40.0).exp()
