"""The precision of an evaluation's passes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from halos_pl.data.example import DataError
from halos_pl.training.named_model import NamedModel

#: The Trainer's names of the precisions that an evaluation can have.
_NAMES = {"None": "32-true", "32": "32-true", "32-true": "32-true", "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed"}


def trained_in(precision: object) -> str | None:
    """``32-true`` or ``bf16-mixed`` for a run's ``trainer.precision``; None for another one."""
    return _NAMES.get(str(precision))


def precision_of(model: NamedModel, wanted: str | None) -> str:
    """``32-true`` or ``bf16-mixed``.

    Args:
        model: the model that is measured.
        wanted: one of these, ``as_trained``, or None for passes in the dtype of the weights, which is ``32-true``.

    Raises:
        DataError: if ``as_trained`` has no meaning for the model, or its training had another precision.
    """
    if wanted != "as_trained":
        return wanted or "32-true"
    if model.run is None:
        raise DataError(
            f"--precision as_trained: {model.name} is not the folder of a run; choose 32-true or bf16-mixed"
        )
    if (name := trained_in(model.precision)) is None:
        raise DataError(
            f"--precision as_trained: the run {model.name} was trained in {model.precision}, in which it cannot be"
            " measured; choose 32-true or bf16-mixed"
        )
    return name


def computing_in(precision: str) -> AbstractContextManager[object]:
    """A context in which passes have this precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=precision != "32-true")
