"""Descriptions of faults, in numbers that can be checked with a calculator."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.common.messages import raised
from halos_pl.conformance.target import UncheckableError


class WrongShape(str):
    """A witness that the target returned a wrong shape, which makes all other clauses meaningless."""


class Raised(str):
    """A witness that the target raised an error."""

    @classmethod
    def by(cls, error: BaseException) -> Raised:
        """The error in one line.

        Raises:
            UncheckableError: the memory is used up.
        """
        if isinstance(error, UncheckableError):
            raise error
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise UncheckableError(
                f"it runs out of memory: {' '.join(str(error).split())[-200:]}".rstrip(": ")
            ) from error
        return cls(f"raises {raised(error)}")


def number(x: float) -> str:
    """A number with as many digits as it needs, at most 12."""
    return f"{x + 0.0:.12g}"  # no -0


def pair(x: float, y: float) -> tuple[str, str]:
    """Two different numbers, with just enough digits to show the difference."""
    x, y = x + 0.0, y + 0.0
    for digits in range(3, 17):
        a, b = f"{x:.{digits}g}", f"{y:.{digits}g}"
        if float(a) != float(b) and abs((float(a) - float(b)) / (x - y) - 1) < 0.2:
            return a, b
    return repr(x), repr(y)


def listed(values: Tensor) -> str:
    """The first six numbers at most, in brackets."""
    shown = ", ".join(f"{x + 0.0:.6g}" for x in values.detach().flatten()[:6].tolist())
    return f"({shown}{', ...' if values.numel() > 6 else ''})"


def copied(rows: LogProbBatch) -> LogProbBatch:
    """A copy of the rows that shares no memory, to compare with afterwards."""
    tensors: dict[str, Any] = {
        name: value.detach().clone() for name, value in vars(rows).items() if torch.is_tensor(value)
    }
    columns = {f.name: getattr(rows.labels, f.name).clone() for f in fields(rows.labels)}
    return replace(rows, **tensors, labels=replace(rows.labels, **columns))


def changed(before: LogProbBatch, after: LogProbBatch) -> str | None:
    """Which field of the rows was changed in place, in words; else None."""
    now = vars(after) | vars(after.labels)
    for name, one in (vars(before) | vars(before.labels)).items():
        other = now[name]
        if torch.is_tensor(one) and not (one.shape == other.shape and bool(((one == other) | (one != one)).all())):
            return f"{name} of the rows was {listed(one)}, is {listed(other)} after the call: changed in place"
    return None
