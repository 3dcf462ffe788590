"""An instance of every plug-in of the library. The classes are found, not listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import find
from torch import nn

import halos_pl.objective.feedback
import halos_pl.objective.reference_points
import halos_pl.objective.rewards
import value_functions
from halos_pl.conformance.strategies import arguments
from halos_pl.conformance.target import required_arguments
from halos_pl.objective.feedback import Binary, ByLength, Flipped, Pairwise
from halos_pl.objective.reference_points import Constant
from value_functions import Clipped, Identity, Logistic, LogSigmoid, LossAverse, Mixture, Scaled, Shifted, Tanh
from value_functions.discovery import plug_ins

PACKAGES: dict[str, type] = {
    value_functions.__name__: value_functions.ValueFunction,
    halos_pl.objective.rewards.__name__: halos_pl.objective.rewards.Reward,
    halos_pl.objective.reference_points.__name__: halos_pl.objective.reference_points.ReferencePoint,
    halos_pl.objective.feedback.__name__: halos_pl.objective.feedback.Feedback,
}
# Arguments that say more than the defaults, and those that a class needs in order to keep its clauses.
EXAMPLES: dict[type, Callable[[], nn.Module]] = {
    Binary: lambda: Binary(denominator="tokens"),
    Clipped: lambda: Clipped(Identity(), low=-20.0, high=30.0),
    Constant: lambda: Constant(value=-1.0),
    Flipped: lambda: Flipped(Pairwise(label_smoothing=0.1)),
    ByLength: lambda: ByLength(Binary(), power=-1.0),
    LossAverse: lambda: LossAverse(Logistic(), loss_aversion=2.25),
    Mixture: lambda: Mixture([Logistic(), Identity()], weights=[0.5, 2.0]),
    Pairwise: lambda: Pairwise(label_smoothing=0.1),
    Scaled: lambda: Scaled(LogSigmoid(), by=0.1),
    Shifted: lambda: Shifted(LogSigmoid(beta=2.0), by=0.5),
}
# Value functions around another.
WRAPPERS: dict[str, Callable[[value_functions.ValueFunction], value_functions.ValueFunction]] = {
    "Clipped": lambda v: Clipped(v, low=-3.0, high=3.0),
    "LossAverse": lambda v: LossAverse(v, loss_aversion=2.25),
    "Mixture": lambda v: Mixture([v, Tanh()], weights=[0.5, 2.0]),
    "Scaled": lambda v: Scaled(v, by=2.0),
    "Shifted": lambda v: Shifted(v, by=1.0),
}


def example(cls: type[nn.Module]) -> Any:
    """An instance of a plug-in's class, with drawn arguments where it needs any that ``EXAMPLES`` does not give."""
    if cls in EXAMPLES:
        return EXAMPLES[cls]()
    return cls(**find(arguments(cls), lambda _: True)) if required_arguments(cls) else cls()


def library(package: str) -> dict[str, type[nn.Module]]:
    """The plug-ins of ``package`` by name."""
    return plug_ins(package, PACKAGES[package])
