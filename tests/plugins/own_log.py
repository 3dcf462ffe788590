"""What a user's own callback and logger may do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger


class OwnLog(Callback):
    """Logs in each of the ways that there are; ``own/next`` under the number of the step that comes next."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step - 1
        self.log("own/log", float(step))
        trainer.loggers[0].log_metrics({"own/direct": float(step)}, step=step)
        trainer.loggers[0].log_metrics({"own/next": float(step)}, step=step + 1)
        if step == 2:
            trainer.loggers[0].log_metrics({"own/late": 2.0}, step=step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.log("own/epoch", float(trainer.current_epoch))


class StopAt(Callback):
    """Ends a fit after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


class Recorder(Logger):
    """A logger of another library, with the methods that W&B's has."""

    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.lines: list[tuple[int | None, dict[str, float]]] = []
        Recorder.made.append(self)

    name = version = "recorder"  # type: ignore[assignment]

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]
        self.config.update(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))


class Opened(Logger):
    """A logger that makes its file when it is opened, as TensorBoard's does, and cannot write if that has been moved.

    Args:
        folder: where the file lies.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._path = Path(folder) / "opened"

    name = version = "opened"  # type: ignore[assignment]

    @property
    def experiment(self) -> Path:
        if not self._path.exists():
            self._path.parent.mkdir(parents=True)
            self._path.write_text("")
        return self._path

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self._path.open("r+") as file:
            file.write("written")
