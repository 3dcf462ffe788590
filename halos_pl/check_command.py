"""``halos check``: the conformance suite on the command line. The code of the target is executed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json as jsons
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from halos_pl.build import load_objective, module_of_file, place_of
from halos_pl.conformance.check import KINDS, Target, made, reports, required_arguments
from halos_pl.conformance.report import TITLES, Definition, Report
from halos_pl.messages import cause, plain

FAMILY = Path("experiments", "objectives")
START, END = "<!-- halos check --all: this table is generated -->\n", "<!-- end of the table -->\n"


class TargetError(ValueError):
    """The target cannot be checked; the message says why in one line."""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {cause(str(error))}".split())[:300]


def _known(name: str) -> type | None:
    """The class of that bare name among the plug-ins that have been imported, the library's own first."""
    found, todo = [], list[type](KINDS)
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__name__ == name:
            found.append(cls)
    return min(found, key=lambda c: not c.__module__.startswith(("halos_pl", "value_functions")), default=None)


def _from_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise TargetError(f"{path}: no such file")
    try:
        found: Any = module_of_file(path, "target")
    except (Exception, SystemExit) as error:
        raise TargetError(f"{path} does not import: {_one_line(error)}") from error
    for part in name.split("."):  # Outer.Inner as well
        if not hasattr(found, part):
            raise TargetError(f"{path} has no {name!r}")
        found = getattr(found, part)
    return found


def _from_module(path: str) -> Any:
    if path.endswith(".py"):
        raise TargetError(f"{path}: say which class of it, {path}:Class")
    module, _, name = path.rpartition(".")
    if not module:
        cls = _known(name)
        if cls is None:
            raise TargetError(
                f"{path!r} is no known plug-in; give an objective's YAML, a dotted class, or path/to/file.py:Class"
            )
        return cls
    try:
        home = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{module} does not import: {_one_line(error)}") from error
    if not hasattr(home, name):
        raise TargetError(f"{module} has no {name!r}")
    return getattr(home, name)


def _instance(cls: type, given: dict[str, Any], what: str) -> Any:
    """``cls`` with arguments of plain data, plug-ins among them instantiated."""
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "it", fail_untyped=False)
        return parser.instantiate(parser.parse_object({"it": given})).as_dict()["it"]
    except (Exception, SystemExit) as error:
        raise TargetError(f"{what}: {_one_line(error)}") from error


def objective_of(path: str | Path) -> Target:
    """The objective of a YAML file, built from its plug-ins alone: no policy, no data.

    Raises:
        TargetError: where the file cannot be read, or does not describe an objective.
    """
    try:
        return load_objective(path)
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror or error}{place_of(path)}") from error
    except (ValueError, yaml.YAMLError, SystemExit) as error:
        said = " ".join(str(error).split())  # most of them name the file themselves
        raise TargetError(said if str(path) in said else f"{path}: {said}") from error


def load_target(target: str, init_args: str | None = None) -> Target:
    """What ``halos check TARGET`` checks.

    Args:
        target: an objective's YAML file, ``path/to/file.py:Class``, a dotted class, or the bare name of a plug-in.
        init_args: the class's arguments as JSON; plug-ins among them as {"class_path": ..., "init_args": ...}.

    Raises:
        TargetError: where there is nothing to check, in one line.
    """
    if target.endswith((".yaml", ".yml")):
        if init_args is not None:
            raise TargetError("--init_args is for classes; a YAML file states its own arguments")
        return objective_of(target)
    path, colon, name = target.rpartition(":")
    found = _from_file(Path(path), name) if colon else _from_module(target)
    given: Any = {}
    if init_args is not None:
        try:
            given = jsons.loads(init_args)
        except ValueError as error:
            raise TargetError(f"--init_args is not JSON: {error}") from error
        if not isinstance(given, dict) or not inspect.isclass(found):
            raise TargetError('--init_args takes a class\'s arguments as an object, such as {"beta": 0.1}')
    if inspect.isclass(found) and issubclass(found, KINDS) and not inspect.isabstract(found):
        missing = [name for name in required_arguments(found) if name not in given]
        if missing:
            raise TargetError(f"{target} needs arguments that were not given: {', '.join(missing)}; see --init_args")
        if given:
            return _instance(found, given, f"{target} with {init_args}")
    try:
        return made(found)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{target}: {' '.join(str(error).split())[:300]}") from error


def family(folder: Path | None = None, *, thorough: bool = False) -> Iterator[tuple[str, dict[Definition, Report]]]:
    """Name and reports, under both definitions, of every objective file in ``folder``.

    Raises:
        TargetError: where there is no such folder, or a file of it is no objective.
    """
    folders = [folder] if folder else [FAMILY, Path(__file__).resolve().parents[1] / FAMILY]
    home = next((place for place in folders if place.is_dir()), None)
    if home is None:
        raise TargetError(f"--all: no folder {folders[0]}; run it in a checkout of halos_pl")
    shared: dict[Any, Any] = {}
    for path in sorted(home.glob("*.yaml")):
        yield path.stem, reports(objective_of(path), thorough=thorough, shared=shared)


def family_table(checked: Iterable[tuple[str, dict[Definition, Report]]]) -> Iterator[str]:
    """The lines of a Markdown table of ``family()``: a row a loss, a column a definition. The README holds a copy."""
    yield f"| loss | {' | '.join(TITLES.values())} |"
    yield f"|{'---|' * (1 + len(TITLES))}"
    for name, found in checked:
        yield f"| {name} | {' | '.join(found[definition].verdict for definition in TITLES)} |"


def _write(table: list[str], path: Path) -> None:
    """Puts the table in the place of the one between the marks in ``path``."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror or error}") from error
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise TargetError(f"{path} has no place for the table: it takes a line {START.strip()} and one {END.strip()}")
    path.write_text(before + start + "".join(f"{line}\n" for line in table) + end + after, encoding="utf-8")


def _check_all(json: bool, thorough: bool, write: Path | None) -> None:
    if json:
        with contextlib.redirect_stdout(sys.stderr):
            both = [report for _, found in family(thorough=thorough) for report in found.values()]
        print(jsons.dumps([report.to_json() for report in both], indent=2))
        return
    lines = []
    for line in family_table(family(thorough=thorough)):
        print(line, flush=True)
        lines.append(line)
    if write:
        _write(lines, write)


def _check_one(target: str, definition: Definition, json: bool, init_args: str | None, thorough: bool) -> Report:
    # What the target prints is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = reports(load_target(target, init_args), thorough=thorough)[definition]
        except SystemExit as error:
            raise TargetError(f"{target} cannot be checked: it leaves the process, {_one_line(error)}") from error
    report = replace(found, target=target)
    if report.unusable:
        raise TargetError(f"{target} cannot be checked: {report.unusable}")
    if json:
        print(jsons.dumps(report.to_json(), indent=2))
    else:  # what is piped somewhere is not wrapped
        Console(width=None if sys.stdout.isatty() else 1000).print(report)
    return report


def run(words: list[str]) -> None:
    """``halos check WORDS``: its flags take no value and its target may be left out, unlike those of other commands.

    Raises:
        SystemExit: 1 for what is no HALO (or fails its clauses), 2 for what could not be checked.
    """
    parser = argparse.ArgumentParser(
        prog="halos check",
        description="Hold a loss, or a part of one, to the definition of human-aware losses.",
        epilog="Exit status: 0 for a HALO, or a plug-in that passes its clauses; 1 otherwise; 2 where the target could"
        " not be checked. The code of the target is executed.",
    )
    parser.add_argument(
        "target",
        nargs="?",
        help="an objective's YAML file, a dotted class, path/to/file.py:Class, or the bare name of a plug-in",
    )
    parser.add_argument("--definition", choices=get_args(Definition), default="icml", help="ICML 2024 or arXiv v1")
    parser.add_argument("--json", action="store_true", help="print plain data instead of a table")
    parser.add_argument("--init_args", metavar="JSON", help="the class's arguments, such as '{\"beta\": 0.2}'")
    parser.add_argument("--all", action="store_true", help="every file of experiments/objectives, both definitions")
    parser.add_argument("--write", metavar="FILE", type=Path, help="with --all: put the table into FILE as well")
    parser.add_argument("--thorough", action="store_true", help="search longer, up to 30 s for a target")
    given = parser.parse_args(words)
    if given.all == (given.target is not None):
        parser.error("name one target, or say --all")
    try:
        if given.all:
            _check_all(given.json, given.thorough, given.write)
            return
        report = _check_one(given.target, given.definition, given.json, given.init_args, given.thorough)
    except TargetError as error:
        print(f"halos check: {plain(cause(str(error)))}", file=sys.stderr)
        raise SystemExit(2) from error
    if not report.sound:
        raise SystemExit(1)
