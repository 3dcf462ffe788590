"""Gives loggers a run's resolved config as hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from halos_pl.training.settings import described, flat


class LogConfig(Callback):
    """Gives each logger the resolved config: flat for TensorBoard, whose HPARAMS tab has no tree, nested for others.

    The tab compares runs by figures that must be written together with the hyper-parameters. So TensorBoard gets them
    again when the fit ends or is stopped, with its last figures.

    It also opens the loggers whose files may be in the run's folder. Lightning would open them before an earlier run's
    folder is renamed, and they would write to that one, or fail.

    Args:
        config: the resolved config.
        held: loggers to open.
    """

    def __init__(self, config: dict[str, Any], held: Sequence[Logger] = ()) -> None:
        self._held = [*held]
        self._config: dict[str, Any] = described({k: v for k, v in config.items() if k != "config"})
        self._flat = {k: v for k, v in flat(self._config).items() if v != "given"}  # a placeholder for mappings
        self._began = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs after an earlier run's folder has been renamed, and before Lightning makes the loggers save."""
        if self._held and stage == "fit":
            trainer.loggers = [*trainer.loggers, *self._held]
            # W&B first, as in Lightning.
            for logger in sorted(self._held, key=lambda logger: not isinstance(logger, WandbLogger)):
                _ = getattr(logger, "experiment", None)
            self._held = []
        for logger in trainer.loggers if stage == "fit" else ():
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._flat, metrics={})
            else:
                logger.log_hyperparams(self._config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = {k: v.item() for k, v in trainer.callback_metrics.items() if v.numel() == 1}
        figures = {k: v for k, v in figures.items() if math.isfinite(v)}
        for logger in trainer.loggers if self._began else ():
            if isinstance(logger, TensorBoardLogger) and figures:
                logger.log_hyperparams(self._flat, metrics=figures, step=trainer.global_step - 1)
        self._began = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


#: Packages by Lightning's loggers; each logger needs one of its packages.
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
    "MLFlowLogger": ("mlflow", "mlflow_skinny"),
    "CometLogger": ("comet_ml",),
    "NeptuneLogger": ("neptune", "neptune_scale"),
}


def missing_package(class_path: str) -> str:
    """A sentence with the package to install for a logger; empty if none is missing."""
    name = class_path.rpartition(".")[2]
    packages = PACKAGES.get(name, ())
    if not packages or any(find_spec(package) for package in packages):
        return ""
    return f"{name} needs {packages[0]}, which is not installed; run pip install {packages[0]}"
