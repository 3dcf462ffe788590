"""Data: sources, validation, tokenising, transforms, mismatched rows, and the DataModule."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halos_pl.data.datamodule import FeedbackDataModule
    from halos_pl.data.example import DataError, Example
    from halos_pl.data.source import Source

__all__ = ["DataError", "Example", "FeedbackDataModule", "Source"]

# Where each name lives. Imported on first use, because the DataModule loads Lightning, which takes seconds.
_HOME_OF = {"DataError": "example", "Example": "example", "FeedbackDataModule": "datamodule", "Source": "source"}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"halos_pl.data.{_HOME_OF[name]}"), name)
    raise AttributeError(f"halos_pl.data has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
