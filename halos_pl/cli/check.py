"""``halos check``: the conformance suite on the command line. The code of the target is executed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

from rich.console import Console

from halos_pl.cli.errors import UsageError
from halos_pl.cli.targets import MEMORY, TIMEOUT, limited_child, loaded
from halos_pl.cli.verdicts import verdicts
from halos_pl.common.experiments import objectives
from halos_pl.common.messages import cause, plain
from halos_pl.conformance.check import reports
from halos_pl.conformance.child import Child
from halos_pl.conformance.explain import explain, listed
from halos_pl.conformance.report import TITLES, Definition, Report
from halos_pl.conformance.target import TargetError, UncheckableError

START, END = "<!-- halos check --all: this table is generated -->\n", "<!-- end of the table -->\n"


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """Runs in the child process: the reports on a target under both definitions, as plain data."""
    target, init_args, thorough = (question[key] for key in ("target", "init_args", "thorough"))
    both = reports(loaded(target, init_args, "halos check"), thorough=thorough, shared=_shared)
    return {definition: asdict(report) for definition, report in both.items()}


# Parts that the child has checked, so that equal parts of several losses are checked once.
_shared: dict[Any, Any] = {}


def _reports(child: Child, target: str, init_args: str | None, thorough: bool) -> dict[Definition, Report]:
    """The reports of the child on a target.

    Raises:
        TargetError: it could not be checked.
    """
    try:
        answer = child.ask({"target": target, "init_args": init_args, "thorough": thorough})
    except UncheckableError as error:
        raise TargetError(f"{target} could not be checked: {error}") from error
    both = {definition: Report.from_data(data) for definition, data in answer.items()}
    if unusable := next((report.unusable for report in both.values() if report.unusable), None):
        raise TargetError(f"{target} could not be checked: {unusable}")
    return both


def family(
    files: Iterable[Path], child: Child, *, thorough: bool = False
) -> Iterator[tuple[str, dict[Definition, Report]]]:
    """Name and reports under both definitions of each objective file, checked in ``child``.

    Raises:
        TargetError: after all others, if a file is not an objective, or could not be checked.
    """
    wrong = []
    for path in files:
        try:
            both = _reports(child, str(path), None, thorough)
        except TargetError as error:
            wrong.append(str(error))
        else:
            yield path.stem, both
    if wrong:
        raise TargetError("; ".join(wrong))


def family_table(checked: Iterable[tuple[str, dict[Definition, Report]]]) -> Iterator[str]:
    """Lines of a Markdown table from ``family()``, as in docs/reference/verdicts.md: losses by definitions, and what
    Q depends on beside x.
    """
    yield f"| loss | {' | '.join(TITLES.values())} | remark on Q(·\\|x) |"
    yield f"|{'---|' * (2 + len(TITLES))}"
    for name, by_definition in checked:
        verdicts = " | ".join(by_definition[definition].shown_verdict for definition in TITLES)
        yield f"| {name} | {verdicts} | {_remark(by_definition['icml'])} |"


def _remark(report: Report) -> str:
    """The remark on the reference point of a sound loss, for a cell of a Markdown table."""
    [remark] = [c.reason for c in report.clauses if c.clause == "reference_in_range" and c.status == "passed"] or [None]
    return (remark or "").replace("|", "\\|")


def _write(table: list[str], path: Path) -> None:
    """Replaces the table between the markers in a Markdown file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror or error}") from error
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise TargetError(f"{path} has no place for the table; add the lines {START.strip()} and {END.strip()}")
    path.write_text(before + start + "".join(f"{line}\n" for line in table) + end + after, encoding="utf-8")


def _check_all(child: Child, as_json: bool, thorough: bool, targets: Sequence[Path]) -> None:
    checked: dict[str, dict[Definition, Report]] = {}

    def each() -> Iterator[tuple[str, dict[Definition, Report]]]:
        for name, both in family(objectives().values(), child, thorough=thorough):
            checked[name] = both
            yield name, both

    if as_json:
        print(json.dumps([report.to_json() for _, both in each() for report in both.values()], indent=2))
        return
    lines = []
    for line in family_table(each()):
        print(line, flush=True)
        lines.append(line)
    for path in targets:
        if path.suffix == ".json":
            path.write_text(verdicts(checked), encoding="utf-8")
        else:
            _write(lines, path)


def _check_one(child: Child, options: argparse.Namespace) -> Report:
    report = _reports(child, options.target, options.init_args, options.thorough)[options.definition]
    report = replace(report, target=options.target)
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:  # piped output is not wrapped
        Console(width=None if sys.stdout.isatty() else 1000).print(report)
        if failed := [clause.clause for clause in report.clauses if clause.status == "failed" and clause.required]:
            print(f"\nhalos check --explain {failed[0]} shows what the clause means and how to fix it")
    return report


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: error: {plain(' '.join(message.split()))}. All options: {self.prog} --help")


def run(words: list[str]) -> None:
    """``halos check WORDS``. Unlike in other commands, flags take no value and the target is optional.

    Raises:
        SystemExit: 1 if the target is no HALO or fails its clauses, 2 if it could not be checked.
    """
    parser = _Parser(
        prog="halos check",
        description="Check a loss, or a part of one, against the definition of human-aware losses.",
        epilog="Exit status: 0 for a HALO, or a plug-in that passes its clauses; 1 otherwise; 2 if the target could not"
        " be checked. The code of the target is executed, in a process of its own.",
    )
    parser.add_argument(
        "target",
        nargs="?",
        help="an objective (its name or YAML file), or a plug-in (its name, a dotted class, path/to/file.py:Class)",
    )
    parser.add_argument("--definition", choices=get_args(Definition), default="icml", help="ICML 2024 or arXiv v1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--init_args", metavar="JSON", help="arguments of the class, such as '{\"beta\": 0.2}'")
    parser.add_argument("--all", action="store_true", help="check every shipped objective under both definitions")
    parser.add_argument(
        "--write",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="with --all: also write the table into FILE, between its markers, or as .json for halos objectives",
    )
    parser.add_argument(
        "--explain",
        metavar="CLAUSE",
        nargs="?",
        const="",
        help="explain a clause, with an example that fails it and the fix; without a name, list the clauses",
    )
    parser.add_argument("--thorough", action="store_true", help="repeat draws and search a denser grid")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        help=f"time that each target may take; default: {TIMEOUT:g}, with --thorough ten times as long",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", default=MEMORY, help=f"memory that a check may take; default: {MEMORY}"
    )
    options, others = parser.parse_known_args(words)
    if others:
        hint = (
            ""
            if any(word.startswith("-") for word in others)
            else "; it takes one TARGET, and options that begin with --"
        )
        parser.error(f"unrecognized arguments: {' '.join(others)}{hint}")
    if options.explain is not None:
        if options.all or options.target is not None:
            parser.error("--explain takes no target; give one clause, or none to list them")
        try:
            print(explain(options.explain) if options.explain else listed())
        except ValueError as error:
            print(f"halos check: {plain(error)}", file=sys.stderr)
            raise SystemExit(2) from error
        return
    if options.all == (options.target is not None):
        parser.error("give one target, --all or --explain")
    timeout = TIMEOUT * (10 if options.thorough else 1) if options.timeout is None else options.timeout
    try:
        with limited_child(_answer, "halos check", timeout, options.memory) as process:
            if options.all:
                _check_all(process, options.json, options.thorough, options.write)
                return
            report = _check_one(process, options)
    except TargetError as error:
        print(f"halos check: {plain(cause(str(error)))}", file=sys.stderr)
        raise SystemExit(2) from error
    if not report.sound:
        raise SystemExit(1)
