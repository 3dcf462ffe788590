"""Refuses wrong settings of a Trainer command before data or model are loaded, and names the fix."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.device_parser import _select_auto_accelerator
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from halos_pl.cli.errors import RunError
from halos_pl.common.refused_settings import settings_of
from halos_pl.common.type_words import near, shown
from halos_pl.common.wrong_value import misfit
from halos_pl.training.checks import refused_strategy
from halos_pl.training.log_config import missing_package

# Variables by which launchers tell a process about the others.
LAUNCHERS = {"MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LSB_JOBID"}


def check_length(trainer: Any) -> None:
    """Refuses a fit without steps, or without an end.

    Raises:
        RunError: names the setting.
    """
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise RunError(f"trainer.{name} is 0, so nothing would be trained")
    for what in ("steps", "epochs"):
        least, most = getattr(trainer, f"min_{what}") or 0, getattr(trainer, f"max_{what}")
        if most is not None and 0 <= most < least:
            raise RunError(
                f"trainer.min_{what} is {least}, but trainer.max_{what} is {most}; raise the latter or lower the former"
            )
    if trainer.loggers and trainer.log_every_n_steps < 1:
        raise RunError(
            f"trainer.log_every_n_steps is {trainer.log_every_n_steps}, so metrics.csv would stay empty; it must"
            " be at least 1. --trainer.logger false turns logging off"
        )
    if trainer.val_check_interval == 0:
        raise RunError(
            "trainer.val_check_interval is 0; it takes steps, or a share of an epoch above 0."
            " --trainer.limit_val_batches 0 turns validation off"
        )
    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        raise RunError(
            "the fit has no number of steps, which model.lr_schedule and model.warmup_ratio depend on; set"
            " trainer.max_steps or trainer.max_epochs (trainer.max_time may end it sooner)"
        )


def check_settings(trainer: Any) -> None:
    """Refuses settings that would break, or that Lightning refuses late and with unhelpful advice.

    Raises:
        RunError: names the setting, the reason and the alternative.
    """
    strategy = trainer.strategy
    if isinstance(strategy, str):
        _check_inline(strategy)
    if why := refused_strategy(strategy if isinstance(strategy, str) else strategy.class_path):
        raise RunError(why)
    if trainer.num_nodes > 1 and not LAUNCHERS & os.environ.keys():
        raise RunError(
            f"trainer.num_nodes is {trainer.num_nodes}, but no launcher has given the address of the other nodes. Start"
            " a process on each node with torchrun or srun, or set MASTER_ADDR and NODE_RANK"
        )
    if trainer.overfit_batches:
        raise RunError(
            f"trainer.overfit_batches is {trainer.overfit_batches}: Lightning would replace the sampler, which chooses"
            " the rows of a step. Use --trainer.limit_train_batches, more --trainer.max_epochs and --data.shuffle false"
        )
    check_time(trainer.max_time)
    if trainer.enable_checkpointing is False or trainer.barebones:
        raise RunError(
            "a run always keeps checkpoints/last.ckpt, to resume from; --trainer.enable_checkpointing false and"
            " --trainer.barebones true are not supported. --checkpoint.every_n_steps 1000000 writes it at the end only"
        )


def _check_inline(strategy: str) -> None:
    """Refuses a class with settings that do not fit it: an option that takes names too keeps them as one text.

    Raises:
        RunError: names the setting at fault.
    """
    with suppress(yaml.YAMLError):
        value = yaml.safe_load(strategy)
        if isinstance(value, dict) and (fault := misfit("trainer.strategy", Strategy, value)):
            raise RunError(str(fault))


def check_mixed_float16(trainer: Any) -> None:
    """Refuses mixed precision in float16 on a CPU, for which Lightning would take bfloat16 instead.

    Raises:
        RunError: names the setting and the alternatives.
    """
    accelerator = _select_auto_accelerator() if trainer.accelerator == "auto" else trainer.accelerator
    if str(trainer.precision) in ("16", "16-mixed") and accelerator == "cpu":
        raise RunError(
            f"trainer.precision is {trainer.precision}, which needs a GPU, but this run is on a CPU; choose bf16-mixed"
            " or 32-true"
        )


def check_time(max_time: Any) -> None:
    """Refuses an invalid or negative ``trainer.max_time``, for which Lightning would blame the accelerator.

    Raises:
        RunError: names the value and the right format.
    """
    if max_time is None:
        return
    form = "a text in quotes, DD:HH:MM:SS, or a mapping such as {hours: 12}"
    try:
        duration = dict(settings_of(max_time)) if isinstance(max_time, Mapping | Namespace) else max_time
        length = Timer(duration).time_remaining()
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise RunError(f"trainer.max_time is {shown(max_time)}; it takes {form}") from error
    if length is not None and length < 0:
        raise RunError(f"trainer.max_time is {shown(max_time)}, which is negative; it takes {form}")


def check_loggers(loggers: Any) -> None:
    """Refuses a logger whose package is not installed.

    Args:
        loggers: parsed value of ``trainer.logger``.

    Raises:
        RunError: names the package to install.
    """
    for number, logger in enumerate(loggers if isinstance(loggers, list) else [loggers]):
        path = logger.get("class_path") if isinstance(logger, Namespace) else None
        if missing := missing_package(str(path)):
            raise RunError(f"trainer.logger{f'[{number}]' if isinstance(loggers, list) else ''}: {missing}")


# Settings of the hardware, with the value that leaves each to Lightning.
_MACHINE = {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto", "precision": None}


def refused_trainer(error: Exception, config: Any) -> str:
    """One line on the options of a Trainer that caused an error, and why."""
    reason = " ".join(str(error).split())
    settings = {name: value for name, value in settings_of(config).items() if value is not None}
    blamed = [name for name in settings if re.search(rf"\b{name}\b", reason)]
    blamed = [name for name in blamed if settings[name] != _MACHINE.get(name)]
    if not blamed:  # the message may contain only the value
        blamed = [name for name, value in settings.items() if isinstance(value, str) and repr(value) in reason]
        blamed = [name for name in blamed if name not in _MACHINE]
    if not blamed:
        blamed = [name for name in _MACHINE if name in settings and settings[name] != _MACHINE[name]]
    here = ", ".join(name for name in AcceleratorRegistry if AcceleratorRegistry[name]["accelerator"].is_available())
    strategies = [name for name in StrategyRegistry.available_strategies() if not refused_strategy(name)]
    names = {"accelerator": ["gpu", *AcceleratorRegistry], "strategy": strategies}
    parts = []
    for name in blamed:
        guess = near(settings[name], names.get(name, ()))
        guess = f" (did you mean {guess}?)" if guess not in ("", settings[name]) else ""
        parts.append(f"trainer.{name} is {shown(settings[name])}{guess}")
    has = f"; this machine has: {here}" if {"accelerator", "devices"} & {*blamed} else ""
    return f"{' and '.join(parts) or 'trainer'}: {reason.rstrip('.!')}{has}"
