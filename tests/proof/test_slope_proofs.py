"""Value functions that are given by their slope: what is proved of them, disproved and left open."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from certificates import certified
from compositions import CONCAVE, S_SHAPED, Composed
from hypothesis import given
from hypothesis import strategies as st
from laws import law
from make_parts import WRAPPERS
from torch import Tensor, nn

from halos_pl.conformance.proofs import disproof, outcomes
from halos_pl.proof.prove import prove
from value_functions import GammaWeight, ValueFunction
from value_functions.by_slope import BySlope
from value_functions.ranges import NOT_NEGATIVE, POSITIVE, Range


class Sloped(BySlope):
    """v' by a formula."""

    def __init__(self, formula: Callable[[Tensor], Tensor], kinks: Sequence[float] = ()) -> None:
        super().__init__()
        self.formula, self.kinks = formula, kinks

    def slope(self, u: Tensor) -> Tensor:
        return self.formula(u)


def statuses(v: nn.Module) -> list[str]:
    return [outcome.status for outcome in prove(v).outcomes.values()]


# By name: the slope, its kinks, and which of the claims hold.
SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...], tuple[bool, bool, bool]]] = {
    "logistic": (lambda u: torch.sigmoid(u) * torch.sigmoid(-u), (), (True, True, True)),
    "log sigmoid": (lambda u: torch.sigmoid(-u), (), (True, True, False)),
    "constant": (lambda u: 0.3 + 0 * u, (), (True, True, True)),
    "0": (lambda u: 0 * u, (), (True, True, True)),
    "capped ratio": (lambda u: torch.exp(u.clamp(max=math.log(5))), (math.log(5),), (True, False, True)),
    "falls by a jump": (lambda u: torch.where(u < 1.1, 1.0, 0.5).to(u), (1.1,), (True, True, True)),
    "rises by a jump": (lambda u: torch.where(u < 1.1, 0.5, 1.0).to(u), (1.1,), (True, False, True)),
    "jumps at 0": (lambda u: torch.where(u < 0, 0.5, 1.0).to(u), (), (True, True, True)),
    "falls on losses": (lambda u: torch.where(u < -1.1, 2.0, 1.0).to(u), (1.1,), (True, True, False)),
    "falls by a bend": (lambda u: 1 - 0.3 * (u - 1.1).clamp(0, 1), (1.1, 2.1), (True, True, True)),
    "below 0 on a hundredth": (
        lambda u: torch.where((u > 37.3) & (u < 37.31), -0.01, 1 / (1 + u.abs())),
        (37.3, 37.31),
        (False, False, True),
    ),
    "a thousandth more on a hundredth": (
        lambda u: 1 / (1 + u.abs()) + 1e-3 * ((u > 7.7) & (u < 7.71)).to(u),
        (7.7, 7.71),
        (True, False, True),
    ),
    "a small hill": (lambda u: 1 / (1 + u.abs()) + 0.01 * torch.exp(-100 * (u - 20) ** 2), (), (True, False, True)),
    "below 0 far out": (
        lambda u: torch.exp(-u.abs()) * (1 - 0.01 * u.clamp(min=0)),
        (),
        (False, False, True),
    ),
    "a cubic": (lambda u: (u - 1) * (u - 2) * (u - 3), (), (False, False, True)),
}


@pytest.mark.parametrize("name", SLOPES)
def test_claims_are_decided_by_the_slope_and_witnesses_hold_on_intervals(name):
    formula, kinks, holds = SLOPES[name]
    for (claim, outcome), expected in zip(prove(Sloped(formula, kinks)).outcomes.items(), holds, strict=True):
        assert outcome.status == ("proved" if expected else "disproved"), f"{claim} {outcome}"
        if outcome.decision is None or outcome.status == "proved":
            continue
        points = torch.tensor([float(u) for u in outcome.decision.points], dtype=torch.float64)
        for u in (points, points * (1 - 1e-15), points * (1 + 1e-15)):
            s = formula(u)
            if claim == "non_decreasing":
                assert float(s) < 0
            else:
                side = 1 if claim == "concave_on_gains" else -1
                assert bool((side * u > 0).all())
                assert side * float(s[1] - s[0]) > 0


# The slopes of some functions, by their names in compositions.py, for a scale of 1.
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "log sigmoid": lambda x: torch.sigmoid(-x),
    "linear": lambda x: 1 + 0 * x,
    "smooth hinge": lambda x: 0.5 * (1 - x / torch.sqrt(x * x + 1)),
    "sigmoid": lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    "tanh": lambda x: 1 - torch.tanh(x) ** 2,
    "arctan": lambda x: 1 / (1 + x * x),
    "asinh": lambda x: (1 + x * x) ** -0.5,
}


@law(6)
@given(name=st.sampled_from([*DERIVATIVES]), scale=st.floats(0.05, 2).map(lambda x: round(x, 3)))
def test_a_slope_has_the_claims_of_the_function_whose_slope_it_is(name, scale):
    found = statuses(Sloped(lambda u: scale * DERIVATIVES[name](scale * u)))
    assert found == statuses(Composed((CONCAVE | S_SHAPED)[name](scale)))


class Overriding(Sloped):
    def forward(self, u: Tensor) -> Tensor:
        return -torch.tanh(u)


class Negated(Sloped):
    def forward(self, u: Tensor) -> Tensor:
        return -super().forward(u)


class Learning(Sloped):
    def __init__(self) -> None:
        super().__init__(lambda u: 1 + 0 * u)
        self.raw = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def slope(self, u: Tensor) -> Tensor:
        return F.softplus(self.raw.to(u.dtype)) * u / u.abs().clamp(min=1)


def hooked() -> nn.Module:
    v = Sloped(lambda u: 1 + 0 * u)
    v.register_forward_hook(lambda module, args, value: -value)
    return v


def test_a_forward_of_its_own_is_what_is_proved():
    assert statuses(Overriding(lambda u: 1 + 0 * u))[0] == "disproved"


@pytest.mark.parametrize(
    "v",
    [
        Negated(lambda u: 1 + 0 * u),
        Learning(),
        hooked(),
        *(wrap(GammaWeight()) for wrap in WRAPPERS.values()),
        # kinks that are not declared: the value is not the integral
        Sloped(lambda u: torch.where(u < 1.1, 1.0, 0.5).to(u)),
        Sloped(lambda u: 1 - 0.3 * (u - 1.1).clamp(0, 1)),
        Sloped(lambda u: torch.where((u > 5000.3) & (u < 5000.31), -0.01, 1 / (1 + u.abs()))),
        Sloped(lambda u: 1e4 * torch.sigmoid(1e4 * u) * torch.sigmoid(-1e4 * u)),  # steeper than the panels
        # no integral, or none that is known
        Sloped(lambda u: torch.where(u > 0, 1 / u, 1.0)),
        Sloped(lambda u: torch.where(u < -3, 1 / (u + 3) ** 2, 1.0)),
        Sloped(lambda u: 1 / (u - 3) ** 2),
        Sloped(lambda u: torch.where(u > 0, u**-0.5, 1.0)),
        # not one function
        Sloped(lambda u: u.sum() + 0 * u),
        Sloped(lambda u: torch.ones_like(u) if u.max() < 3 else -torch.ones_like(u)),
    ],
)
def test_what_is_not_the_integral_of_one_bounded_slope_is_undecided_with_a_reason(v):
    for outcome in prove(v).outcomes.values():
        assert outcome.status == "undecided"
        assert outcome.reason


def test_a_value_that_is_not_the_integral_of_its_slope_has_another_gradient():
    """Too narrow a dip for the search; the proof knows where the slope switches branches."""
    v = Sloped(lambda u: torch.where((u - 1.03).abs() < 1e-4, -3.0, torch.sigmoid(-u)).to(u))
    assert "kinks lack 1.0" in (disproof(outcomes(v), "gradient") or "")
    declared = Sloped(v.formula, kinks=(1.03 - 1e-4, 1.03 + 1e-4))
    assert disproof(outcomes(declared), "gradient") is None
    assert disproof(outcomes(declared), "non_decreasing")


@pytest.mark.parametrize("at", [0.0, 5.0])
def test_a_slope_at_one_outcome_alone_neither_proves_nor_disproves(at):
    outcomes = prove(Sloped(lambda u: torch.where(u == at, -100.0, 1.0).to(u))).outcomes
    assert outcomes["non_decreasing"].status == "undecided"
    assert outcomes["concave_on_gains"].status == ("undecided" if at else "proved")


class Fixed(GammaWeight):
    """It for given arguments alone, which a proof takes as numbers."""

    ranges: Mapping[str, Range] = {}

    def __init__(self, power: float, decay: float) -> None:
        BySlope.__init__(self)
        self.power, self.decay = power, decay


def test_the_vespo_weight_is_concave_on_gains_for_those_arguments_for_which_its_power_is_at_most_its_decay():
    outcomes = prove(GammaWeight(power=2.0, decay=3.0)).outcomes
    assert str(outcomes["non_decreasing"]) == "proved for every power in (0, inf), decay in (0, inf)"
    gains = outcomes["concave_on_gains"]
    assert (gains.status, gains.scope) == ("proved", "for the given hyper-parameters")
    assert gains.reason.startswith("disproved for power = ")
    assert outcomes["undesirable_concave_on_gains"].status == "disproved"
    for power, decay in ((1.0, 1.0), (2.5, 2.0)):
        found = statuses(Fixed(power, decay))
        assert found[1] == ("proved" if power <= decay else "disproved")
        assert found[2] == ("proved" if power >= decay else "disproved")


class Ranged(BySlope):
    """v' = a - b sigmoid(u)."""

    ranges: Mapping[str, Range] = {"a": POSITIVE, "b": NOT_NEGATIVE}

    def __init__(self, *, a: float = 1.0, b: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = self.accepted("a", a), self.accepted("b", b)

    def slope(self, u: Tensor) -> Tensor:
        return self.a - self.b * torch.sigmoid(u)


def test_claims_hold_for_all_arguments_or_name_those_that_break_them():
    outcomes = prove(Ranged()).outcomes
    assert outcomes["non_decreasing"].scope == "for the given hyper-parameters"
    assert "b = " in outcomes["non_decreasing"].reason
    assert str(outcomes["concave_on_gains"]) == "proved for every a in (0, inf), b in [0, inf)"
    assert outcomes["undesirable_concave_on_gains"].scope == "for the given hyper-parameters"


def test_a_certificate_says_that_it_cannot_contain_a_slope():
    build: Callable[[], ValueFunction] = GammaWeight
    assert [claim["graph"] for claim in certified(build)["claims"]] == [None] * 3
