"""Hides missing figures from loggers and the progress bar.

A step without rows of some class has no mean for that class. The module then logs NaN, because Lightning would
otherwise repeat an earlier step's value. The NaN has no other use, and some loggers reject it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Trainer


class _Numbers:
    """A logger's ``log_metrics``, called without NaNs; not called if no figure is left."""

    def __init__(self, log_metrics: Callable[..., Any]) -> None:
        self.log_metrics = log_metrics

    def __call__(self, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        kept = _numbers(metrics)
        if kept or not metrics:
            self.log_metrics(kept, *args, **kwargs)


class _Shown:
    """A progress bar's ``get_metrics``, without NaNs."""

    def __init__(self, get_metrics: Callable[..., dict[str, Any]]) -> None:
        self.get_metrics = get_metrics

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _numbers(self.get_metrics(*args, **kwargs))


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not (isinstance(value, float) and value != value)}


def keep_out_absent(trainer: Trainer) -> None:
    """Keeps NaNs from the loggers and the progress bar of ``trainer``; a second call does nothing."""
    for logger in trainer.loggers:
        if not isinstance(logger.log_metrics, _Numbers):
            logger.log_metrics = _Numbers(logger.log_metrics)  # type: ignore[method-assign]
    bar: Any = trainer.progress_bar_callback
    if bar is not None and not isinstance(bar.get_metrics, _Shown):
        bar.get_metrics = _Shown(bar.get_metrics)
