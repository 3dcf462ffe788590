"""LightningCLI over the module and the DataModule: fit, validate, test and predict, with one folder a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from halos_pl.cli.checked_settings import (
    check_length,
    check_loggers,
    check_nulls,
    check_numbers,
    check_settings,
    refused_trainer,
    settings_of,
)
from halos_pl.cli.configs import config_files, expanded, refuse_moved
from halos_pl.cli.errors import RunError, user_errors
from halos_pl.cli.held_lines import HeldLines
from halos_pl.cli.help_page import COMMANDS, EPILOG
from halos_pl.cli.parser import HalosParser
from halos_pl.cli.refused_callbacks import refused_callback
from halos_pl.cli.swapped_class import LateDefaults, say_swaps
from halos_pl.common.wrong_value import naming_keys
from halos_pl.data import FeedbackDataModule
from halos_pl.policy.loading import check_lora
from halos_pl.run_dir import CONFIG, LAST, PREVIOUS
from halos_pl.training.callbacks import (
    PredictionWriter,
    RunReport,
    SaveRunConfig,
    check_run_dir,
    named_run_dir,
)
from halos_pl.training.checkpoint import (
    LastCheckpoint,
    find_checkpoint,
    read_checkpoint,
    refuse_code,
)
from halos_pl.training.ending import NotingTrainer
from halos_pl.training.log_config import LogConfig
from halos_pl.training.module import HALOModule, check_trainer
from halos_pl.training.monitors import check_monitors, say_unused
from halos_pl.training.progress import Progress
from halos_pl.training.resume import KeepSettings
from halos_pl.training.run_log import RunCSVLogger
from halos_pl.training.stop_at_step import AgreedSignals, StopAtStep

#: Errors that a user can fix.
USER_ERRORS = user_errors()

_GROUP_CLASSES: dict[str, Any] = {
    "data": FeedbackDataModule,
    "model": HALOModule,
    "checkpoint": LastCheckpoint,
    "progress": Progress,
}


class TrainerParser(HalosParser, LateDefaults):
    """The parser of a command of Lightning's Trainer."""


class HalosCLI(LightningCLI):
    """LightningCLI over :class:`HALOModule` and :class:`FeedbackDataModule`, with one folder per run.

    Everything a run writes is in ``run_dir``: the resolved config, checkpoints, metrics, a summary, plots.
    ``--ckpt_path last`` means that folder's last checkpoint, and is an error where there is none. A new fit
    into a folder that holds a run already moves that run aside instead of writing into it. Only one fit at a time
    writes to a folder, also where several machines share it.

    A fit that is told to stop by Ctrl-C, SIGTERM or another signal saves a checkpoint when its step is done, says how
    to go on, and exits with 128 plus the signal's number; see :mod:`halos_pl.common.stopping`.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True) -> None:
        self._words, self._runs = expanded(sys.argv[1:] if args is None else args), run
        self._held = HeldLines()
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
                "description": "Align language models with human-aware losses.",
                "epilog": EPILOG,
                **({name: {"description": COMMANDS[name]} for name in self.subcommands()} if run else {}),
            },
            parser_class=TrainerParser,
            auto_configure_optimizers=False,
            trainer_class=NotingTrainer,
            args=self._words,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was asked for; all of them where none is, for the help. Each one's parser takes a while."""
        known = LightningCLI.subcommands()
        asked = self._words[0] if self._words else None
        return {asked: known[asked]} if asked in known else known

    @property
    def _own(self) -> Any:
        """The config of the command, or, where none is run, of what a fit would be."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/latest", help="Folder of everything this run writes.")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_class_arguments(Progress, "progress")
        if not self._runs:  # what a run's config.yaml holds besides, as an argument of its command
            for name in ("ckpt_path", "weights_only"):
                parser.add_argument(f"--{name}", default=None)

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise RunError(f"seed_everything is {self._own.seed_everything}: it must be 0 to {2**32 - 1}") from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: our checkpoints hold no hyper-parameters; ``config.yaml`` does."""

    def before_instantiate_classes(self) -> None:
        config = self._own
        say_swaps(self._words, config_files(self._words), config)
        check_settings(config.trainer)
        for name, kind in _GROUP_CLASSES.items():
            check_nulls(kind, settings_of(config.get(name)), name)
        check_numbers({key: value for key, value in settings_of(config.model).items() if key != "optimizer"}, "model")
        check_loggers(config.trainer.logger)
        if said := refused_callback(config.trainer.callbacks, config.model.policy.dtype, config.trainer.precision):
            raise RunError(said)
        run_dir = named_run_dir(config.run_dir)
        config.run_dir = str(run_dir)
        if any(str(word).startswith("--trainer.default_root_dir") for word in self._words):
            rank_zero_warn(f"halos: trainer.default_root_dir has no effect: all files go to run_dir, {run_dir}")
        config.trainer.default_root_dir = str(run_dir)
        if self.subcommand == "fit" and getattr(rank_zero_only, "rank", 0) == 0:
            given = config.get("ckpt_path")
            inside = given and (given == "last" or Path(given).resolve().is_relative_to(run_dir.resolve()))
            check_run_dir(run_dir, goes_on=bool(inside))
        if self.subcommand not in ("fit", None) and not config.get("ckpt_path"):
            refuse_moved(self._words, run_dir)
            if any(os.path.lexists(run_dir / name) for name in (LAST, PREVIOUS)):
                rank_zero_info(f"halos: {self.subcommand} takes {run_dir / LAST}; --ckpt_path names another one")
                config.ckpt_path = "last"
            else:
                rank_zero_info(
                    f"halos: {self.subcommand} takes the policy as it is before training, since {run_dir} holds no"
                    " checkpoint"
                )
        refuse_code(config.get("weights_only"))
        if config.get("ckpt_path"):
            # Looked at now: what is wrong with it is said before data and model are loaded.
            path = find_checkpoint(run_dir, str(config.ckpt_path))
            read_checkpoint(path, resume=self.subcommand == "fit", mmap=True)
            config.ckpt_path = str(path)

    def instantiate_classes(self) -> None:
        with naming_keys(self._own, (*USER_ERRORS, TypeError, ImportError)):
            super().instantiate_classes()

    def _check_measures(self) -> None:
        """Refuses a command that would measure nothing."""
        name = f"limit_{'val' if self.subcommand == 'validate' else self.subcommand}_batches"
        if getattr(self.trainer, name) == 0:
            raise RunError(f"trainer.{name} is 0, so that nothing would be measured")

    before_validate = before_test = before_predict = _check_measures

    def before_fit(self) -> None:
        """Refuses, before data are read, what could not work whatever they are."""
        check_length(self.trainer)
        self.model.check_fit(self.trainer)
        check_lora(self.model.policy_spec)
        check_monitors(self.trainer, self.model, self.datamodule)
        say_unused(self.trainer, self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._own
        given = self._get(self.config_init, "trainer")["logger"]
        if config.trainer.barebones or given is False:
            kwargs["logger"] = False
        else:  # the run's own metrics are kept beside those of any other logger
            others = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
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
        # First, so that the time of a step is without what others do after it, such as writing a checkpoint.
        # KeepSettings comes before what writes this run's config.yaml.
        trainer.callbacks[:0] = [self._held, RunReport(), StopAtStep(), KeepSettings(config.clone().as_dict(), CONFIG)]
        own = [logger for logger in trainer.loggers if isinstance(logger, RunCSVLogger)]
        held = [logger for logger in trainer.loggers if logger not in own] if own else []
        trainer.loggers = own or trainer.loggers
        # Behind what moves an earlier run aside.
        trainer.callbacks += [PredictionWriter(), LogConfig(config.clone().as_dict(), held)]
        trainer._signal_connector = AgreedSignals(trainer)
        check_trainer(trainer)
        return trainer
