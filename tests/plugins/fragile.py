"""A value function that breaks down, for the tests of what a run says then. Chosen by dotted path."""

from __future__ import annotations

from torch import Tensor

from value_functions import Logistic


class NaNAtStep(Logistic):
    """The logistic one, but at the ``step``-th time (from 0) that it is trained through, its first row is NaN.

    Args:
        step: optimizer step of the breakdown, for steps of one micro-batch.
    """

    def __init__(self, *, step: int) -> None:
        super().__init__()
        self.step = step
        self.calls = 0

    def forward(self, u: Tensor) -> Tensor:
        value = super().forward(u)
        if u.grad_fn is not None:  # not a metric's question
            if self.calls == self.step:
                value = value.clone()
                value[0] = float("nan")
            self.calls += 1
        return value
