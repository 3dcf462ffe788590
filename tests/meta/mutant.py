"""What a mutant is: a plug-in or objective with one planted mistake, and the clauses that have to notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

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


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what was done wrong.
        clauses: the report must have failed at least one of these; the first is the one the mutant is meant for.
        make: builds the mutant; the generator draws its place, size and scale.
    """

    name: str
    clauses: tuple[str, ...]
    make: Callable[[Random], nn.Module]

    def __call__(self, seed: int) -> nn.Module:
        """The mutant of that seed: other mutants of the same seed have other places and sizes."""
        return self.make(Random(f"{self.name} {seed}"))

    @property
    def drawn(self) -> bool:
        """Whether it draws anything, so that those of other seeds are others."""
        return draws(self.make)


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
