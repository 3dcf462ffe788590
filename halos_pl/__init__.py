"""Human-aware losses as compositions of independent plug-ins, trained with PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halos_pl.data import FeedbackDataModule
    from halos_pl.training.module import HALOModule

__all__ = ["FeedbackDataModule", "HALOModule"]
__version__ = "0.1.0"

# Imported on first use, so that an objective over plain tensors does not load transformers and Lightning.
_HOMES = {"HALOModule": "halos_pl.training.module", "FeedbackDataModule": "halos_pl.data"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"halos_pl has no {name!r}; it has {', '.join(__all__)}")
