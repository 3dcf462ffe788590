"""Human-aware losses as compositions of independent plug-ins, trained with PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halos_pl.batch import Labels, LogProbBatch, Needs, TokenBatch
    from halos_pl.conformance import check_halo
    from halos_pl.data import FeedbackDataModule
    from halos_pl.objective.build import build_objective, load_objective
    from halos_pl.objective.halo import HALO, Objective, Sum
    from halos_pl.objective.reference_points import Estimate
    from halos_pl.training.module import HALOModule

__all__ = [
    "HALO",
    "Estimate",
    "FeedbackDataModule",
    "HALOModule",
    "Labels",
    "LogProbBatch",
    "Needs",
    "Objective",
    "Sum",
    "TokenBatch",
    "build_objective",
    "check_halo",
    "load_objective",
]
__version__ = "0.1.0"

# Imported on first use: an objective over plain tensors loads neither transformers nor Lightning.
_HOMES = {
    "batch": ("Labels", "LogProbBatch", "Needs", "TokenBatch"),
    "conformance": ("check_halo",),
    "data": ("FeedbackDataModule",),
    "objective.build": ("build_objective", "load_objective"),
    "objective.halo": ("HALO", "Objective", "Sum"),
    "objective.reference_points": ("Estimate",),
    "training.module": ("HALOModule",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"halos_pl.{home}"), name)
    from halos_pl.common.renamed import renamed

    new = renamed(name, __all__)
    hint = f"did you mean {new}?" if new else f"it has {', '.join(__all__)}"
    raise AttributeError(f"halos_pl has no {name!r}; {hint}")
