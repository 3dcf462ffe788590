"""LightningCLI for module and DataModule: fit, validate, test and predict, with one folder per run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from halos_pl.cli.checked_settings import (
    check_length,
    check_loggers,
    check_mixed_float16,
    check_settings,
    refused_trainer,
)
from halos_pl.cli.class_names import prefer_torch
from halos_pl.cli.configs import config_files, expanded, placed, refuse_moved
from halos_pl.cli.errors import RunError, described, user_errors
from halos_pl.cli.held_lines import HeldLines
from halos_pl.cli.help_page import COMMANDS, EPILOG
from halos_pl.cli.parser import HalosParser
from halos_pl.cli.refused_callbacks import refused_callback
from halos_pl.cli.swapped_class import LateDefaults, say_swaps
from halos_pl.common.refused_settings import check_nulls, check_numbers, naming_keys, settings_of
from halos_pl.data import FeedbackDataModule
from halos_pl.run_dir import CONFIG, LAST, PREVIOUS
from halos_pl.training.callbacks import (
    PredictionWriter,
    RunReport,
    SaveRunConfig,
)
from halos_pl.training.checkpoint import LastCheckpoint
from halos_pl.training.checkpoint_reading import check_checkpoint, refuse_code
from halos_pl.training.checkpoint_search import find_checkpoint
from halos_pl.training.checks import check_trainer
from halos_pl.training.ending import NotingTrainer
from halos_pl.training.log_config import LogConfig
from halos_pl.training.module import HALOModule
from halos_pl.training.monitors import check_monitors, say_unused
from halos_pl.training.progress import Progress
from halos_pl.training.rank_failure import NoteFailure, watch_trainer, watching
from halos_pl.training.resume import KeepSettings
from halos_pl.training.run_folder import check_run_dir, named_run_dir
from halos_pl.training.run_log import RunCSVLogger
from halos_pl.training.sample_completions import SampleCompletions as SampleCompletions  # found by its name
from halos_pl.training.slurm import is_requeued
from halos_pl.training.stop_at_step import AgreedSignals, StopAtStep

#: Errors that a user can fix.
USER_ERRORS = user_errors()

_GROUP_CLASSES: dict[str, Any] = {
    "data": FeedbackDataModule,
    "model": HALOModule,
    "checkpoint": LastCheckpoint,
    "progress": Progress,
}

prefer_torch()


class TrainerParser(HalosParser, LateDefaults):
    """The parser of a Trainer command."""

    words: Sequence[str] = ()
    folder = Path()

    def placed(self, line: str) -> str:
        return placed(line, self.words, self.folder)


class HalosCLI(LightningCLI):
    """LightningCLI for :class:`HALOModule` and :class:`FeedbackDataModule`, with one folder per run.

    A run writes everything into ``run_dir``: the resolved config, checkpoints, metrics, a summary, plots.
    ``--ckpt_path last`` means that folder's last checkpoint, and is an error if there is none. A new fit into the
    folder of an earlier run moves that run aside instead of overwriting it. Only one fit at a time writes to a folder,
    even if several machines share it.

    When Ctrl-C, SIGTERM or another signal stops a fit, it finishes its step, saves a checkpoint, prints how to resume,
    and exits with 128 plus the signal's number; see :mod:`halos_pl.common.stopping`.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True) -> None:
        self._runs, self._held = run, HeldLines()
        with watching(described) if run else nullcontext():
            self._words = expanded(sys.argv[1:] if args is None else args)
            if run:
                self._held.hold()
            try:
                self._start(run)
            finally:
                self._held.release(write=False)

    def _start(self, run: bool) -> None:
        super().__init__(
            HALOModule,
            FeedbackDataModule,
            save_config_callback=SaveRunConfig,
            trainer_defaults={
                "callbacks": [],
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "gradient_clip_val": 10.0,
                "num_sanity_val_steps": 0,
            },
            seed_everything_default=0,
            parser_kwargs={
                "prog": "halos",
                "description": "Align language models with human-aware losses.",
                "epilog": EPILOG,
                **({name: {"description": COMMANDS[name]} for name in self.subcommands()} if run else {}),
            },
            parser_class=type("TrainerParser", (TrainerParser,), {"words": self._words, "folder": Path.cwd()}),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # hyper-parameters are in config.yaml, not in checkpoints
            trainer_class=NotingTrainer,
            args=self._words,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command to run, as building each parser takes a while; all of them for the help."""
        commands = LightningCLI.subcommands()
        command = self._words[0] if self._words else None
        return {command: commands[command]} if command in commands else commands

    @property
    def _config(self) -> Any:
        """The config of the command, or of a fit if none is run."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/latest", help="Folder for all files of this run.")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_class_arguments(Progress, "progress")
        if not self._runs:  # arguments of a command, which a run's config.yaml contains too
            for name in ("ckpt_path", "weights_only"):
                parser.add_argument(f"--{name}", default=None)

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise RunError(f"seed_everything is {self._config.seed_everything}: it must be 0 to {2**32 - 1}") from error

    def _parse_ckpt_path(self) -> None:
        """Does nothing: hyper-parameters are in ``config.yaml``, not in checkpoints."""

    def before_instantiate_classes(self) -> None:
        config = self._config
        say_swaps(self._words, config_files(self._words), config)
        check_settings(config.trainer)
        if self._runs:  # otherwise, the machine that will run may have a GPU
            check_mixed_float16(config.trainer)
        for name, kind in _GROUP_CLASSES.items():
            check_nulls(kind, settings_of(config.get(name)), name)
        check_numbers({key: value for key, value in settings_of(config.model).items() if key != "optimizer"}, "model")
        check_loggers(config.trainer.logger)
        if why := refused_callback(config.trainer.callbacks, config.model.policy.dtype, config.trainer.precision):
            raise RunError(why)
        run_dir = named_run_dir(config.run_dir)
        config.run_dir = str(run_dir)
        if any(str(word).startswith("--trainer.default_root_dir") for word in self._words):
            rank_zero_warn(f"halos: trainer.default_root_dir has no effect: all files go to run_dir, {run_dir}")
        config.trainer.default_root_dir = str(run_dir)
        if self.subcommand == "fit" and is_requeued(run_dir):
            config.ckpt_path = "last"
        if self.subcommand == "fit" and getattr(rank_zero_only, "rank", 0) == 0:
            resumed = config.get("ckpt_path")
            inside = resumed and (resumed == "last" or Path(resumed).resolve().is_relative_to(run_dir.resolve()))
            check_run_dir(run_dir, goes_on=bool(inside))
        if self.subcommand not in ("fit", None) and not config.get("ckpt_path"):
            refuse_moved(self._words, run_dir)
            if any(os.path.lexists(run_dir / name) for name in (LAST, PREVIOUS)):
                rank_zero_info(f"halos: {self.subcommand} uses {run_dir / LAST}; choose another with --ckpt_path")
                config.ckpt_path = "last"
            else:
                rank_zero_info(
                    f"halos: {self.subcommand} uses the policy before training, since {run_dir} has no checkpoint"
                )
        refuse_code(config.get("weights_only"))
        if config.get("ckpt_path"):
            # Checked now, before data and model are loaded.
            path = find_checkpoint(run_dir, str(config.ckpt_path))
            check_checkpoint(path, resume=self.subcommand == "fit", alone=_get_rank() is None)
            config.ckpt_path = str(path)

    def instantiate_classes(self) -> None:
        with naming_keys(self._config, (*USER_ERRORS, TypeError, ImportError)):
            super().instantiate_classes()

    def _check_measures(self) -> None:
        """Refuses a command that would measure nothing."""
        name = f"limit_{'val' if self.subcommand == 'validate' else self.subcommand}_batches"
        if getattr(self.trainer, name) == 0:
            raise RunError(f"trainer.{name} is 0, so nothing would be measured")

    before_validate = before_test = before_predict = _check_measures

    def before_fit(self) -> None:
        """Refuses settings that cannot work with any data, before the data are read."""
        check_length(self.trainer)
        self.model.check_fit(self.trainer)
        self.model.models.check_files()
        check_monitors(self.trainer, self.model, self.datamodule)
        say_unused(self.trainer, self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._config
        loggers = self._get(self.config_init, "trainer")["logger"]
        if config.trainer.barebones or loggers is False:
            kwargs["logger"] = False
        else:  # metrics.csv is written beside any other logger
            others = loggers if isinstance(loggers, list) else [loggers] if isinstance(loggers, Logger) else []
            csv = [RunCSVLogger(config.run_dir)] if self.subcommand == "fit" else []
            kwargs["logger"] = [*csv, *others] or False
        callbacks = self._get(self.config_init, "trainer")["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, self._get(self.config_init, "progress")]
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
            raise RunError(refused_trainer(error, config.trainer)) from error
        # First, so that the time of a step excludes the work of other callbacks, such as writing a checkpoint.
        # KeepSettings must come before SaveRunConfig, which writes config.yaml.
        settings = KeepSettings(config.clone().as_dict(), CONFIG)
        trainer.callbacks[:0] = [NoteFailure(), self._held, RunReport(), StopAtStep(), settings]
        csv_loggers = [logger for logger in trainer.loggers if isinstance(logger, RunCSVLogger)]
        held = [logger for logger in trainer.loggers if logger not in csv_loggers] if csv_loggers else []
        trainer.loggers = csv_loggers or trainer.loggers
        # After the callback that moves an earlier run aside.
        trainer.callbacks += [PredictionWriter(), LogConfig(config.clone().as_dict(), held)]
        trainer._signal_connector = AgreedSignals(trainer)
        check_trainer(trainer)
        if self._runs:
            watch_trainer(trainer, described)
        return trainer
