"""The progress of a fit: a bar on a terminal, occasional plain lines in a file or a pipe."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, TQDMProgressBar

from halos_pl.common.progress import clock, is_terminal
from halos_pl.training.ending import planned_steps

#: Metrics of the progress bar that tell nothing about learning.
_TECHNICAL = ("v_num", "TFLOP/s", "of_matmul")


def _listed(figures: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return f"{value:,.0f}" if isinstance(value, float) and abs(value) >= 1000 else f"{value:.4g}"

    return ", ".join(f"{name} {shown(v)}" for name, v in figures.items() if isinstance(v, int | float))


class Progress(TQDMProgressBar):
    """Counts the optimizer steps of the whole run: in a bar on a terminal, in plain lines elsewhere.

    Args:
        every_n_steps: number of steps between two lines, without a terminal; null prints about 50 lines per run, and at
            least one every ``max_seconds``.
        max_seconds: maximum seconds between two lines, without a terminal or ``every_n_steps``.

    Raises:
        ValueError: if a number is out of range.
    """

    LINES = 50

    def __init__(self, every_n_steps: int | None = None, max_seconds: float = 30.0) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"progress.every_n_steps is {every_n_steps}; it must be at least 1, or null")
        if not max_seconds > 0:
            raise ValueError(f"progress.max_seconds is {max_seconds}; it must be above 0")
        self.every_n_steps, self.max_seconds = every_n_steps, max_seconds
        self._terminal = is_terminal(sys.stdout)
        self._planned: int | None = None
        self._first = 0
        self._began = self._printed = time.monotonic()

    @property
    def is_enabled(self) -> bool:
        return self._terminal and super().is_enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar; just prints without one."""
        if self._terminal:
            super().print(*args, **kwargs)
        elif self._enabled:
            print(*args, **kwargs)

    # -- training -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._planned, self._first = planned_steps(trainer), trainer.global_step
        self._began = self._printed = time.monotonic()
        self.train_progress_bar = bar = self.init_train_tqdm()
        if not bar.disable:
            bar.total, bar.initial, bar.n = self._planned, self._first, self._first

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, bar = trainer.global_step, self.train_progress_bar
        if self.is_enabled:
            if self._should_update(step, self._planned or 0):
                bar.n = step
                bar.bar_format = self.BAR_FORMAT.replace("{remaining}", self._left(trainer))
                bar.set_postfix(self._figures(trainer, pl_module))
        elif self._enabled and self._due(step):
            figures = self._figures(trainer, pl_module)
            spent = clock(time.monotonic() - self._began)
            total = f"/{self._planned}" if self._planned else ""
            where = f"step {step}{total}, epoch {trainer.current_epoch}"
            self._print_line(f"{where}: {_listed(figures)}; {spent} so far, {self._left(trainer)} left")

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k not in _TECHNICAL}

    def _due(self, step: int) -> bool:
        """Whether to print a line after ``step`` steps; always after the first and the last step of this fit."""
        if step in (self._first + 1, self._planned):
            return True
        if self.every_n_steps:
            return step % self.every_n_steps == 0
        often = bool(self._planned) and step % math.ceil(self._planned / self.LINES) == 0  # type: ignore[operator]
        return often or time.monotonic() - self._printed >= self.max_seconds

    def _left(self, trainer: Trainer) -> str:
        """The remaining time of the fit at the rate so far, including validations, or until its ``max_time``."""
        taken, ends = trainer.global_step - self._first, []
        if self._planned is not None and taken:
            ends.append((time.monotonic() - self._began) / taken * (self._planned - trainer.global_step))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
                ends.append(max(0.0, left))
        return clock(min(ends)) if ends else "?"

    # -- evaluation -----------------------------------------------------------------------------------

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_validation_batch_end(trainer, *args, **kwargs)
        self._batch("validation", args[3], self.total_val_batches_current_dataloader)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_test_batch_end(trainer, *args, **kwargs)
        self._batch("test", args[3], self.total_test_batches_current_dataloader)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_predict_batch_end(trainer, *args, **kwargs)
        self._batch("predict", args[3], self.total_predict_batches_current_dataloader)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._enabled and not self._terminal and trainer.state.fn == "fit" and not trainer.sanity_checking:
            figures = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            names = ("val/loss", "val/rewards/margins", "val/rewards/accuracies")
            shown: dict[str, Any] = {name: figures[name] for name in names if name in figures}
            self._print_line(f"validation after step {trainer.global_step}: {_listed(shown)}")

    def _batch(self, what: str, index: int, total: float) -> None:
        if self._enabled and not self._terminal and time.monotonic() - self._printed >= self.max_seconds:
            self._print_line(f"{what}: batch {index + 1}" + (f"/{total:.0f}" if math.isfinite(total) else ""))

    def _print_line(self, line: str) -> None:
        self._printed = time.monotonic()
        print(line, flush=True)
