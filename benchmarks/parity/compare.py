"""Two losses on the same batch: are they equal, up to a constant, up to a scale, or different?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parity.batch import Batch

Kind = Literal["equal", "offset", "scale", "other"]
#: What float32 leaves of a loss or a gradient; differences below are rounding.
ROUNDING = 2e-5


@dataclass(frozen=True)
class Value:
    """A loss on the batch.

    Attributes:
        loss: the loss.
        gradient: float32 [m], its slope in every log-prob of the policy, then in every score of the reward model.
    """

    loss: float
    gradient: Tensor


@dataclass(frozen=True)
class Difference:
    """Another library's loss against ours, on the batch.

    Attributes:
        theirs, ours: the two losses.
        gradient: norm of the difference of the gradients, divided by the norm of ours.
        scale: what our gradient is multiplied with to come closest to theirs.
        kind: ``equal``: loss and gradient are; ``offset``: the gradient is, the loss is not, which differs by a
            constant or by a part without gradient; ``scale``: their gradient is ours times ``scale``; ``other``: the
            gradients have different directions.
    """

    theirs: float
    ours: float
    gradient: float
    scale: float
    kind: Kind


def value_of(loss: Callable[[Batch], Tensor], batch: Batch) -> Value:
    """Loss and gradient.

    Raises:
        ValueError: the loss is not one number that is finite.
    """
    result = loss(batch)
    if result.dim() or not result.isfinite():
        raise ValueError(f"the loss is {result.detach().tolist()}, which is not one finite number")
    leaves = (batch.tokens, batch.scalar)
    slopes = torch.autograd.grad(result, leaves, allow_unused=True, materialize_grads=True)
    return Value(result.item(), torch.cat([slope.flatten() for slope in slopes]))


def difference(theirs: Value, ours: Value) -> Difference:
    """How another library's loss differs from ours."""
    own = ours.gradient.norm()
    scale = (theirs.gradient @ ours.gradient / own.square()).item()
    apart = ((theirs.gradient - ours.gradient).norm() / own).item()
    along = (theirs.gradient - scale * ours.gradient).norm() <= ROUNDING * theirs.gradient.norm()
    kind: Kind = "other"
    if apart <= ROUNDING:
        same = abs(theirs.loss - ours.loss) <= ROUNDING * max(1.0, abs(ours.loss))
        kind = "equal" if same else "offset"
    elif along:
        kind = "scale"
    return Difference(theirs.loss, ours.loss, 0.0 if kind in ("equal", "offset") else apart, scale, kind)


def uses_reference(loss: Callable[[Batch], Tensor], batch: Batch) -> bool:
    """Whether the loss changes with the reference model."""
    return bool(loss(batch) != loss(batch.with_reference(0.5)))
