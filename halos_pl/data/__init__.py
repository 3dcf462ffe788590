"""Data: files, validation, tokenising, mismatched rows, and the DataModule."""

from halos_pl.data.datamodule import FeedbackDataModule
from halos_pl.data.read import DataError, Example, read_files

__all__ = ["DataError", "Example", "FeedbackDataModule", "read_files"]
