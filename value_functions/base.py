"""The contract of a value function."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class ValueFunction(nn.Module, ABC):
    """The value v(u) that a person attributes to an outcome u = r - z0.

    A subclass is a small ``nn.Module`` with keyword-only hyper-parameters and one method, ``forward``.
    A file in this package that holds one is found by the command line and by the tests without being
    registered anywhere; a class of any other importable module is chosen by its dotted path.

    For a HALO (Ethayarajh et al., ICML 2024, Def. 3.4) v must be non-decreasing everywhere and concave on
    gains (u > 0). Nothing here enforces that: a value function that is not is worth studying too.

    Attributes:
        beta: what outcomes are multiplied with before they are valued (1 / nats). ``rewards/*`` are logged
            as beta * r, the scale that users of other libraries know. A number or a learnable parameter; where there is
            none, it is 1.
        violates: clauses of the definition that the function does not keep, by their names in
            ``halos_pl.conformance``. It informs readers; the tests hold it to what is found.
    """

    beta: float | Tensor  # no default: torch refuses a parameter whose name is taken
    violates: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """Value of each outcome.

        Args:
            u: outcomes in nats, any shape; elementwise, so rows never mix.

        Returns:
            Values in utility, the shape and dtype of ``u``.
        """

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, float))


def reward_scale(value_function: ValueFunction) -> float:
    """The scale that rewards are shown in; see ``ValueFunction.beta``."""
    return float(getattr(value_function, "beta", 1.0))
