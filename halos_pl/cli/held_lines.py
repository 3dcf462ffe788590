"""Holds back the lines that Lightning logs when it creates a Trainer, until work begins.

Errors in options, data or model come before that, and are then the only output.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

#: Lines about devices and the seed.
HELD = re.compile(r"(GPU|TPU|HPU|IPU) available|Seed set to|Trainer will use only|`Trainer\(.*\)` was configured")
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)


class HeldLines(Callback):
    """Holds those lines back, and logs them when training, validation, testing or prediction starts."""

    def __init__(self) -> None:
        self._records: list[tuple[logging.Logger, logging.LogRecord]] = []
        self._filters: list[tuple[logging.Logger, Any]] = []

    def hold(self) -> None:
        """Starts to hold lines back."""
        for name in _LOGGERS:
            logger = logging.getLogger(name)

            def keep(record: logging.LogRecord, logger: logging.Logger = logger) -> bool:
                if not HELD.search(record.getMessage()):
                    return True
                self._records.append((logger, record))
                return False

            logger.addFilter(keep)
            self._filters.append((logger, keep))

    def release(self, *, write: bool) -> None:
        """Stops holding lines back, and logs or drops the held ones."""
        for logger, keep in self._filters:
            logger.removeFilter(keep)
        records, self._filters, self._records = self._records, [], []
        for logger, record in records if write else ():
            logger.handle(record)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.release(write=True)

    on_validation_start = on_test_start = on_predict_start = on_fit_start
