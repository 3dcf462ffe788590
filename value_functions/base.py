"""The contract of a value function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from value_functions.discovery import Declared
from value_functions.ranges import Range


class ValueFunction(nn.Module, Declared, ABC):
    """The value v(u) that a person attributes to an outcome u = r - z0.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``. In a file of
    this package it is available by its bare name, without registration; in any other importable module, by its dotted
    path.

    In a HALO (Ethayarajh et al., ICML 2024, Def. 3.4) v is non-decreasing everywhere and concave on gains (u > 0).
    Nothing enforces that: other value functions are worth studying too, and declare it in ``violates``.

    Attributes:
        beta: factor by which outcomes are multiplied first (1 / nats), a number or a learnable tensor; optional.
            ``rewards/*`` are logged as beta * r, the scale used by other libraries.
        ranges: hyper-parameter to the values that it may take; see :meth:`accepted`. ``halos prove`` proves claims for
            all of them.
        violates: clause to reason; see :class:`~value_functions.discovery.Declared`.
    """

    beta: float | Tensor  # no default: torch refuses a parameter whose name is taken
    ranges: Mapping[str, Range] = MappingProxyType({})

    def accepted(self, name: str, value: float) -> float:
        """The value of a hyper-parameter, as a float.

        Raises:
            ValueError: it is outside its range in ``ranges``.
        """
        if value not in self.ranges[name]:
            raise ValueError(f"{type(self).__name__}: {name} is {value}; it must be {self.ranges[name].demand}")
        return float(value)

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """Value of each outcome.

        Args:
            u: outcomes in nats, any shape; the function must be elementwise.

        Returns:
            Values in units of utility, with the shape and dtype of ``u``.
        """

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, float))


def reward_scale(value_function: ValueFunction) -> float:
    """The factor by which rewards are multiplied in logs; see ``ValueFunction.beta``."""
    return float(getattr(value_function, "beta", 1.0))
