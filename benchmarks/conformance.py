"""Counts how many faulty targets ``halos check`` catches and how many sound ones it passes, by kind.

    python benchmarks/conformance.py [--seeds 20]
    python benchmarks/conformance.py FILE.py ... [--timeout 60] [--memory 4GB]

Without a file, the targets are those of ``tests/meta``, whose faults were planted: a faulty one must fail a clause
that it is meant for, a sound one must pass all of its clauses. Targets that draw their places and sizes are drawn
``--seeds`` times. With files, they are the public plug-ins and objectives that the files define: classes, instances,
and functions without arguments that have an attribute ``CLAUSE`` or ``WHY``. An attribute ``CLAUSE`` marks a faulty
target and names the clause that should fail (``process``: it must be reported as not checkable); ``KIND``, one of the
kinds in the table, overrides the kind that follows from the clause. The code is executed, as by ``halos check`` in a
process of its own. Each result is printed as it comes, then the table. The exit status is 1 if a target is missed or
refused.
"""

from __future__ import annotations

import argparse
import inspect
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from halos_pl.cache import size_of
from halos_pl.conformance.check import reports
from halos_pl.conformance.child import Child
from halos_pl.conformance.target import KINDS, TargetError, UncheckableError, as_target, one_line
from halos_pl.objective.build import module_of_file

META = Path(__file__).resolve().parents[1] / "tests" / "meta"


def meta(module: str) -> Any:
    """A module of ``tests/meta``."""
    if str(META) not in sys.path:
        sys.path.insert(0, str(META))
    return import_module(module)


@dataclass(frozen=True)
class Target:
    """What is checked.

    Attributes:
        name: its name in the table.
        kind: one of ``mutant.KINDS``.
        faulty: whether it must be caught; otherwise it must pass.
        question: what the child is asked about it.
        unanswered: whether it is caught if it cannot be checked, and only then; None: that catches it as well.
    """

    name: str
    kind: str
    faulty: bool
    question: dict[str, Any]
    unanswered: bool | None = False


@dataclass(frozen=True)
class Checked:
    """The result on a target.

    Attributes:
        target: what was checked.
        right: whether a faulty target was caught, or a sound one passed.
        said: the verdict and the first witness.
    """

    target: Target
    right: bool
    said: str


def answer(question: dict[str, Any]) -> Any:
    """Runs in the child process: the targets of a file, or whether one target is sound, and the witness if not.

    Raises:
        TargetError: a file or target cannot be used.
    """
    torch.set_num_threads(1)
    if "file" in question:
        return _listed(Path(question["file"]), question.get("name"))
    members = meta("members")
    if "mutant" in question:
        with members.unshrunk():
            witness = members.witness_against(members.MUTANTS[question["mutant"]], question["seed"])
        return [witness is None, witness or "no witness"]
    return _outcome(members.made(question["sound"], question["seed"]))


def _outcome(target: Any) -> list[Any]:
    report = reports(target)["icml"]
    if report.unusable:
        raise UncheckableError(report.unusable)
    against = [f"{row.clause}: {row.witness}" for row in report.clauses if row.status == "failed" and row.required]
    return [report.sound, "; ".join([report.shown_verdict, *against[:1]])]


def _listed(path: Path, name: str | None) -> list[Any]:
    """Name, kind, whether faulty, and clause of the targets in a file; with a name, the outcome of that target."""
    if not path.is_file():
        raise TargetError(f"{path}: no such file")
    try:
        module = module_of_file(path, "target")
    except (Exception, SystemExit) as error:
        raise TargetError(f"{path} does not import: {one_line(error)}") from error
    if name is not None:
        found = getattr(module, name)
        try:
            target = as_target(found() if inspect.isfunction(found) else found)
        except (Exception, SystemExit) as error:
            raise UncheckableError(one_line(error)) from error
        return _outcome(target)
    found = [
        [name, _kind(path, name, thing), _clause(thing)]
        for name, thing in vars(module).items()
        if not name.startswith("_") and _is_target(thing, module.__name__)
    ]
    if not found:
        raise TargetError(f"{path}: no plug-in or objective whose name has no leading underscore")
    return found


def _is_target(thing: Any, module: str) -> bool:
    if inspect.isclass(thing):
        return issubclass(thing, KINDS) and thing.__module__ == module and not inspect.isabstract(thing)
    if inspect.isfunction(thing):
        return thing.__module__ == module and (hasattr(thing, "CLAUSE") or hasattr(thing, "WHY"))
    return isinstance(thing, KINDS)


def _clause(thing: Any) -> str | None:
    """The clause that a faulty target should fail, the first word of its attribute; None for a sound target."""
    text = getattr(thing, "CLAUSE", None)
    return None if text is None else (re.findall(r"\w+", str(text)) or [""])[0]


def _kind(path: Path, name: str, thing: Any) -> str:
    mutant = meta("mutant")
    clause = _clause(thing)
    of_clause = mutant.FALSE_ALARMS if clause is None else mutant.KIND_OF.get(clause, mutant.VALUES)
    kind: str = getattr(thing, "KIND", of_clause)
    if kind not in mutant.KINDS:
        raise TargetError(f"{path}: {name}.KIND is {kind!r}; choose one of {', '.join(mutant.KINDS)}")
    return kind


def of_meta(seeds: int) -> Iterator[Target]:
    """The targets of ``tests/meta``; those that draw nothing once, the others once for each seed."""
    members, mutant = meta("members"), meta("mutant")

    def draws(make: Any) -> range:
        return range(seeds if seeds > 1 and mutant.draws(make) else 1)

    for i, one in enumerate(members.MUTANTS):
        for seed in draws(one.make):
            yield Target(f"{one.name} ({seed})", one.kind, True, {"mutant": i, "seed": seed})
    for name, make in members.SOUND.items():
        for seed in draws(make):
            yield Target(f"{name} ({seed})", members.kind_of(make), False, {"sound": name, "seed": seed})


def of_file(path: Path, child: Child) -> Iterator[Target]:
    """The targets that a file defines.

    Raises:
        TargetError: it cannot be imported, or defines none.
    """
    try:
        listed = child.ask({"file": str(path)})
    except UncheckableError as error:
        raise TargetError(f"{path}: {error}") from error
    for name, kind, clause in listed:
        question = {"file": str(path), "name": name}
        unanswered = True if clause == "process" else None
        yield Target(f"{path.stem}.{name}", kind, clause is not None, question, unanswered)


def check(target: Target, child: Child) -> Checked:
    """Checks a target in the child."""
    try:
        sound, said = child.ask(target.question)
    except TargetError as error:
        return Checked(target, target.faulty and target.unanswered is not False, f"could not be checked: {error}")
    return Checked(target, not sound and target.unanswered is not True if target.faulty else sound, said)


def table(checked: Sequence[Checked]) -> Iterator[str]:
    """Lines of the Markdown table: caught and passed by kind, and the names of the others."""
    yield "| kind | caught / faulty | passed / sound | missed or refused |"
    yield "|---|---|---|---|"
    for kind in (*meta("mutant").KINDS, "all"):
        of_kind = [one for one in checked if kind in (one.target.kind, "all")]
        counts = []
        for faulty in (True, False):
            these = [one.right for one in of_kind if one.target.faulty == faulty]
            counts.append(f"{sum(these)} / {len(these)}" if these else "–")
        wrong = [cell(one.target.name) for one in of_kind if not one.right and kind != "all"]
        yield f"| {kind} | {' | '.join(counts)} | {', '.join(wrong)} |"


def line(one: Checked, detailed: bool) -> str:
    """The result on a target: ``caught`` or ``missed`` if it is faulty, else ``passed`` or ``refused``, and its name.

    What was said is added if it is wrong, or on request.
    """
    right, wrong = ("caught", "missed") if one.target.faulty else ("passed", "refused")
    said = f": {' '.join(one.said.split())}" if detailed or not one.right else ""
    return f"{right if one.right else wrong}: {one.target.name}{said}"


def cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def main(words: list[str] | None = None) -> None:
    """Checks the targets, prints each result as it comes, and the table.

    Raises:
        SystemExit: 1 if a target is missed or refused, 2 if a file cannot be used.
    """
    parser = argparse.ArgumentParser(description="Count what halos check catches and passes, by kind.")
    parser.add_argument("files", nargs="*", type=Path, help="files with targets, in place of those of tests/meta")
    parser.add_argument("--seeds", type=int, default=1, help="how often targets of tests/meta are drawn")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that each target may take")
    parser.add_argument("--memory", default="4GB", help="memory that a check may take")
    parser.add_argument(
        "--details", action="store_true", help="also print the verdict and first witness of each target"
    )
    options = parser.parse_args(words)
    memory = size_of(options.memory)
    if not (options.timeout > 0 and options.seeds > 0 and memory):
        parser.error("--timeout and --seeds must be above 0, and --memory a size such as 4GB")
    with Child(answer, timeout=options.timeout, memory=memory, anew=True) as child:
        try:
            files = options.files or [META / "process_targets.py"]
            targets = [] if options.files else list(of_meta(options.seeds))
            targets += [target for path in files for target in of_file(path, child)]
        except TargetError as error:
            print(f"conformance.py: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        checked = []
        for target in targets:
            checked.append(one := check(target, child))
            print(line(one, options.details), flush=True)
    print("", *table(checked), sep="\n")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\n{len(checked)} targets, {used.ru_utime + used.ru_stime:.0f} s of CPU")
    if not all(one.right for one in checked):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
