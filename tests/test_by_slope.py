"""The integral of a slope: closed forms, shapes, dtypes and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from value_functions import GammaWeight
from value_functions.by_slope import BySlope

EDGE = math.log(5)


class Sloped(BySlope):
    kinks = (EDGE,)

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def slope(self, u: Tensor) -> Tensor:
        return self.formula(u)


# The slope, and its integral from 0.
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "logistic": (
        lambda u: torch.sigmoid(u) * torch.sigmoid(-u),
        lambda u: torch.tanh(u / 2) / 2,
    ),
    "slow logistic": (
        lambda u: 0.1 * torch.sigmoid(0.1 * u) * torch.sigmoid(-0.1 * u),
        lambda u: torch.tanh(u / 20) / 2,
    ),
    "tanh": (lambda u: 1 / torch.cosh(u.clamp(-300, 300)) ** 2, torch.tanh),
    "identity": (torch.ones_like, lambda u: u),
    "capped ratio": (
        lambda u: torch.exp(u.clamp(max=EDGE)),
        lambda u: torch.where(u < EDGE, torch.expm1(u.clamp(max=EDGE)), 4 + 5 * (u - EDGE)),
    ),
}
each = pytest.mark.parametrize("name", FORMS)
far = st.one_of(st.floats(-1e6, 1e6), st.floats(-8, 8), st.sampled_from([0.0, -0.0, 0.25, 64.0, EDGE, 1e6, -1e6]))
outcomes = st.lists(far, min_size=1, max_size=20)


@each
@given(us=outcomes)
def test_the_integral_is_the_closed_form(name, us):
    slope, integral = FORMS[name]
    u = torch.tensor(us, dtype=torch.float64)
    torch.testing.assert_close(Sloped(slope)(u), integral(u), rtol=1e-10, atol=1e-10)


@each
@given(us=outcomes, back=st.floats(-1e3, 1e3))
def test_the_gradient_is_the_slope_itself(name, us, back):
    v, u = Sloped(FORMS[name][0]), torch.tensor(us, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad((v(u) * back).sum(), u)
    assert torch.equal(found, back * v.slope(u.detach()))


def test_the_gradient_has_a_gradient():
    u = torch.tensor([-3.0, 0.0, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(Sloped(FORMS["tanh"][0]), u)


@each
def test_shape_and_strides_do_not_matter(name):
    v = Sloped(FORMS[name][0])
    u = torch.tensor([-1e6, -70.3, -3.1, -0.25, -1e-9, 0.0, 0.1, EDGE, 2.0, 63.9, 64.0, 1e6], dtype=torch.float64)
    flat = v(u)
    for other in (u.view(3, 4), u.view(3, 4).t(), u.view(2, 3, 2), u[::3], u[4], u[:0], u[:1].expand(7)):
        value = v(other)
        assert value.shape == other.shape
        alone = torch.stack([v(x) for x in other.reshape(-1)]) if other.numel() else flat[:0]
        torch.testing.assert_close(value.reshape(-1), alone, rtol=1e-14, atol=1e-14)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_float64_in_the_dtype_of_the_outcomes(name, dtype):
    v = Sloped(FORMS[name][0])
    u = torch.tensor([-50.0, -1.3, -0.1, 0.0, 0.2, 1.5, 3.0, 80.0], dtype=dtype, requires_grad=True)
    value = v(u)
    (found,) = torch.autograd.grad(value.sum(), u)
    assert value.dtype == found.dtype == dtype
    exact = u.detach().double()
    assert torch.equal(value, v(exact).to(dtype))
    assert torch.equal(found, v.slope(exact).to(dtype))


@given(u=st.floats(-30, 4), power=st.floats(0.3, 5), decay=st.floats(0.3, 5))
def test_the_vespo_weight_integrates_to_an_incomplete_gamma_function(u, power, decay):
    special = pytest.importorskip("scipy.special")
    scale = math.exp(decay) * decay**-power * math.gamma(power)
    exact = scale * (special.gammainc(power, decay * math.exp(u)) - special.gammainc(power, decay))
    found = GammaWeight(power=power, decay=decay)(torch.tensor([u], dtype=torch.float64))
    assert float(found) == pytest.approx(exact, rel=1e-8, abs=1e-9)


class Learning(Sloped):
    def __init__(self, learns: bool) -> None:
        super().__init__(torch.ones_like)
        self.raw = nn.Parameter(torch.tensor(2.0), requires_grad=learns)

    def slope(self, u: Tensor) -> Tensor:
        return self.raw.to(u) * self.formula(u)


def test_what_would_get_no_gradient_is_refused():
    u = torch.tensor([3.0])
    with pytest.raises(ValueError, match="raw"):
        Learning(learns=True)(u)
    assert Learning(learns=False)(u).item() == pytest.approx(6)


def test_a_new_slope_inherits_no_violations():
    class Parent(Sloped):
        violates: Mapping[str, str] = {"non_decreasing": "a reason"}

    class Child(Parent):
        def slope(self, u: Tensor) -> Tensor:
            return torch.ones_like(u)

    class Same(Parent):
        pass

    assert not Child.violates
    assert Same.violates
