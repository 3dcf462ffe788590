"""Where a killed run resumes, and with which settings: the only module that knows how Lightning counts progress.

A batch is a function of (seed, epoch, step), so an exact resumption needs the right epoch and step, but no state of
the data loader.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from halos_pl.training.optim import Change
from halos_pl.training.settings import (
    Settings,
    aside,
    changes,
    described,
    differing,
    environment,
    flat,
    of_file,
    of_trainer,
    refused,
    same_weights,
)


def finished_progress(fit_loop: dict[str, Any]) -> tuple[int, int]:
    """Reads epoch and step from a checkpoint's loop state, and corrects what Lightning 2.6 would miscount.

    From a checkpoint written after an epoch's last step, but before the epoch is closed, Lightning 2.6 enters the next
    epoch without counting it, and that epoch is lost. Such a state is rewritten to its meaning: the epoch is over, the
    next has not begun.

    Conversely, a fit that ``max_steps`` ends within an epoch closes that epoch. Such a state is rewritten to leave the
    epoch open, so that a longer fit continues with the rest of its rows.

    A run of several ranks that was stopped before an epoch's first step would lose that step. Its epoch has not begun.

    Within an epoch, the state is rewritten to the one after a step and its validation, if any was due: Lightning would
    count the step twice if it was saved after its validation. A run that was stopped during a validation repeats that
    validation before it trains.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``; changed in place.

    Returns:
        The epoch (from 0) and the number of its steps taken.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    begun = epochs["current"]["ready"]
    evaluations = fit_loop["epoch_loop.val_loop.batch_progress"]["total"]
    validating = evaluations["ready"] > evaluations["processed"]  # Lightning validates first, then trains
    between = begun > 0 and not batches["current"]["ready"]
    begun -= between
    if not between and (validating or not batches["is_last_batch"]):
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] = counts["completed"] = max(counts["ready"] - 1, 0)
        if not validating:
            # The step and its validation are over; Lightning would count a step when it skips the validation.
            for key in ("total", "current"):
                batches[key]["completed"] = max(batches[key]["ready"] - 1, 0)
            fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(batches["total"]["ready"] - 1, 0)
        # An epoch that lacks only its last validation has no steps left.
        return max(begun - 1, 0), 0 if batches["is_last_batch"] else batches["current"]["ready"]
    for key in ("total", "current"):
        epochs[key] = dict.fromkeys(epochs[key], epochs[key]["ready"] - between)
    steps = batches["total"]["ready"]
    batches["total"] = dict.fromkeys(batches["total"], steps)
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for counts in (fit_loop["epoch_loop.scheduler_progress"], *optimizer.values()):
        # The epoch's counts, which nothing resets under max_steps.
        counts["current"] = dict.fromkeys(counts["current"], 0)
    return begun, 0


def align_logged_step(trainer: Trainer) -> None:
    """Logs the next batch under the number of optimizer steps before it.

    Lightning counts logged steps separately. When a run resumes at an epoch's end under ``max_steps``, 2.6 runs its
    loop once without a batch and counts that, so every later step number would be one too high.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class Record:
    """The settings of a run, as its checkpoints store them, and their changes on resumption.

    Args:
        arguments: arguments of the LightningModule.

    Attributes:
        config: the resolved config, if any; it includes arguments that objects do not keep.
        start: a sample of the policy's weights before training.
        changes: the settings that this resumption changes.
        history: one entry for each resumption that changed something: its step, the settings, the environment.
    """

    def __init__(self, **arguments: Any) -> None:
        self.module: Settings = flat({"model": described(arguments)})
        self.config: Settings | None = None
        self.start: torch.Tensor | None = None
        self.changes: list[Change] = []
        self.history: list[dict[str, Any]] = []
        self._moved: list[Change] = []

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """The record for a checkpoint, in types that ``torch.load(weights_only=True)`` accepts."""
        return {
            "module": self.module | of_trainer(trainer),
            "config": self.config,
            "start": self.start,
            "environment": environment(trainer),
            "history": self.history,
        }

    def compare(self, checkpoint: Mapping[str, Any], trainer: Trainer, *, start_matters: bool) -> None:
        """Refuses changes that a run resumed from ``checkpoint`` cannot make, and records the others.

        Args:
            checkpoint: the checkpoint as saved.
            trainer: this run's Trainer.
            start_matters: whether the policy's initial weights are still used, below an adapter or as reference.

        Raises:
            ValueError: naming each such setting with both values.
        """
        fitting = trainer.state.fn == TrainerFn.FITTING
        saved = checkpoint.get("settings")
        if saved is None:
            # Fall back on the config.yaml of its folder, which may have been edited since.
            saved = {"config": aside(of_file(Path(str(trainer.ckpt_path)).parent.parent / "config.yaml"), wanted=False)}
            how = "compared only with the config.yaml of its folder" if saved["config"] else "not compared"
            rank_zero_info(
                f"halos: {trainer.ckpt_path} is from an older version and has no record of its settings, so this run's"
                f" are {how}"
            )
        now = self.module | of_trainer(trainer)
        changed = changes(saved, now, self.config)
        if wrong := refused(changed, fitting=fitting):
            named = "; ".join(f"{c.key} is {_short(c.now)}, and was {_short(c.before)}" for c in wrong)
            raise ValueError(
                f"{trainer.ckpt_path} was trained with other settings: {named}. Restore them to resume, or start a new"
                " run"
            )
        start = saved.get("start")
        if start_matters and start is not None and self.start is not None and not same_weights(start, self.start):
            was, path = saved["module"]["model.policy.path"], self.module["model.policy.path"]
            raise ValueError(
                f"model.policy.path: the weights in {path} differ from those in {was} that {trainer.ckpt_path} started"
                " from; name the latter, or start a new run"
            )
        if fitting:
            self.changes = changed
            self.history = list(saved.get("history", ()))
            here, there = environment(trainer), saved.get("environment", {})
            self._moved = [Change(k, there[k], v) for k, v in here.items() if k in there and there[k] != v]
        elif harmless := refused(changed, fitting=True):  # they change only how the model is measured
            rank_zero_info(f"halos: these settings differ from those of the training: {_listed(harmless)}")

    def add(self, further: Sequence[Change]) -> None:
        """Records further changes."""
        recorded = {change.key for change in self.changes}
        self.changes += [change for change in further if change.key not in recorded]

    def say(self, trainer: Trainer) -> None:
        """Reports the changes of a resumption, and keeps them for the run's checkpoints and its summary."""
        if self.changes:
            rank_zero_info(f"halos: settings changed from step {trainer.global_step} on: {_listed(self.changes)}")
        if self._moved:
            rank_zero_info(
                f"halos: resumed in another environment ({_listed(self._moved)}): equal to an uninterrupted run up to"
                " rounding, not bit for bit"
            )
        if self.changes or self._moved:
            entry = {"step": trainer.global_step}
            for name, part in (("changed", self.changes), ("environment", self._moved)):
                entry[name] = {change.key: [change.before, change.now] for change in part}  # type: ignore[assignment]
            self.history.append(entry)
        self.changes, self._moved = [], []


def _short(value: Any) -> str:
    return "null" if value is None else str(value).removeprefix("value_functions.").removeprefix("halos_pl.")


def _listed(changes: Sequence[Change]) -> str:
    return "; ".join(map(str, changes))


class KeepSettings(Callback):
    """Adds a run's config to the record of its settings, and keeps the config.yaml that a resumption replaces.

    Args:
        config: the resolved config, in plain types.
        name: name of the config file in the run's folder.
    """

    def __init__(self, config: dict[str, Any], name: str) -> None:
        self._config, self._name = flat(described(config)), name
        self._arguments: list[tuple[Callback, dict[str, Any]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        record = getattr(pl_module, "record", None)
        if record is not None:
            record.config = aside(self._config, wanted=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves callbacks' arguments, as loading a state overwrites some, such as EarlyStopping's patience."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            arguments = inspect.signature(type(callback)).parameters.keys()
            named = arguments & callback.state_dict().keys() & vars(callback).keys()
            self._arguments.append((callback, {name: getattr(callback, name) for name in named}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores callbacks' arguments."""
        for callback, arguments in self._arguments:
            vars(callback).update(arguments)
        self._arguments = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports other changes, and copies config.yaml to the first free name: config.1.yaml, config.2.yaml, ..."""
        path = Path(trainer.default_root_dir) / self._name
        if not trainer.is_global_zero or not trainer.ckpt_path or not path.is_file():
            return
        new = differing(aside(of_file(path), wanted=True), aside(self._config, wanted=True))
        if new:
            rank_zero_info(f"halos: also changed, with no effect on training: {_listed(new)}")
        if new or getattr(getattr(pl_module, "record", None), "changes", None):
            number = 1
            while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
                number += 1
            shutil.copyfile(path, kept)
