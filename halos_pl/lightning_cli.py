"""LightningCLI over the module and the DataModule, and the commands that work on what a run left."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from halos_pl.ablate_command import ablate, report, status
from halos_pl.build import PARTS, choices, place_of
from halos_pl.cache import NoHomeError, cache_root
from halos_pl.cache_command import clear, info
from halos_pl.callbacks import CONFIG, PredictionWriter, RunCSVLogger, RunReport, SaveRunConfig, check_run_dir
from halos_pl.checkpoint import (
    LAST,
    PREVIOUS,
    LastCheckpoint,
    NonFiniteWeightsError,
    find_checkpoint,
    read_checkpoint,
    refuse_code,
)
from halos_pl.data import DataError, FeedbackDataModule
from halos_pl.data.inspect import inspect_source
from halos_pl.data.transforms import Transform
from halos_pl.export import export
from halos_pl.generate_command import generate_file
from halos_pl.messages import cause, plain
from halos_pl.module import HALOModule, NonFiniteLossError, check_trainer, unsupported_strategy
from halos_pl.monitors import check_monitors, say_unused
from halos_pl.policy.loading import ModelError
from halos_pl.policy.reference import ReferenceModel
from halos_pl.resume import KeepSettings
from halos_pl.stop_at_step import AgreedSignals, StopAtStep
from halos_pl.study.evaluate import evaluate
from halos_pl.yaml_files import YAMLFileError, read_yaml

PLUGINS: dict[str, type] = {
    **{f"model.{name}": base for name, base in {**PARTS, "reference_model": ReferenceModel}.items()},
    "data.transforms": Transform,
}
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


class HalosParser(LightningArgumentParser):
    """Says what there is when the name of a plug-in or of an option is wrong, which jsonargparse does not."""

    def _near(self, key: str) -> str:
        """The options whose names are like ``key``, or all of them where they are few, as of a plug-in."""
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        known = {action.dest for parser in parsers for action in parser._actions} - {"help"}
        key = re.sub(r"\.(class_path|init_args)\b", "", key)
        near = sorted(known) if len(known) <= 12 else difflib.get_close_matches(key, known, cutoff=0.8)
        return f"\n\nThere is: {', '.join(near)}" if near else ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message, whole = cause(message), message
        for name, base in PLUGINS.items():
            # Not for a fault of an argument of a class that there is.
            named = re.search(rf"{re.escape(name)}\b", whole)
            if named and re.search(r"import path|import of|no module|no attribute", whole, re.IGNORECASE):
                message += f"{hidden(whole)}\n\n{choices(name, base)}"
                break
        if unknown := re.search(UNKNOWN_OPTION, message):
            message += self._near(unknown["key"])
        if "invalid choice" in message and "fit" in message:
            message += f"\n\nfurther commands: {', '.join(('check', *TOOLS))}"
        # The usage alone fills a screen, and what went wrong would be below it.
        command = self.prog.replace(" [options]", "")
        if inside := re.match(r"Subcommand '(\w+)'", message):  # a key of a config file
            command += f" {inside[1]}"
        print(f"{command}: error: {plain(message)}\n\nAll options: {command} --help", file=sys.stderr)
        raise SystemExit(2) from ex


def hidden(message: str) -> str:
    """Which installed module a message is about that hides one of the working folder; nothing where none does."""
    for name in re.findall(r"[A-Za-z_]\w*(?=(?:\.\w+)+)", message):
        file = getattr(sys.modules.get(name), "__file__", None)
        for own in (Path(f"{name}.py"), Path(name, "__init__.py")):
            if file and own.is_file() and own.resolve() != Path(file).resolve():
                return f"\n\n{name} is {file}, which is installed; {own} has the same name: rename it"
    return ""


class HalosCLI(LightningCLI):
    """LightningCLI over :class:`HALOModule` and :class:`FeedbackDataModule`, with one folder per run.

    Everything a run writes is in ``run_dir``: the resolved config, checkpoints, metrics, a summary, plots.
    ``--ckpt_path last`` means that folder's last checkpoint, and is an error where there is none. A new fit
    into a folder that holds a run already moves that run aside instead of writing into it. Only one fit at a time
    writes to a folder, also where several machines share it.

    A fit that is told to stop by Ctrl-C, SIGTERM or another signal saves a checkpoint when its step is done, says how
    to go on, and exits with 128 plus the signal's number; see :mod:`halos_pl.stopping`.
    """

    def __init__(self, args: Any = None, *, run: bool = True) -> None:
        self._words, self._runs = sys.argv[1:] if args is None else args, run
        check_files(self._words)
        names = ", ".join(f"halos {name}" for name in ("check", *TOOLS))
        further = f"Further commands, each with --help: {names}. A config is code where it names classes: those of"
        further += " other packages and files are imported, and trust_remote_code executes a model's."
        status = (
            "Exit status: 0 when done, 1 for what went wrong, 2 for a faulty command line, 128 + n when signal n has"
            " stopped it (130 after Ctrl-C, 143 after SIGTERM). A fit then saves a checkpoint first, from which"
            " --ckpt_path last goes on; a second Ctrl-C stops at once."
        )
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
            parser_kwargs={"description": f"Align language models with human-aware losses. {further} {status}"},
            parser_class=HalosParser,
            auto_configure_optimizers=False,
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
        if not self._runs:  # what a run's config.yaml holds besides, as an argument of its command
            for name in ("ckpt_path", "weights_only"):
                parser.add_argument(f"--{name}", default=None)

    def _parse_ckpt_path(self) -> None:
        """Nothing: our checkpoints hold no hyper-parameters; ``config.yaml`` does."""

    def before_instantiate_classes(self) -> None:
        config = self._own
        check_settings(config.trainer)
        for name, kind in {"model": HALOModule, "data": FeedbackDataModule, "checkpoint": LastCheckpoint}.items():
            check_nulls(kind, _settings(config.get(name)), name)
        if not config.run_dir:
            raise RunError('run_dir is empty; name a folder ("." is the one where you are)')
        run_dir = Path(config.run_dir)
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

    def before_fit(self) -> None:
        """Refuses, before data are read, what could not work whatever they are."""
        check_monitors(self.trainer, self.model, self.datamodule)
        say_unused(self.trainer, self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self._own
        given = self._get(self.config_init, "trainer")["logger"]
        if config.trainer.barebones or given is False:
            kwargs["logger"] = False
        else:  # the run's own metrics are kept beside those of any other logger
            others = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
            own = [RunCSVLogger(config.run_dir)] if self.subcommand == "fit" else []
            kwargs["logger"] = [*own, *others] or False
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError) as error:  # such as a GPU where there is none
            said = " ".join(str(error).split())
            if re.search(r"accelerator|devices|GPU|cuda|mps|tpu", said, re.IGNORECASE):
                said += " Check --trainer.accelerator and --trainer.devices; auto takes what this machine has"
            raise RunError(f"trainer: {said}") from error
        # First, so that the time of a step is without what others do after it, such as writing a checkpoint.
        # KeepSettings comes before what writes this run's config.yaml.
        trainer.callbacks[:0] = [RunReport(), StopAtStep(), KeepSettings(config.clone().as_dict(), CONFIG)]
        trainer.callbacks.append(PredictionWriter())
        trainer._signal_connector = AgreedSignals(trainer)
        check_trainer(trainer)
        return trainer


GROUPS = ("data", "model", "trainer", "checkpoint")


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
        if Path(path).is_file():  # a pipe can be read only once
            content, lines = read_yaml(path)
            for key in GROUPS:
                if not isinstance(content.get(key, {}), (dict, str)):
                    said = json.dumps(content[key], default=str)
                    raise YAMLFileError(f"{path}:{lines[(key,)]}: {key} is {said}; it takes a mapping")


def check_settings(trainer: Any) -> None:
    """Refuses what Lightning would refuse later with advice that leads nowhere, or would break.

    Raises:
        RunError: naming the setting, the reason and what to do instead.
    """
    given = trainer.strategy
    strategy = given if isinstance(given, str) else given.class_path.rpartition(".")[2]
    if re.match(r"fsdp|deepspeed|model_?parallel", strategy, re.IGNORECASE):
        raise RunError(unsupported_strategy(strategy))
    if trainer.overfit_batches:
        raise RunError(
            f"trainer.overfit_batches is {trainer.overfit_batches}: Lightning would replace the sampler, which decides"
            " what a step is. Use --trainer.limit_train_batches, more --trainer.max_epochs, and --data.shuffle false"
        )
    if trainer.enable_checkpointing is False or trainer.barebones:
        raise RunError(
            "a run keeps checkpoints/last.ckpt, to go on from; --trainer.enable_checkpointing false and"
            " --trainer.barebones true are not supported. --checkpoint.every_n_steps 1000000 writes it at the end only"
        )


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
                check_nulls(_class(part["class_path"]), _settings(part.get("init_args")), f"{where}.{name}.init_args")
        hint = hints.get(name, Any)
        optional = hint is Any or isinstance(hint, TypeVar) or type(None) in get_args(hint)
        if value is None and not optional and name in parameters and parameters[name].default is not None:
            raise RunError(f"{where}.{name} is null; it takes a value, or leave it out")


def _settings(given: Any) -> Mapping[str, Any]:
    return vars(given) if isinstance(given, Namespace) else given or {}


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)  # the parser has imported it


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
    shown = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    shown.addFilter(lambda record: not re.search(UNSAID, record.getMessage()))
    words = sys.argv[1:] if args is None else args
    tool = next((name for name in TOOLS if words[: len(name.split())] == name.split()), None)
    try:
        if tool:
            run_tool(tool, words[len(tool.split()) :])
        elif words[:1] == ["cache"]:
            raise RunError("say halos cache info, or halos cache clear [--kind data|models|reference]")
        elif words[:1] == ["data"]:
            raise RunError("say halos data inspect SOURCE; settings of data are options of fit, such as --data.train")
        else:
            HalosCLI(args)
    except USER_ERRORS as error:
        print(f"halos: {type(error).__name__}: {plain(cause(str(error)))}{_cure(error)}", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        error.add_note(
            "halos: this is a fault of halos_pl, or of a plug-in named in the lines above, and not of your data or"
            " options; please report it with these lines"
        )
        raise


def _cure(error: BaseException) -> str:
    """What to do about a cache that cannot be written."""
    place = getattr(error, "filename", None)
    with contextlib.suppress(NoHomeError):
        if isinstance(place, (str, bytes)) and Path(os.fsdecode(place)).is_relative_to(cache_root()):
            return "; HALOS_CACHE names another folder for the cache"
    return ""
