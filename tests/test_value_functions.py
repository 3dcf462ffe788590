"""Laws of value functions. Every class in the folder is found and held to them; nothing is listed here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import value_functions
from value_functions import Identity, KahnemanTversky, Logistic, LogSigmoid, ValueFunction

FOUND = [getattr(value_functions, name) for name in value_functions.__all__ if name != "ValueFunction"]
every = pytest.mark.parametrize("cls", FOUND, ids=lambda c: c.__name__)
outcomes = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8)


def slope(v: ValueFunction, u: torch.Tensor) -> torch.Tensor:
    u = u.clone().requires_grad_()
    return torch.autograd.grad(v(u).sum(), u)[0]


def test_the_folder_is_discovered():
    assert {Logistic, LogSigmoid, KahnemanTversky, Identity} <= set(FOUND)


@every
@given(us=outcomes)
def test_elementwise_and_input_left_alone(cls, us):
    v, u = cls(), torch.tensor(us, dtype=torch.float64)
    before = u.clone()
    together = v(u)
    assert together.shape == u.shape
    assert torch.equal(u, before)
    assert torch.equal(together, torch.cat([v(x[None]) for x in u]))


@every
def test_non_decreasing_and_concave_on_gains(cls):
    v = cls()
    u = torch.linspace(-100, 100, 200_001, dtype=torch.float64)
    d = slope(v, u)
    assert bool((d >= 0).all()), f"decreases at u = {u[d < 0][0]}"
    gains = d[u > 0]
    rise = gains.diff()
    assert bool((rise <= 1e-12).all()), f"convex at u = {u[u > 0][1:][rise > 1e-12][0]}"


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_slope_are_finite_up_to_ten_thousand_nats(cls, dtype):
    u = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 88.0, 90.0, -90.0, 1e4, -1e4], dtype=dtype)
    v = cls()
    assert v(u).dtype == dtype
    assert bool(v(u).isfinite().all())
    assert bool(slope(v, u).isfinite().all())


@every
def test_learns_at_the_reference_point_where_every_run_starts(cls):
    assert slope(cls(), torch.zeros(3, dtype=torch.float64)).min() > 0


@every
@given(u=st.floats(-50, 50).filter(lambda u: abs(u) > 1e-3))
def test_slope_agrees_with_finite_differences(cls, u):
    v, h = cls(), 1e-6
    at = torch.tensor([u - h, u + h], dtype=torch.float64)
    low, high = v(at)
    assert slope(v, torch.tensor([u], dtype=torch.float64)).item() == pytest.approx(
        (high - low).item() / (2 * h), rel=1e-4, abs=1e-8
    )


@given(u=st.floats(-200, 200), beta=st.floats(0.01, 10))
def test_formulas(u, beta):
    x, t = beta * u, torch.tensor([u], dtype=torch.float64)
    # exp of the negative size never overflows, so these hold far out as well.
    sigma = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    assert Logistic(beta=beta)(t).item() == pytest.approx(sigma, rel=1e-12)
    assert LogSigmoid(beta=beta)(t).item() == pytest.approx(min(x, 0) - math.log1p(math.exp(-abs(x))), rel=1e-12)
    assert Identity(beta=beta)(t).item() == pytest.approx(x, rel=1e-12)


@given(u=st.floats(-200, 200), alpha=st.floats(0.1, 1), curvature=st.floats(0.1, 1), aversion=st.floats(0.5, 4))
def test_kahneman_tversky_is_the_power_law_away_from_zero(u, alpha, curvature, aversion):
    v = KahnemanTversky(alpha=alpha, loss_curvature=curvature, loss_aversion=aversion, beta=1.0, eps=1e-12)
    exact = u**alpha if u >= 0 else -aversion * (-u) ** curvature
    # The smoothing moves the curve by eps^alpha at the most.
    assert v(torch.tensor([u], dtype=torch.float64)).item() == pytest.approx(
        exact, rel=1e-6, abs=5 * max(1, aversion) * 1e-12 ** min(alpha, curvature)
    )


def test_kahneman_tversky_refuses_parameters_outside_their_range():
    for wrong in ({"alpha": 0.0}, {"alpha": 1.1}, {"loss_curvature": -1}, {"loss_aversion": 0}, {"eps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            KahnemanTversky(**wrong)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="Logistic"):
        value_functions.Logistc  # noqa: B018
