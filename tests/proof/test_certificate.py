"""Certificates and their checker: what is accepted is what was proved, about this function, and nothing else is."""

from __future__ import annotations

import ast
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
from certificates import accepted, certified
from torch import Tensor, nn

from halos_pl.proof import agreement, construction, form, verify
from value_functions import (
    Clipped,
    KahnemanTversky,
    Logistic,
    LogSigmoid,
    Mixture,
    Scaled,
    Shifted,
    Tanh,
    ValueFunction,
)
from value_functions.ranges import POSITIVE, Range

REFUSED = (form.FormError, verify.RefusedError)
BUILDS: dict[str, Callable[[], ValueFunction]] = {
    "Logistic": Logistic,
    "KahnemanTversky": KahnemanTversky,
    "Clipped": lambda: Clipped(Tanh(), low=-2.0, high=3.0),
    "Mixture": lambda: Mixture([Logistic(), Tanh()], weights=[0.5, 2.0]),
}


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within a certificate."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(data[key], (*path, key))


JUNK = [None, True, 0, -1, 7, 10**30, 0.5, "", "0", "1/0", "x", "1e999999999", "9" * 5000, [], {}, [[]]]


def changed(value: Any, alike: list[Any], draw: random.Random) -> Any:
    """Another value in the place of one: one of its type, from elsewhere or near it, or any."""
    if type(value) is int:
        alike = [*alike, value + 1, -value, float(value), str(value), bool(value)]
    if type(value) is str:
        alike = [*alike, value + "1", value[:-1], value + "/3", "-" + value, value.upper()]
    others = draw.choice([alike or JUNK, JUNK])
    return copy.deepcopy(draw.choice([other for other in others if type(other) is not type(value) or other != value]))


def at(data: Any, path: list[Any]) -> Any:
    for step in path:
        data = data[step]
    return data


def mutated(data: dict[str, Any], draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A certificate with one change at random, and what that is."""
    new = copy.deepcopy(data)
    *path, key = draw.choice([*places(new)])
    home: Any = at(new, path)
    how = draw.choice(["change", "change", "drop", "add", "swap", "duplicate"])
    others = [other for other in (home if isinstance(home, dict) else range(len(home))) if other != key]
    if how == "swap" and others:
        other = draw.choice(others)
        home[key], home[other] = home[other], home[key]
    elif how == "drop":
        del home[key]
    elif how in ("add", "duplicate") and isinstance(home, dict):
        home[f"{key}2"] = home[key]
    elif how in ("add", "duplicate"):
        home.insert(key, copy.deepcopy(home[key]) if how == "duplicate" else draw.choice([None, 0, "0", []]))
    else:
        values = [at(new, [*place]) for place in places(new)]
        alike = [x for x in values if type(x) is type(home[key]) and x != home[key]]
        home[key] = changed(home[key], alike, draw)
    return f"{how} {path} {key}", new


def stated(data: dict[str, Any]) -> list[Any]:
    """What a certificate claims: about which parameters, of which expression up to rounding."""
    graphs = [[g["parameters"], len(g["kernels"]), len(g["pieces"])] for g in data["graphs"]]
    return [(claim["claim"], graphs[claim["graph"]]) for claim in data["claims"] if claim["graph"] is not None]


def _law(name: str, draws: int) -> None:
    data, draw = certified(BUILDS[name]), random.Random(name)
    kept = ("target", "init_args", "source")  # `halos verify` constructs another function, whose hash is another
    assert accepted(data, BUILDS[name])
    for _ in range(draws):
        what, new = mutated(data, draw)
        claims, error = None, ""
        try:
            claims = accepted(new, BUILDS[name])
        except REFUSED as refusal:
            error = str(refusal)
        assert "\n" not in error, what
        assert len(error) < 500, what
        if claims is None:
            continue
        if all(new[key] == data[key] for key in kept):
            assert stated(new) == stated(data), what
        assert claims == {claim for claim, _ in stated(data)}, what


@pytest.mark.parametrize("name", BUILDS)
def test_every_change_of_a_certificate_is_refused_or_does_not_change_what_is_claimed(name, fewer_points):
    _law(name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_2000_changes(name, fewer_points):
    _law(name, 2000)


@pytest.mark.parametrize("name", BUILDS)
def test_a_change_of_a_coefficient_by_a_billionth_is_refused(name, fewer_points):
    data = certified(BUILDS[name])
    for number in range(len(data["graphs"][0]["pieces"])):
        new = copy.deepcopy(data)
        for term in new["graphs"][0]["pieces"][number]["value"][0]:
            term[0] = str(Fraction(term[0]) * Fraction(10**9 + 1, 10**9))
        with pytest.raises(verify.RefusedError):
            accepted(new, BUILDS[name])


def test_a_certificate_of_another_function_or_of_changed_code_is_refused(fewer_points):
    data = certified(KahnemanTversky)
    for other in (Tanh, lambda: KahnemanTversky(beta=0.1001), lambda: Shifted(KahnemanTversky(), by=1e-3)):
        with pytest.raises(verify.RefusedError):
            accepted(data, other)
    with pytest.raises(verify.RefusedError, match="has changed"):
        accepted(data, KahnemanTversky, "1" * 64)


def test_a_false_claim_is_refused_even_if_the_function_is_right(fewer_points):
    data = certified(LogSigmoid)
    data["claims"][2] = {**data["claims"][0], "claim": data["claims"][2]["claim"]}
    with pytest.raises(verify.RefusedError):
        accepted(data, LogSigmoid)


class Scale(ValueFunction):
    """tanh(beta u) for every beta in its range, and what extends it is not."""

    ranges: Mapping[str, Range] = {"beta": POSITIVE}

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = self.accepted("beta", beta)

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(self.beta * u)


class Keywords(Scale):
    """Passes its arguments on."""

    def __init__(self, **kwargs: float) -> None:
        super().__init__(**kwargs)


class Half(Scale):
    """Another function from 1 on, as its constructor decides."""

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__(beta=beta)
        self.function = torch.tanh if beta < 1 else torch.sin

    def forward(self, u: Tensor) -> Tensor:
        return self.function(self.beta * u)


class Buffered(Scale):
    """A buffer that follows from the parameter."""

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__(beta=beta)
        self.register_buffer("factor", torch.tensor(1.0 if beta == 0.1 else 1 - beta, dtype=torch.float64))

    def forward(self, u: Tensor) -> Tensor:
        return self.factor * super().forward(u)


class Plain(Scale):
    """Looks at its parameter's type."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) if isinstance(self.beta, Tensor) or self.beta == 0.1 else -u


class Fixed(Scale):
    """Takes no argument."""

    def __init__(self) -> None:
        super().__init__(beta=0.2)


class Deaf(Scale):
    """Ignores its argument."""

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__(beta=0.1)


class Narrow(Scale):
    ranges: Mapping[str, Range] = {"beta": Range(0, 2)}


class Unbounded(Scale):
    ranges: Mapping[str, Range] = MappingProxyType({})

    def __init__(self, *, beta: float = 0.1) -> None:
        ValueFunction.__init__(self)
        self.beta = beta


class Trained(Scale):
    """A parameter that is learnable."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))


class Sloped(ValueFunction):
    """tanh(e^raw u), in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([0.1]))

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(torch.exp(self.raw[0]).to(u.dtype) * u)


class Rejecting(Scale):
    def __init__(self, *, beta: float = 0.1) -> None:
        if beta != 0.1:
            raise ValueError("beta must be 0.1")
        super().__init__(beta=beta)


@pytest.mark.parametrize("build", [Half, Buffered, Plain, Fixed, Keywords, Deaf, Narrow, Unbounded, Trained, Rejecting])
def test_a_claim_for_a_range_is_refused_for_a_class_that_is_another_function_there(build, fewer_points):
    data = certified(Scale)
    assert "beta" in data["graphs"][0]["parameters"][0]["name"]
    with pytest.raises(verify.RefusedError):
        accepted(data, build)


KEEPING: dict[str, tuple[Callable[[], ValueFunction], Callable[[], ValueFunction]]] = {
    "itself": (Scale, Scale),
    "nested": (lambda: Scaled(Scale(), by=2.0), lambda: Scaled(Scale(beta=0.3), by=3.0)),
    "learnable": (Sloped, Sloped),
}


@pytest.mark.parametrize(("proved", "build"), KEEPING.values(), ids=KEEPING)
def test_a_claim_for_ranges_is_accepted_for_classes_that_keep_to_it(proved, build, fewer_points):
    data = certified(proved)
    assert data["graphs"][0]["parameters"]
    assert accepted(data, build)


def test_an_expression_for_one_value_is_no_proof_for_all(fewer_points):
    data = certified(Unbounded)
    assert accepted(data, Unbounded)
    graph = data["graphs"][0]

    def shifted(data: Any) -> Any:
        return [[[c, [[i + (i > 0), k] for i, k in powers]] for c, powers in terms] for terms in data]

    for kernel in graph["kernels"]:
        kernel["argument"] = shifted(kernel["argument"])
    for piece in graph["pieces"]:
        piece["value"] = shifted(piece["value"])
    graph["parameters"] = [{"name": "beta", "low": "0", "high": None, "above_low": True, "below_high": True}]
    with pytest.raises(verify.RefusedError, match="beta"):
        accepted(data, Scale)


class Odd(ValueFunction):
    """u, and something else somewhere."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, u: Tensor) -> Tensor:
        return self.formula(u)


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "far gains": lambda u: torch.where(u > 1e11, 0.9 * u, u),
    "far losses": lambda u: torch.where(u < -1e11, 0.9 * u, u),
    "at one point": lambda u: torch.where(u == 0, torch.full_like(u, 3), u),
    "next to the seam": lambda u: torch.where((u > 0) & (u < 1e-8), u + 1e-3, u),
    "in a batch of one": lambda u: u if len(u) > 1 else 2 * u,
    "in large batches": lambda u: u if len(u) < 300 else 2 * u,
    "in a batch with a large number": lambda u: u if u.detach().max() < 1e6 else 2 * u,
    "not in ascending order": lambda u: u.sort().values,
    "without gradients": lambda u: u if torch.is_grad_enabled() else u + 1e-6,
    "rounded": lambda u: u.float().double(),
    "other dtype": lambda u: u.float(),
    "undefined far out": lambda u: u + 0 * torch.exp(u),
    "raises": lambda u: u[: len(u) + 1 // (len(u) - 1)],
}


@pytest.mark.parametrize("name", ODD)
def test_a_function_that_differs_somewhere_is_refused(name, fewer_points):
    data = certified(lambda: Odd(lambda u: u))
    assert len(accepted(data, lambda: Odd(lambda u: u))) == 3
    with pytest.raises(verify.RefusedError):
        accepted(data, lambda: Odd(ODD[name]))


def test_ten_thousand_points_are_on_all_pieces_in_both_tails_and_near_seams():
    chain = verify.Chain(certified(BUILDS["Clipped"])["graphs"][0])
    us = agreement._points(chain, agreement.POINTS)
    assert len(us) >= 10_000
    assert min(us) == -1e12
    assert max(us) == 1e12
    for low, high, _ in chain.pieces:
        assert sum(bool(low < u < high) for u in map(verify.arb, us)) > 3
    assert {-2.0, 0.0, 3.0, 3.0 + 1e-9, -2.0 - 1e-9} <= {*us}


def test_the_checker_is_small_and_uses_nothing_of_the_prover():
    def imports(module: ModuleType) -> set[str]:
        text = Path(module.__file__ or "").read_text(encoding="utf-8")
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom | ast.Import)]
        return {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}

    assert len(Path(verify.__file__).read_text(encoding="utf-8").splitlines()) < 300
    assert {name for name in imports(verify) if name.partition(".")[0] not in sys.stdlib_module_names} == {"flint"}
    for module in (form, agreement, construction):
        own = {name for name in imports(module) if name.startswith("halos_pl")}
        assert own <= {"halos_pl.proof.verify", "halos_pl.proof.construction"}
