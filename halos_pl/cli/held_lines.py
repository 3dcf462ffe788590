"""Lines that Lightning writes as soon as a Trainer is made are held back until work begins.

Whatever is wrong with options, data or model is found before that, and an error then stands by itself.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

#: What a machine has, and the seed.
HELD = re.compile(r"(GPU|TPU|HPU|IPU) available|Seed set to|Trainer will use only|`Trainer\(.*\)` was configured")
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)


class HeldLines(Callback):
    """Holds those lines while it is entered, and writes them when training, validation or prediction starts."""

    def __init__(self) -> None:
        self._records: list[tuple[logging.Logger, logging.LogRecord]] = []
        self._filters: list[tuple[logging.Logger, Any]] = []

    def hold(self) -> None:
        """From now on."""
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
        """Ends the holding back, and writes what has been held, or drops it."""
        for logger, keep in self._filters:
            logger.removeFilter(keep)
        records, self._filters, self._records = self._records, [], []
        for logger, record in records if write else ():
            logger.handle(record)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.release(write=True)

    on_validation_start = on_test_start = on_predict_start = on_fit_start
