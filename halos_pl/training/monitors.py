"""Refuses, before training, a callback that monitors a figure the run never logs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from halos_pl.training.ending import epoch_steps, fit_steps
from halos_pl.training.reward_quality import OF_PAIRS, OF_ROWS, is_learned

#: Figures of training steps only.
TRAINING = ("grad_norm", "rows/s", "tokens/s", "TFLOP/s", "of_matmul")
#: Figures of a HALO's training steps only.
OF_SLOPES = ("outcome/rho", "outcome/effective_rows", "outcome/weight_chosen", "outcome/weight_rejected")
#: Names that Lightning's ModelCheckpoint accepts besides logged figures.
COUNTERS = ("epoch", "step")
#: First words of the messages with which Lightning's callbacks give up.
GIVEN_UP = ("Early stopping conditioned on metric", "`ModelCheckpoint(monitor=")


class MonitorError(ValueError):
    """A callback monitors a figure that is never logged."""


def _figures(module: Any, split: Any) -> Iterator[str]:
    """Names of the figures that the rows of a split give; all possible names if it has not been read yet."""
    table = None if split is None else split.table
    chosen = table is None or bool((table.label == 1).any())
    rejected = table is None or bool((table.label == 0).any())
    yield "loss"
    for number, term in enumerate(getattr(module.objective, "terms", ())):
        yield f"loss/{number}_{type(term).__name__}"
    rewards = module.objective.halo is not None or module.objective.needs.reference
    logps = module.objective.needs.policy_logps
    for kind in ("lengths", *(["logps"] if logps else []), *(["rewards"] if rewards else [])):
        yield from (f"{kind}/{name}" for name, there in (("chosen", chosen), ("rejected", rejected)) if there)
    if module.objective.needs.reference and chosen:
        yield "logps/displacement"
    if rewards:
        yield from ("outcome/reward", "rewards/length_correlation")
        if chosen and rejected:
            yield "rewards/margins"
        if table is None or bool((table.pair >= 0).any()):
            yield "rewards/accuracies"
    if module.objective.halo is not None:
        yield from (f"outcome/{name}" for name in ("z0", "u", "value", "gains", "saturation"))
        if module.objective.halo.needs.mismatched and module.objective.halo.needs.reference:
            yield "kl"


def _why_no_validation(trainer: Trainer, data: Any) -> str:
    """Why no validation will run; empty if one will, or may."""
    if not data.sources["validation"]:
        return "data.validation names no data"
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches is 0"
    if "train" not in data._splits or getattr(trainer, "_val_check_time_interval", None) is not None:
        return ""
    batches, interval, every = epoch_steps(trainer, data), trainer.val_check_interval, trainer.check_val_every_n_epoch
    first = int(interval if isinstance(interval, int) else max(1, int(batches * interval)))
    first += batches * ((every or 1) - 1)
    steps = fit_steps(trainer, batches)
    return f"the first validation would come after step {first}, but the run ends at step {steps}" * (first > steps)


def check_interval(trainer: Trainer, data: Any) -> None:
    """Refuses a validation interval longer than an epoch, or one that a callback misreads; the data must be set up.

    Raises:
        ValueError: naming the setting, the length of an epoch and the remedy.
    """
    interval = trainer.val_check_interval
    validates = data.sources["validation"] and trainer.limit_val_batches
    if validates and isinstance(interval, int) and interval == 1:  # equal to 1.0, which is an epoch
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for name in ("check_on_train_epoch_end", "save_on_train_epoch_end"):
                if getattr(callback, f"_{name}", ...) is None and getattr(callback, "monitor", None) is not None:
                    raise ValueError(
                        f"trainer.val_check_interval is 1 step, which {type(callback).__name__} takes for an epoch;"
                        f" set its {name} to false"
                    )
    if not validates or not isinstance(interval, int) or trainer.check_val_every_n_epoch is None:
        return
    if interval > (steps := epoch_steps(trainer, data)):
        raise ValueError(
            f"trainer.val_check_interval is {interval}, but an epoch has {steps} steps; lower it, or count across"
            " epochs with --trainer.check_val_every_n_epoch null"
        )


def say_no_validation(trainer: Trainer, data: Any) -> None:
    """Warns if a fit ends before it has validated once; the data must be set up."""
    if data.sources["validation"] and trainer.limit_val_batches and (why := _why_no_validation(trainer, data)):
        rank_zero_warn(
            f"halos: data.validation is never used: {why}; lower trainer.val_check_interval, or train for longer"
        )


def _foreign(callback: Callback) -> bool:
    return not type(callback).__module__.startswith(("lightning.", "pytorch_lightning.", "halos_pl."))


def check_monitors(trainer: Trainer, module: LightningModule, data: Any) -> None:
    """Compares the figures that callbacks monitor with those that will be logged.

    May be called before the data have been read, and again afterwards. A name that a user's own callback could log
    gives a warning; one under ``val/`` is refused if no validation will run.

    Raises:
        MonitorError: naming the callback, the figure, and similar names.
    """
    objective: Any = module.objective
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    silent = [type(c).__name__ for c in callbacks if isinstance(c, LearningRateMonitor | DeviceStatsMonitor)]
    if silent and not trainer.loggers:
        raise MonitorError(f"{silent[0]} writes to a logger, but trainer.logger is false; set a logger, or remove it")
    monitored = [(c, m) for c in callbacks if isinstance(m := getattr(c, "monitor", None), str)]
    no_validation = _why_no_validation(trainer, data) if monitored else ""
    training = set(_figures(module, data._splits.get("train"))) | set(TRAINING)
    training |= set(OF_SLOPES if objective.halo is not None else ())
    held_out = set(_figures(module, data._splits.get("validation")))
    if {"rewards/chosen", "rewards/rejected"} <= held_out:
        held_out.add("rewards/auroc")
        if is_learned(objective):
            held_out |= {*OF_ROWS, *(OF_PAIRS if "rewards/accuracies" in held_out else ())}
    validated = {f"val/{name}" for name in held_out}
    logged = training | (validated if not no_validation else set())
    for callback, monitor in monitored:
        if monitor in logged or (monitor in COUNTERS and isinstance(callback, ModelCheckpoint)):
            continue
        near = difflib.get_close_matches(monitor, sorted(logged | validated), n=5, cutoff=0.5) or sorted(logged)
        meant = monitor if monitor.startswith("val/") else near[0]
        without = no_validation if meant.startswith("val/") else ""
        if monitor.removeprefix("val/").startswith("outcome/z0_") and objective.halo is not None and not without:
            continue  # reference points choose the names of their diagnostics
        message = (
            f"{type(callback).__name__}.monitor is {monitor!r}, which is never logged"
            + (f": {meant} needs a validation, but {without}" if without else "")
            + f". Figures that are logged{' with one' if without else ''} include {', '.join(near)}"
        )
        if without or not any(map(_foreign, callbacks)):
            raise MonitorError(message)
        rank_zero_warn(f"halos: {message}; the run ends with an error unless your own callback logs it")


def given_up(error: BaseException) -> MonitorError | None:
    """The error with which a monitoring callback of Lightning ended the run, in one line; None for other errors."""
    first = str(error).partition("\n")[0]
    return MonitorError(f"{first} The run has ended") if first.startswith(GIVEN_UP) else None


#: A Trainer's settings of validation, and their defaults.
_VALIDATION = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "limit_val_batches": 1.0}


def say_unused(trainer: Trainer, data: Any) -> None:
    """Warns about validation settings that have no effect."""
    unused = [name for name, default in _VALIDATION.items() if getattr(trainer, name) != default]
    if unused and not data.sources["validation"]:
        names = " and ".join(f"trainer.{name}" for name in unused)
        have = "have" if unused[1:] else "has"
        rank_zero_warn(f"halos: {names} {have} no effect, because data.validation names no data")
