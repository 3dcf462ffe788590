"""What the suite is tested with: mutants, which have one planted mistake each, and sound plug-ins and objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from torch import Tensor, nn

from value_functions import ValueFunction

# Every clause of the suite by the kind of target it belongs to.
CLAUSES = {
    "value function": (
        "shape",
        "elementwise",
        "deterministic",
        "no_in_place_change",
        "finite",
        "precision",
        "non_decreasing",
        "concave_on_gains",
        "gradient",
        "undesirable_non_decreasing",
        "undesirable_concave_on_gains",
    ),
    "reward": ("reward_shape", "reward_zero_at_reference", "reward_linear", "reward_of_its_row", "reward_padding"),
    "reference point": (
        "reference_in_range",
        "reference_shift_equivariant",
        "reference_permutation_equivariant",
        "reference_detached",
        "reference_split",
        "reference_finite",
    ),
    "feedback": (
        "feedback_sign",
        "feedback_weight",
        "feedback_independent_of_theta",
        "feedback_deterministic",
        "feedback_split",
        "feedback_finite",
    ),
    "objective": ("identity", "one_value_function"),
}


# What a check may overlook, or hold against a sound target.
STATE = "state and time"
SIZES = "sizes"
VALUES = "values and gradients"
INPUTS = "functions of (x, y) only"
TRAINING = "what training calls"
EXCUSES = "excuses"
FALSE_ALARMS = "false alarms"
PROCESS = "the process"
KINDS = (STATE, SIZES, VALUES, INPUTS, TRAINING, EXCUSES, FALSE_ALARMS, PROCESS)

# The kind of most mistakes that a clause is meant for; VALUES for the clauses that are not listed.
KIND_OF = {
    "elementwise": INPUTS,
    "deterministic": STATE,
    "reward_of_its_row": INPUTS,
    "reward_padding": SIZES,
    "reference_permutation_equivariant": INPUTS,
    "reference_split": SIZES,
    "feedback_independent_of_theta": INPUTS,
    "feedback_deterministic": STATE,
    "feedback_split": SIZES,
    "identity": TRAINING,
    "one_value_function": TRAINING,
    "process": PROCESS,
}


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what was done wrong.
        clauses: the report must have failed at least one of these; the first is the one the mutant is meant for.
        make: builds the mutant; the generator draws its place, size and scale.
        kind: the kind of mistake, if it is not that of the first clause.
    """

    name: str
    clauses: tuple[str, ...]
    make: Callable[[Random], nn.Module]
    kind: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", self.kind or KIND_OF.get(self.clauses[0], VALUES))

    def __call__(self, seed: int) -> nn.Module:
        """The mutant of that seed: other mutants of the same seed have other places and sizes."""
        return self.make(Random(f"{self.name} {seed}"))

    @property
    def drawn(self) -> bool:
        """Whether it draws anything, so that those of other seeds are others."""
        return draws(self.make)


class Sound(NamedTuple):
    """A sound target that a check of the given kind might refuse.

    Attributes:
        kind: what a careless check would hold against it.
        make: as that of a mutant, or without argument.
    """

    kind: str
    make: Callable[..., nn.Module]

    def __call__(self, *rng: Random) -> nn.Module:
        return self.make(*rng)


class Value(ValueFunction):
    """v(u) = ``formula(u)``."""

    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, u: Tensor) -> Tensor:
        return self.formula(u)


def draws(make: Callable[[Random], object]) -> bool:
    """Whether ``make`` uses the generator that it is handed."""
    rng = Random(0)
    before = rng.getstate()
    make(rng)
    return rng.getstate() != before
