"""Functions that a careless prover would prove: none of them may be proved, and sound relatives are not disproved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from compositions import Composed
from torch import Tensor, nn

from halos_pl.proof.prove import prove
from value_functions import ValueFunction
from value_functions.ranges import POSITIVE, Range


def bucket(u: Tensor) -> Tensor:
    return torch.bucketize(u, torch.tensor([0.0, 1.0, 2.0], dtype=u.dtype))


def spike(at: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.where(at(u), -100.0, u)


def written(u: Tensor) -> Tensor:
    w = u.new_zeros(u.shape)
    w.view(-1).copy_((2 * F.relu(u - 1e4)).view(-1))
    return u - w


def swallowed(u: Tensor) -> Tensor:
    try:
        return -u if (u > 1e4).any() else u
    except ValueError:
        return u


def one_less_at(difference: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda u: u + torch.sign(difference(u)) ** 2


# Each fails to rise, by construction, or is not defined everywhere.
FAULTY: dict[str, Callable[[Tensor], Tensor]] = {
    # the value at one point
    "equal squares": spike(lambda u: u * u == 25),
    "equal product": spike(lambda u: (u - 5) * (u + 7) == 0),
    "equal to an irrational": spike(lambda u: u * u == 2),
    "equal exponential": spike(lambda u: torch.exp(u - 5) == 1),
    "equal tanh": spike(lambda u: torch.tanh(u - 5) == 0),
    "two-sided": spike(lambda u: (u * u >= 25) & (u * u <= 25)),
    "sign of a cubic": one_less_at(lambda u: u**3 - 125),
    "sign of an exponential": one_less_at(lambda u: torch.exp(u) - 3),
    # dtypes
    "bools add up to a bool": lambda u: ((u > 0) + (u > 5)).to(u) * 10 - 6 * (u > 5).to(u),
    "the last bit of a count": lambda u: (bucket(u) & 1).to(u),
    "a bit set in a count": lambda u: (bucket(u) | 2).to(u),
    "uint8": lambda u: u + ((u > 5).to(torch.uint8) * 200 + (u > 5).to(torch.uint8) * 100).to(u) - 100 * (u > 5).to(u),
    "an overflow of int32": lambda u: (bucket(u).to(torch.int32) * 2**30).to(u),
    "bits of a float": lambda u: u.double().view(torch.int64).to(u),
    "float16": lambda u: torch.where(u.half() > 65504, -u, u),
    # tensors
    "index of the largest": lambda u: torch.where(
        torch.stack([u, torch.full_like(u, 1e4)], -1).max(-1).indices == 0, 2e4 - u, u
    ),
    "written by a view": written,
    "tolist": lambda u: -u if max(u.reshape(-1).tolist()) > 1e4 else u,
    "numpy": lambda u: torch.where(torch.from_numpy(u.detach().numpy() > 1e4), 2e4 - u, u),
    "the number of selected": lambda u: -u if u[u < 1e4].numel() < u.numel() else u,
    "text": lambda u: -u if "e+05" in repr(u.detach()) else u,
    "an error that is caught": swallowed,
    # what only rounding makes different
    "isinf": lambda u: torch.where(torch.isinf(u.exp()), -u, u),
    "isnan": lambda u: torch.where(torch.isnan(u.sqrt()), -u, 1.0),
    "nan_to_num": lambda u: torch.nan_to_num(u.exp() / (1 + u.exp()), nan=0.0),
    # undefined somewhere
    "square of a root": lambda u: u.sqrt() ** 2,
    "exponential of a logarithm": lambda u: u.log().exp(),
    "0 times a logarithm": lambda u: u + 0 * u.log(),
    "a logarithm less itself": lambda u: u + (u.log() - u.log()),
    "power of a negative number": lambda u: 0.0 * (-2.0) ** u + u,
    "a quotient that cancels": lambda u: (u - 3) * (u - 3) / (u - 3),
    # coefficients that nearly cancel
    "residue of a cubic": lambda u: u + 1e3 * u**3 - (1e3 + 5e-10) * u**3,
    "residue of tanh": lambda u: 1e12 * torch.tanh(u) - (1e12 + 0.5) * torch.tanh(u),
    "a fall beside a large offset": lambda u: 1e13 + torch.where(u < 5, u, u - 1),
    "a fall on a steep line": lambda u: torch.where(u < 3, 1e12 * u, 1e12 * u - 2),
    # calls
    "float32": lambda u: torch.tanh(u) if u.dtype == torch.float64 else torch.sin(u),
    "large batches": lambda u: torch.tanh(u) if len(u) < 4 else -u,
    "tables": lambda u: torch.tanh(u) if u.dim() == 1 else torch.sin(u),
    "inference": lambda u: torch.sin(u) if torch.is_inference_mode_enabled() else torch.tanh(u),
    "many rows": lambda u: u if u.numel() < 1000 else -u,
    "far in the batch": lambda u: torch.where((torch.arange(u.numel()) > 500).view(u.shape), -u, u),
    "four dimensions": lambda u: u if u.dim() < 4 else -u,
    "default dtype": lambda u: -u if torch.get_default_dtype() == torch.float64 else u,
    "a view with gaps": lambda u: u if u.is_contiguous() else -u,
    "in training": lambda u: u if u.grad_fn is None else -u,
    "float32 in large batches": lambda u: -u if u.dtype == torch.float32 and u.numel() > 100 else u,
    "without dimensions": lambda u: u if u.dim() else -u,
    "a column": lambda u: -u if u.dim() == 2 and u.shape[1] == 1 else u,
    "the sum of a batch": lambda u: u - 1e-3 * u.sum() if u.numel() > 30 else u,
    "autocast": lambda u: -u if torch.is_autocast_enabled("cpu") else u,
    "expanded": lambda u: -u if 0 in u.stride() else u,
    "NaN in large batches": lambda u: torch.where(u > 9, u if u.numel() < 100 else torch.nan, u),
    "a subclass": lambda u: u if type(u) is not Tensor else -u,
    "random": lambda u: -u if random.random() < 1e-9 else u,
}


@pytest.mark.parametrize("name", FAULTY)
def test_what_does_not_rise_is_not_proved(name):
    assert prove(Composed(FAULTY[name])).outcomes["non_decreasing"].status != "proved"


def filled(u: Tensor) -> Tensor:
    w = torch.zeros_like(u)
    w[...] = F.relu(-u)
    w.view(-1).mul_(2)
    return u - w


SOUND: dict[str, Callable[[Tensor], Tensor]] = {
    "one value at a kink": lambda u: torch.where(u * u == 25, u, u),
    "least of two curves": lambda u: torch.minimum(torch.tanh(u), 0.3 + 0.1 * torch.tanh(u / 10)),
    "steps by a count": lambda u: torch.where(u > 0, u, (2 * bucket(u + 3) - 7).to(u)),
    "views": filled,
    "largest": lambda u: torch.stack([u, -torch.ones_like(u)], -1).max(-1).values,
    "defined on its side": lambda u: torch.where(u > 0, torch.log1p(u), u),
    "decimals that cancel": lambda u: u + 0.1 * u.tanh() + 0.2 * u.tanh() - 0.3 * u.tanh(),
}


@pytest.mark.parametrize("name", SOUND)
def test_their_sound_relatives_are_not_disproved(name):
    outcomes = prove(Composed(SOUND[name])).outcomes
    assert {outcomes["non_decreasing"].status} == {"proved"}, outcomes["non_decreasing"].reason


def test_what_the_tolerance_excuses_is_listed():
    outcome = prove(Composed(lambda u: u + 1e4 * torch.tanh(u) - (1e4 + 1e-11) * torch.tanh(u))).outcomes
    assert any("sigmoid(2*u) counts as 0" in note for note in outcome["non_decreasing"].notes)


class Family(ValueFunction):
    """tanh(beta u) for the given beta, by the choice of ``kind`` another function for others."""

    ranges: Mapping[str, Range] = {"beta": POSITIVE}

    def __init__(self, *, beta: float = 0.1, kind: str = "") -> None:
        super().__init__()
        self.beta, self.kind = self.accepted("beta", beta), kind
        self.slope = 1 - beta if kind == "derived" else 1.0
        self.shape = torch.sin if kind == "chosen" and beta > 1 else torch.tanh
        self.register_buffer("weight", torch.tensor(1 - beta if kind == "buffer" else 1.0, dtype=torch.float64))

    def forward(self, u: Tensor) -> Tensor:
        if self.kind == "float" and isinstance(self.beta, float) and self.beta > 1:
            return -u
        return self.weight * self.slope * self.shape(self.beta * u)


@pytest.mark.parametrize("kind", ["", "derived", "chosen", "buffer", "float"])
def test_a_claim_is_about_other_hyper_parameters_only_if_they_were_recorded(kind):
    outcome = prove(Family(kind=kind)).outcomes["non_decreasing"]
    assert outcome.status == "proved"
    assert outcome.scope.startswith("for every beta" if not kind else "for the given")


class Parameter(ValueFunction):
    def __init__(self, learns: bool) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(0.1), requires_grad=learns)

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.b.to(u) * u)


def test_a_parameter_that_does_not_learn_is_a_constant():
    assert prove(Parameter(learns=True)).outcomes["non_decreasing"].status == "disproved"
    assert prove(Parameter(learns=False)).outcomes["non_decreasing"].status == "proved"


class InPython(ValueFunction):
    """a u sign(b), where the proof cannot follow b."""

    ranges: Mapping[str, Range] = {"a": POSITIVE, "b": Range()}

    def __init__(self, *, a: float = 1.0, b: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = self.accepted("a", a), self.accepted("b", b)

    def forward(self, u: Tensor) -> Tensor:
        return self.a * u * math.copysign(1, self.b)


def test_a_hyper_parameter_that_the_proof_cannot_follow_is_named_as_given():
    outcome = prove(InPython()).outcomes["non_decreasing"]
    assert outcome.status == "proved"
    assert outcome.scope == "for every a in (0, inf) and the given b"


def test_a_large_coefficient_is_no_rounding_error():
    def v(u: Tensor) -> Tensor:
        k = torch.where(u > 1, 1.0, 0.0).to(u.dtype)
        return u - 3 * (562949953421313.0 * k - 562949953421312.0 * k)

    assert prove(Composed(v)).outcomes["non_decreasing"].status == "undecided"
