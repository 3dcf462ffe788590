"""Laws of value functions. Every class in the folder is found and held to them; nothing is listed here."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_parts import example, library

import value_functions
from value_functions import (
    CARA,
    Clipped,
    DiscoPOP,
    ExoPair,
    Hinge,
    Identity,
    KahnemanTversky,
    Logistic,
    LogSigmoid,
    LossAverse,
    Mixture,
    Quadratic,
    RatioClip,
    Scaled,
    Shifted,
    Squared,
    Tanh,
    ValueFunction,
)
from value_functions.bounded import bounded_exp

CLASSES = library(value_functions.__name__)
every = pytest.mark.parametrize("make", [partial(example, cls) for cls in CLASSES.values()], ids=CLASSES)
outcomes = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8)


def slope(v: ValueFunction, u: torch.Tensor) -> torch.Tensor:
    u = u.clone().requires_grad_()
    return torch.autograd.grad(v(u).sum(), u)[0]


def test_the_folder_is_discovered():
    assert {"Logistic", "LogSigmoid", "KahnemanTversky", "Mixture"} <= CLASSES.keys()


@every
@given(us=outcomes)
def test_elementwise_and_input_left_alone(make, us):
    v, u = make(), torch.tensor(us, dtype=torch.float64)
    before = u.clone()
    together = v(u)
    assert together.shape == u.shape
    assert torch.equal(u, before)
    # A processor may compute the last few of a batch with other instructions, which round otherwise: by an eps of what
    # cancels, too.
    assert torch.allclose(together, torch.cat([v(x[None]) for x in u]), rtol=1e-13, atol=1e-17, equal_nan=True)


@every
def test_non_decreasing_and_concave_on_gains(make):
    v = make()
    if v.violates:
        pytest.skip(f"it states that it violates {', '.join(v.violates)}; tests/test_conformance.py holds it to that")
    u = torch.linspace(-100, 100, 200_001, dtype=torch.float64)
    d = slope(v, u)
    assert bool((d >= 0).all()), f"decreases at u = {u[d < 0][0]}"
    gains = d[u > 0]
    rise = gains.diff()
    assert bool((rise <= 1e-12).all()), f"convex at u = {u[u > 0][1:][rise > 1e-12][0]}"


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_slope_are_finite_up_to_ten_thousand_nats(make, dtype):
    u = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 88.0, 90.0, -90.0, 1e4, -1e4], dtype=dtype)
    v = make()
    assert v(u).dtype == dtype
    assert bool(v(u).isfinite().all())
    assert bool(slope(v, u).isfinite().all())


@every
def test_learns_at_the_reference_point_where_every_run_starts(make):
    v = make()
    if isinstance(v, Squared):
        pytest.skip("its target is the reference point, so that only a reference point other than 0 teaches anything")
    assert slope(v, torch.zeros(3, dtype=torch.float64)).abs().min() > 0


@every
@given(u=st.floats(-50, 50).filter(lambda u: min(abs(u - kink) for kink in (-20, 0, 10, 30)) > 1e-3))
def test_slope_agrees_with_finite_differences(make, u):
    v, h = make(), 1e-6
    at = torch.tensor([u - h, u + h], dtype=torch.float64)
    low, high = v(at)
    assert slope(v, torch.tensor([u], dtype=torch.float64)).item() == pytest.approx(
        (high - low).item() / (2 * h), rel=1e-4, abs=max(1e-8, 1e-9 * max(1.0, abs(low.item())) / h)
    )


@given(u=st.floats(-200, 200), beta=st.floats(0.01, 10))
def test_formulas(u, beta):
    x, t = beta * u, torch.tensor([u], dtype=torch.float64)
    # exp of the negative size never overflows, so these hold far out as well.
    sigma = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    assert Logistic(beta=beta)(t).item() == pytest.approx(sigma, rel=1e-12)
    assert LogSigmoid(beta=beta)(t).item() == pytest.approx(min(x, 0) - math.log1p(math.exp(-abs(x))), rel=1e-12)
    assert Identity(beta=beta)(t).item() == pytest.approx(x, rel=1e-12)


@given(u=st.floats(-200, 200), by=st.floats(-5, 5), k=st.floats(0.1, 4))
def test_formulas_of_the_others(u, by, k):
    def of(v: ValueFunction) -> float:
        return v(torch.tensor([u], dtype=torch.float64)).item()

    def near(x: float) -> object:
        return pytest.approx(x, rel=1e-9, abs=1e-12)

    log_sigmoid = min(u * k, 0) - math.log1p(math.exp(-abs(u * k)))
    sigmoid = math.exp(log_sigmoid)
    assert of(Hinge(beta=k, margin=by)) == near(min(0, k * u - by))
    assert of(Quadratic(beta=k)) == near(-((u - 1 / (2 * k)) ** 2))
    assert of(Tanh(beta=k)) == near(math.tanh(k * u))
    assert of(CARA(beta=k)) == near(1 - math.exp(-k * u) if -k * u < 40 else 1 - math.exp(40) * (-k * u - 39))
    assert of(RatioClip(low=0.8, high=1.2)) == near(min(max(math.exp(u), 0.8), 1.2))
    assert of(Shifted(LogSigmoid(beta=k), by=by)) == near(
        min(k * (u - by), 0) - math.log1p(math.exp(-abs(k * (u - by))))
    )
    assert of(Scaled(Identity(beta=1.0), by=k)) == near(k * u)
    assert of(Clipped(Identity(beta=k), low=-5, high=5)) == near(k * min(max(u, -5), 5))
    assert of(LossAverse(Logistic(beta=k), loss_aversion=2.25)) == near(
        sigmoid if u >= 0 else 0.5 + 2.25 * (sigmoid - 0.5)
    )
    assert of(Mixture([Logistic(beta=k), Identity(beta=1.0)], weights=[0.5, 2])) == near(0.5 * sigmoid + 2 * u)
    other = log_sigmoid - k * u  # log sigmoid(-k u)
    exo = sigmoid * (log_sigmoid - math.log(0.99)) + math.exp(other) * (other - math.log(0.01))
    assert of(ExoPair(beta=k, label_smoothing=0.01)) == pytest.approx(-exo, rel=1e-6, abs=1e-9)
    if abs(k * u) < 30:
        m = 1 / (1 + math.exp(-k * u / 0.05)) if k * u > -30 else 0.0
        assert of(DiscoPOP(beta=k, tau=0.05)) == pytest.approx((1 - m) * log_sigmoid - m * math.exp(-k * u), rel=1e-6)


@pytest.mark.parametrize("x", [-1e4, -1.0, 0.0, 39.999, 40.0, 40.001, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bounded_exponential_goes_on_with_its_slope(x, dtype):
    t = torch.tensor(x, dtype=dtype, requires_grad=True)
    y = bounded_exp(t)
    (d,) = torch.autograd.grad(y, t)
    at = t.item()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    exact = math.exp(min(at, 40.0)) * (1 + max(at - 40.0, 0.0))
    assert y.item() == pytest.approx(exact, rel=tolerance)
    assert d.item() == pytest.approx(math.exp(min(at, 40.0)), rel=tolerance)


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
