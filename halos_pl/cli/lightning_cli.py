"""LightningCLI over the module and the DataModule, and the commands that work on what a run left."""

from __future__ import annotations

import contextlib
import difflib
import errno
import inspect
import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from halos_pl.cache import NoHomeError, cache_root
from halos_pl.cli.ablate import ablate, report, status
from halos_pl.cli.cache import clear, info
from halos_pl.cli.export import export
from halos_pl.cli.generate import generate_file
from halos_pl.cli.held_lines import HeldLines
from halos_pl.cli.help_page import COMMANDS, EPILOG
from halos_pl.cli.inspect import inspect_source
from halos_pl.cli.refused_callbacks import refused_callback
from halos_pl.cli.swapped_class import LateDefaults, say_swaps
from halos_pl.common.messages import cause, plain
from halos_pl.common.misplaced import misplaced, read_config
from halos_pl.common.wrong_value import cause_in, imported, known_classes, naming_keys, near, shown
from halos_pl.common.yaml_files import YAMLFileError
from halos_pl.data import DataError, FeedbackDataModule
from halos_pl.evaluation.evaluate import evaluate
from halos_pl.objective.build import place_of
from halos_pl.policy.loading import ModelError, check_lora
from halos_pl.run_dir import CONFIG, LAST, PREVIOUS
from halos_pl.training.callbacks import (
    PredictionWriter,
    RunCSVLogger,
    RunReport,
    SaveRunConfig,
    check_run_dir,
    named_run_dir,
)
from halos_pl.training.checkpoint import (
    LastCheckpoint,
    NonFiniteWeightsError,
    find_checkpoint,
    read_checkpoint,
    refuse_code,
)
from halos_pl.training.checks import check_trainer, unsupported_strategy
from halos_pl.training.ending import NotingTrainer
from halos_pl.training.log_config import LogConfig, missing_package
from halos_pl.training.module import HALOModule
from halos_pl.training.monitors import check_monitors, say_unused
from halos_pl.training.non_finite import NonFiniteLossError
from halos_pl.training.progress import Progress
from halos_pl.training.resume import KeepSettings
from halos_pl.training.stop_at_step import AgreedSignals, StopAtStep

TOOLS: dict[str, Callable[..., None]] = {
    "export": export,
    "generate": generate_file,
    "evaluate": evaluate,
    "ablate status": status,
    "ablate report": report,
    "ablate": ablate,
    "data inspect": inspect_source,
    "cache info": info,
    "cache clear": clear,
    "cache": info,
}


class RunError(RuntimeError):
    """The run's folder does not allow what was asked."""


# What other libraries say to their own developers, not to our users.
NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",
    r".*is_gradient_checkpointing",
    r".*Couldn't infer the batch indices",
    r".*does not have many workers",
    r".*Experiment logs directory",
    r".*dataloader is not resumable",  # it is: a batch is a function of seed, epoch and step
)
# An advertisement; and a reason of stopping that is not the true one after early stopping: RunReport says that.
UNSAID = r"litlogger|`Trainer\.fit` stopped: `max"

# What a user can mend is said in a line; a traceback is for what only we can.
USER_ERRORS = (
    DataError,
    ModelError,
    RunError,
    NonFiniteLossError,
    NonFiniteWeightsError,
    MisconfigurationException,
    OSError,
    ValueError,
)


# How jsonargparse words that there is no such option: of a class or file, of a command in a file, on the command line.
UNKNOWN_OPTION = r"(?:^Option '|does not accept option '|unrecognized arguments: -*)(?P<key>[\w.]+)"


class HalosParser(LateDefaults):
    """Says what there is when the name of a plug-in or of an option is wrong, which jsonargparse does not."""

    def _near(self, key: str) -> str:
        """The options whose names are like ``key``, or all of them where they are few, as of a plug-in."""
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        known = {action.dest for parser in parsers for action in parser._actions} - {"help", "print_shtab"}
        key = re.sub(r"\.(class_path|init_args)\b", "", key)
        near = sorted(known) if len(known) <= 12 else difflib.get_close_matches(key, known, cutoff=0.8)
        return f" There is: {', '.join(near)}." if near else ""

    def format_help(self, *given: Any, **options: Any) -> str:
        """The help with the plug-ins first and the Trainer last; the order of the options stays as it is elsewhere."""
        groups, usage = self._action_groups, self.usage
        own = [list(group._group_actions) for group in groups]
        try:
            if any(action.dest.startswith("trainer.") for action in self._actions):  # a hundred options: no usage
                self.usage = f"{self.prog.replace(' [options]', '')} [--config FILE ...] [--OPTION VALUE ...]"
            for group in groups:
                group._group_actions.sort(key=lambda action: rank(action.dest))
            self.epilog = self.epilog or known_classes(self.description)
            self._action_groups = sorted(groups, key=lambda g: min((rank(a.dest) for a in g._group_actions), default=0))
            return super().format_help(*given, **options)
        finally:
            self._action_groups, self.usage = groups, usage
            for group, actions in zip(groups, own, strict=True):
                group._group_actions[:] = actions

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a class within a value: the option that holds it says what is wrong
            super().error(message, ex)
        said = cause_in(ex)
        said = f"{said}{hidden(said)}" if said else " ".join(cause(message).split())
        command = self.prog.replace(" [options]", "")
        if inside := re.match(r"Subcommand '(\w+)'", message):  # a key of a config file
            command += f" {inside[1]}"
        if missing := re.match(r"the following arguments are required: (?:(\w+)\.)?(.*)", said):
            command += f" {missing[1]}" if missing[1] in LightningCLI.subcommands() else ""
            said = f"{missing[2]} must be given, in a config or on the command line"
        elif word := re.match(r"unrecognized arguments: ([^-\s]\S*)", said):
            said = f"{said}; {misplaced(word[1]) or 'an option begins with --, as in --config FILE'}"
        elif unknown := re.search(UNKNOWN_OPTION, said):
            said = f"{said.rstrip('.')}.{self._near(unknown['key'])} All options: {command} --help"
        elif '"comments" for --print_config' in said:
            said += "; comments need ruamel.yaml: pip install 'ruamel.yaml>=0.18.15'"
        elif "for --print_config" in said:
            said += "; it takes comments, skip_default, skip_null"
        # The usage alone fills a screen, and what went wrong would be below it.
        print(f"{command}: error: {plain(said)}", file=sys.stderr)
        raise SystemExit(2) from ex


# The order of the help: what a run is about comes first.
FIRST = (
    *("help", "config", "print_config", "run_dir", "model.value_function", "model.reference_point", "model.reward"),
    *("model.feedback", "model.reflect_undesirable", "model.policy", "data", "model", "checkpoint", "ckpt_path"),
)


def rank(option: str) -> int:
    """The place of an option in the help."""
    fits = [i for i, name in enumerate(FIRST) if option == name or option.startswith(f"{name}.")]
    last = len(FIRST) + (option.partition(".")[0] == "trainer")
    return min(fits, default=last)


def hidden(message: str) -> str:
    """Which installed module a message is about that hides one of the working folder; nothing where none does."""
    for name in re.findall(r"[A-Za-z_]\w*(?=(?:\.\w+)+)", message):
        file = getattr(sys.modules.get(name), "__file__", None)
        for own in (Path(f"{name}.py"), Path(name, "__init__.py")):
            if file and own.is_file() and own.resolve() != Path(file).resolve():
                return f"; {name} is {file}, which is installed; {own} has the same name: rename it"
    return ""


class HalosCLI(LightningCLI):
    """LightningCLI over :class:`HALOModule` and :class:`FeedbackDataModule`, with one folder per run.

    Everything a run writes is in ``run_dir``: the resolved config, checkpoints, metrics, a summary, plots.
    ``--ckpt_path last`` means that folder's last checkpoint, and is an error where there is none. A new fit
    into a folder that holds a run already moves that run aside instead of writing into it. Only one fit at a time
    writes to a folder, also where several machines share it.

    A fit that is told to stop by Ctrl-C, SIGTERM or another signal saves a checkpoint when its step is done, says how
    to go on, and exits with 128 plus the signal's number; see :mod:`halos_pl.common.stopping`.
    """

    def __init__(self, args: Any = None, *, run: bool = True) -> None:
        self._words, self._runs = sys.argv[1:] if args is None else args, run
        check_files(self._words)
        self._held = HeldLines()
        if run:
            self._held.hold()
        try:
            self._start(args, run)
        finally:
            self._held.release(write=False)

    def _start(self, args: Any, run: bool) -> None:
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
            parser_class=HalosParser,
            auto_configure_optimizers=False,
            trainer_class=NotingTrainer,
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was asked for; all of them where none is, for the help. Each one's parser takes a while."""
        known = LightningCLI.subcommands()
        asked = self._words[0] if isinstance(self._words, list) and self._words else None
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
        for name, kind in GROUP_CLASSES.items():
            check_nulls(kind, _settings(config.get(name)), name)
        check_numbers({key: value for key, value in _settings(config.model).items() if key != "optimizer"}, "model")
        check_loggers(config.trainer.logger)
        if said := refused_callback(config.trainer.callbacks, config.model.policy.dtype, config.trainer.precision):
            raise RunError(said)
        run_dir = named_run_dir(config.run_dir)
        config.run_dir = str(run_dir)
        if any(str(word).startswith("--trainer.default_root_dir") for word in self._words or ()):
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
        check_lora(self.model.models.spec)
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


GROUP_CLASSES: dict[str, Any] = {
    "data": FeedbackDataModule,
    "model": HALOModule,
    "checkpoint": LastCheckpoint,
    "progress": Progress,
}
GROUPS = (*GROUP_CLASSES, "trainer")


def config_files(words: Any) -> list[str]:
    """The config files among a command's words."""
    words = words if isinstance(words, list) else []
    after = [word for flag, word in itertools.pairwise(words) if flag in ("--config", "-c")]
    return [*after, *(word.partition("=")[2] for word in words if word.startswith("--config="))]


def refuse_moved(words: Any, run_dir: Path) -> None:
    """Refuses the config of a run that was moved since, as it names the folder that may hold another run now.

    Raises:
        RunError: naming both folders.
    """
    if any(isinstance(word, str) and word.partition("=")[0] == "--run_dir" for word in words):
        return
    for path in config_files(words):
        own = Path(path).parent
        if Path(path).name == CONFIG and (own / LAST).is_file() and own.resolve() != run_dir.resolve():
            raise RunError(
                f"{path} lies in the folder of a run, but its run_dir is {run_dir}, as it was moved or copied; add"
                f" --run_dir {own} to take that run"
            )


def check_files(words: Any) -> None:
    """Refuses config files that a parser would misread or not understand, by file and line.

    Raises:
        YAMLFileError: naming them.
    """
    for path in config_files(words):
        if Path(path).is_dir():
            raise YAMLFileError(f"--config {path} is a folder; name a file in it")
        if elsewhere := place_of(path):
            raise YAMLFileError(f"--config {path}: no such file (relative to {Path.cwd()}){elsewhere}")
        if not os.path.lexists(path):
            raise YAMLFileError(f"--config {path}: no such file (relative to {Path.cwd()})")
        if Path(path).is_file():  # a pipe can be read only once
            content, lines = read_config(path)
            for key in GROUPS:
                if not isinstance(content.get(key, {}), (dict, str)):
                    said = json.dumps(content[key], default=str)
                    raise YAMLFileError(f"{path}:{lines[(key,)]}: {key} is {said}; it takes a mapping")


# What tells a process of the others.
LAUNCHERS = {"MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LSB_JOBID"}


def check_length(trainer: Any) -> None:
    """Refuses a fit of no step, and one without an end.

    Raises:
        RunError: naming the setting.
    """
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise RunError(f"trainer.{name} is 0, so that nothing would be trained")
    for what in ("steps", "epochs"):
        least, most = getattr(trainer, f"min_{what}") or 0, getattr(trainer, f"max_{what}")
        if most is not None and 0 <= most < least:
            raise RunError(
                f"trainer.min_{what} is {least}, but trainer.max_{what} is {most}; raise the latter or lower the former"
            )
    if trainer.loggers and trainer.log_every_n_steps < 1:
        raise RunError(
            f"trainer.log_every_n_steps is {trainer.log_every_n_steps}, so that metrics.csv would stay empty; it must"
            " be at least 1. --trainer.logger false turns logging off"
        )
    if trainer.val_check_interval == 0:
        raise RunError(
            "trainer.val_check_interval is 0; it takes steps, or a share of an epoch above 0."
            " --trainer.limit_val_batches 0 turns validation off"
        )
    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        raise RunError(
            "nothing limits the steps of the fit, of whose length model.lr_schedule and model.warmup_ratio are shares;"
            " set trainer.max_steps or trainer.max_epochs (trainer.max_time may end it sooner)"
        )


def check_settings(trainer: Any) -> None:
    """Refuses what Lightning would refuse later with advice that leads nowhere, or would break.

    Raises:
        RunError: naming the setting, the reason and what to do instead.
    """
    given = trainer.strategy
    strategy = given if isinstance(given, str) else given.class_path.rpartition(".")[2]
    if re.match(r"fsdp|deepspeed|model_?parallel", strategy, re.IGNORECASE):
        raise RunError(unsupported_strategy(strategy))
    if re.match(r"ddp_(spawn|fork|notebook)", strategy):
        raise RunError(f"trainer.strategy {strategy} is not supported: each rank runs the command itself. Use ddp")
    if trainer.num_nodes > 1 and not LAUNCHERS & os.environ.keys():
        raise RunError(
            f"trainer.num_nodes is {trainer.num_nodes}, but nothing says where the other nodes are, so this one would"
            " wait for them. Start a process on each node with torchrun or srun, or set MASTER_ADDR and NODE_RANK"
        )
    if trainer.overfit_batches:
        raise RunError(
            f"trainer.overfit_batches is {trainer.overfit_batches}: Lightning would replace the sampler, which decides"
            " what a step is. Use --trainer.limit_train_batches, more --trainer.max_epochs, and --data.shuffle false"
        )
    check_time(trainer.max_time)
    if trainer.enable_checkpointing is False or trainer.barebones:
        raise RunError(
            "a run keeps checkpoints/last.ckpt, to go on from; --trainer.enable_checkpointing false and"
            " --trainer.barebones true are not supported. --checkpoint.every_n_steps 1000000 writes it at the end only"
        )


def check_time(given: Any) -> None:
    """Refuses a ``trainer.max_time`` that is none, which Lightning says of the accelerator, or that has passed.

    Raises:
        RunError: naming it, and the form that it takes.
    """
    if given is None:
        return
    form = "a text in quotes, DD:HH:MM:SS, or a mapping such as {hours: 12}"
    try:
        length = Timer(dict(_settings(given)) if isinstance(given, Mapping | Namespace) else given).time_remaining()
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise RunError(f"trainer.max_time is {shown(given)}; it takes {form}") from error
    if length is not None and length < 0:
        raise RunError(f"trainer.max_time is {shown(given)}, a time that has passed; it takes {form}")


def check_loggers(given: Any) -> None:
    """Refuses a logger whose package is not installed.

    Args:
        given: ``trainer.logger``, as parsed.

    Raises:
        RunError: naming what to install.
    """
    for number, logger in enumerate(given if isinstance(given, list) else [given]):
        path = logger.get("class_path") if isinstance(logger, Namespace) else None
        if missing := missing_package(str(path)):
            raise RunError(f"trainer.logger{f'[{number}]' if isinstance(given, list) else ''}: {missing}")


# What a Trainer computes on, and the value that leaves it to Lightning.
_MACHINE = {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto", "precision": None}


def refused_trainer(error: Exception, given: Any) -> str:
    """Which options of a Trainer are at fault, and why, in a line."""
    said = " ".join(str(error).split())
    settings = {name: value for name, value in _settings(given).items() if value is not None}
    blamed = [name for name in settings if re.search(rf"\b{name}\b", said)]
    blamed = [name for name in blamed if settings[name] != _MACHINE.get(name)]
    if not blamed:  # the message may give the value alone
        blamed = [name for name, value in settings.items() if isinstance(value, str) and repr(value) in said]
        blamed = [name for name in blamed if name not in _MACHINE]
    if not blamed:
        blamed = [name for name in _MACHINE if name in settings and settings[name] != _MACHINE[name]]
    here = ", ".join(name for name in AcceleratorRegistry if AcceleratorRegistry[name]["accelerator"].is_available())
    names = {"accelerator": ["gpu", *AcceleratorRegistry], "strategy": StrategyRegistry.available_strategies()}
    parts = []
    for name in blamed:
        guess = near(settings[name], names.get(name, ()))
        guess = f" (did you mean {guess}?)" if guess not in ("", settings[name]) else ""
        parts.append(f"trainer.{name} is {shown(settings[name])}{guess}")
    has = f"; this machine has: {here}" if {"accelerator", "devices"} & {*blamed} else ""
    return f"{' and '.join(parts) or 'trainer'}: {said.rstrip('.!')}{has}"


def check_nulls(kind: Any, given: Mapping[str, Any], where: str) -> None:
    """Refuses null for a setting of a class that takes none; a parser lets it through to where it is compared or added.

    Args:
        kind: the class.
        given: its settings, as parsed; those of the classes among them are looked at too.
        where: the key that holds them.

    Raises:
        RunError: naming the key.
    """
    try:
        hints = get_type_hints(kind.__init__)
        parameters = inspect.signature(kind).parameters
    except (AttributeError, NameError, TypeError, ValueError):  # it says nothing of its settings
        return
    for name, value in given.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping | Namespace) and isinstance(part.get("class_path"), str):
                check_nulls(imported(part["class_path"]), _settings(part.get("init_args")), f"{where}.{name}.init_args")
        hint = hints.get(name, Any)
        group = next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
        if group is not None and isinstance(value, Mapping | Namespace) and "class_path" not in value:
            check_nulls(group, _settings(value), f"{where}.{name}")
        optional = hint is Any or isinstance(hint, TypeVar) or type(None) in get_args(hint)
        if value is None and not optional and name in parameters and parameters[name].default is not None:
            raise RunError(f"{where}.{name} is null; it takes a value, or leave it out")


def check_numbers(given: Any, where: str) -> None:
    """Refuses numbers that are not finite: the loss would be NaN, and the rows of its step be blamed.

    Args:
        given: the settings of a group, as parsed.
        where: the key that holds them.

    Raises:
        RunError: naming the key.
    """
    if isinstance(given, float) and not math.isfinite(given):
        raise RunError(f"{where} is {given}; it must be finite")
    if isinstance(given, list | tuple):
        for i, each in enumerate(given):
            check_numbers(each, f"{where}[{i}]")
    if isinstance(given, Mapping | Namespace):
        bounds = str(given.get("class_path")).endswith(".Clipped")  # which may be infinite
        for name, value in _settings(given).items():
            if not bounds or name != "init_args":
                check_numbers(value, f"{where}.{name}")
            elif (inner := _settings(value).get("value_function")) is not None:
                check_numbers(inner, f"{where}.{name}.value_function")


def _settings(given: Any) -> Mapping[str, Any]:
    return vars(given) if isinstance(given, Namespace) else given or {}


def tool_parser(name: str) -> HalosParser:
    """The parser of a command of ``TOOLS``: its parameters before the ``*`` are positional, the others are options."""
    tool = TOOLS[name]
    kinds = inspect.signature(tool).parameters
    options: set[str | int] = {key for key, p in kinds.items() if p.kind is p.KEYWORD_ONLY}
    parser = HalosParser(prog=f"halos {name}", description=(tool.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(tool, as_positional=True, as_group=False, skip=options)
    parser.add_function_arguments(tool, as_positional=False, as_group=False, skip=set[str | int](kinds) - options)
    return parser


def run_tool(name: str, words: list[str]) -> None:
    """Runs a command of ``TOOLS``."""
    parser = tool_parser(name)
    TOOLS[name](**parser.instantiate(parser.parse_args(words)).as_dict())


def run(args: list[str] | None = None) -> None:
    """A command of ``TOOLS``, else LightningCLI's; ``args`` are its words, left out those of this process.

    Raises:
        SystemExit: 1 for what a user can mend, said in a line.
    """
    for noise in NOISE:
        warnings.filterwarnings("ignore", noise)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_shown)
    if warnings.formatwarning is not _warning:
        _FORMAT.append(warnings.formatwarning)
        warnings.formatwarning = _warning
    words = sys.argv[1:] if args is None else args
    tool = next((name for name in TOOLS if words[: len(name.split())] == name.split()), None)
    try:
        if tool:
            run_tool(tool, words[len(tool.split()) :])
        elif words[:1] == ["data"]:
            raise RunError("say halos data inspect SOURCE; settings of data are options of fit, such as --data.train")
        else:
            HalosCLI(args)
    except USER_ERRORS as error:
        print(f"halos: {type(error).__name__}: {plain(cause(str(error)))}{_cure(error)}", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        if re.search(r"Connection (closed|reset) by peer", str(error)):  # gloo's words in a collective
            print("halos: another process of this run has ended; its own lines say why", file=sys.stderr)
            raise SystemExit(1) from error
        error.add_note(
            "halos: this is a fault of halos_pl, or of a plug-in named in the lines above, and not of your data or"
            " options; please report it with these lines"
        )
        raise


_FORMAT: list[Callable[..., str]] = []  # how warnings were formatted before


def _warning(*args: Any, **kwargs: Any) -> str:
    """A warning as it is shown: without the control characters of a path or a column's name."""
    return plain(_FORMAT[-1](*args, **kwargs))


def _shown(record: logging.LogRecord) -> bool:
    """Shows a line of the log unless it is noise, without the control characters of a path or a column's name."""
    record.msg, record.args = plain(record.getMessage()), ()
    return not re.search(UNSAID, record.msg)


def _cure(error: BaseException) -> str:
    """What to do about a file that cannot be written."""
    if not isinstance(error, OSError):
        return ""
    cures, place = [], error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cures.append(f"free some space{'' if place else f' there or in {tempfile.gettempdir()}'}")
    with contextlib.suppress(NoHomeError):
        root = cache_root()
        named = Path(os.fsdecode(place)) if isinstance(place, (str, bytes)) else None
        if named is not None and (named.is_relative_to(root) or (root.is_relative_to(named) and not root.exists())):
            cures.append("HALOS_CACHE names another folder for the cache")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            cures.append("name a folder of another disk")
    return "".join(f"; {cure}" for cure in cures)
