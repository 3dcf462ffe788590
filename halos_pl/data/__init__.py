"""Data: sources, validation, tokenising, transforms, mismatched rows, and the DataModule."""

from halos_pl.data.datamodule import FeedbackDataModule
from halos_pl.data.example import DataError, Example
from halos_pl.data.source import Source

__all__ = ["DataError", "Example", "FeedbackDataModule", "Source"]
