"""Certificates hold for an interval arithmetic that shares no code with the prover or its checker."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import second_engine
from certificates import certified
from compositions import Composed
from make_parts import example
from test_prove import SHIPPED, SOUND

from value_functions import Clipped, KahnemanTversky, Logistic, Mixture, Tanh, ValueFunction

BUILDS: dict[str, Callable[[], ValueFunction]] = {
    "power": KahnemanTversky,
    "sigmoid, parameters": lambda: Mixture([Logistic(), Tanh()], weights=[0.5, 2.0]),
    "seams": lambda: Clipped(Tanh(), low=-2.0, high=3.0),
    **{name: lambda name=name: Composed(SOUND[name]) for name in ("normal distribution", "log log", "Gudermannian")},
}


def turned(claim: Any, graph: Any, draw: Random) -> None:
    """The piece on one side of 0 falls."""
    value = draw.choice([p for p in graph["pieces"] if "0" in (p["low"], p["high"])])["value"]
    value[0] = [["-" + c if c[0] != "-" else c[1:], powers] for c, powers in value[0]]


def moved(claim: Any, graph: Any, draw: Random) -> None:
    """The end of a cell is elsewhere."""
    cell = draw.choice([cell for cells in claim["cells"] for cell in cells])
    i = draw.choice([i for i in (0, 1) if cell[i] is not None])
    cell[i] = str(draw.randint(10**3, 10**4))


def dropped(claim: Any, graph: Any, draw: Random) -> None:
    """A piece is missing."""
    i = draw.randrange(len(graph["pieces"]))
    del graph["pieces"][i], claim["cells"][i]


def misplaced(claim: Any, graph: Any, draw: Random) -> None:
    """An enclosure is on the wrong side of 0."""
    draw.choice([cell for cells in claim["cells"] for cell in cells])[2:] = ["-2", "-1"]


@pytest.mark.parametrize("name", BUILDS)
def test_certificates_hold_for_another_interval_arithmetic_and_changed_ones_do_not(name, fewer_points):
    data = certified(BUILDS[name])
    second_engine.check(data, Random(0), 2)
    for change in (turned, moved, dropped, misplaced):
        for seed in range(3):
            new, draw = copy.deepcopy(data), Random(f"{name} {seed}")
            claim = new["claims"][0]  # never falls
            change(claim, new["graphs"][claim["graph"]], draw)
            new["claims"] = [claim]
            with pytest.raises(second_engine.Refuted):
                second_engine.check(new, draw, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOUND, *SHIPPED])
def test_every_certificate_holds_for_another_interval_arithmetic(name, fewer_points):
    data = certified(lambda: Composed(SOUND[name]) if name in SOUND else example(SHIPPED[name]))
    second_engine.check(data, Random(name), 20)


def test_the_second_engine_uses_nothing_of_halos_pl():
    tree = ast.parse(Path(second_engine.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
    assert modules == {"__future__", "fractions", "itertools", "random", "typing", "mpmath"}
