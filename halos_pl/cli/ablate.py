"""``halos ablate``: runs a study, shows its progress, and writes its report."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halos_pl.common.messages import plain
from halos_pl.common.stopping import Stopped
from halos_pl.evaluation.files import FILE
from halos_pl.run_dir import SUMMARY, shortfall, untold
from halos_pl.study.choice import choices, tuned
from halos_pl.study.earlier import EARLIER, Earlier, read_earlier
from halos_pl.study.finished import finished
from halos_pl.study.read import load_study, study_in, sweep_file
from halos_pl.study.recorded import VALUES, read_recorded
from halos_pl.study.spec import Run, Study, StudyError, default_folder
from halos_pl.study.state import STUDY, ended, failure, state
from halos_pl.study.time_spent import time_spent
from halos_pl.study.tuning import tuning_in


class Parsers:
    """The parsers of ``halos fit`` and ``halos evaluate``, for the pre-flight of a study."""

    @property
    def user_errors(self) -> tuple[type[Exception], ...]:
        """Errors that a user can fix."""
        from halos_pl.cli.errors import user_errors

        return user_errors()

    def fit(self, words: list[str]) -> Any:
        """The command with its objects built, but not run."""
        from halos_pl.cli.lightning_cli import HalosCLI

        return HalosCLI(words, run=False)

    def evaluate(self, words: list[str]) -> Mapping[str, Any]:
        """The parsed arguments."""
        from halos_pl.cli.commands import tool_parser

        parser = tool_parser("evaluate")
        arguments: Mapping[str, Any] = parser.instantiate(parser.parse_args(words)).as_dict()
        return arguments

    def tool(self, name: str, words: list[str]) -> Mapping[str, Any]:
        """The arguments that a command gets."""
        from halos_pl.cli.commands import tool_parser

        parser = tool_parser(name)
        arguments: Mapping[str, Any] = parser.instantiate(parser.parse_args(words)).as_dict()
        return arguments


def ablate(
    study: str,
    *,
    overrides: str | None = None,
    out: str | None = None,
    resume_from: str | None = None,
    jobs: int = 1,
    keep_checkpoints: bool = False,
    anyway: bool = False,
    fork: bool = True,
) -> None:
    """Run a study: train and measure every arm with every seed, and write a report. Resumes an interrupted study.

    A file with ``policy: candidates`` is a sweep over policies that are fitted in milliseconds; it takes --out only.

    Args:
        study: YAML file of the study, or the name of a shipped one, such as ablations/beta.
        overrides: second file, or the name of a shipped one, which changes the scale: its options are added to those of
            the study, and its other keys, such as configs, seeds and evaluate, replace the study's.
        out: folder for all results; default: runs/NAME, after the study's file (and that of --overrides).
        resume_from: folder with values.csv.gz and record.json of an earlier session, perhaps on another machine: its
            runs count as done, and only missing ones are trained. Needed once: the files are copied to earlier/ of OUT.
        jobs: number of runs at a time; they share the CPU cores.
        keep_checkpoints: whether to keep the last checkpoint of each run after measuring it.
        anyway: whether to run a study that would probably miss the difference that it names.
        fork: whether the runs are forked from a process that has imported everything and loaded their model, where that
            is possible (on Linux, without a GPU or a cluster); otherwise each starts Python. Figures are the same.
    """
    # Imported here, so that status, which needs no model, starts in a second.
    from halos_pl.study.adopt import adopt, check_earlier, unused
    from halos_pl.study.claim import claim
    from halos_pl.study.execute import execute, executor_of
    from halos_pl.study.forks import can_fork
    from halos_pl.study.planned_power import hopeless, power_lines
    from halos_pl.study.preflight import check
    from halos_pl.study.processes import environment, forking
    from halos_pl.study.timing import show_plan, timed_step

    if (file := sweep_file(study)) is not None:
        given = {"overrides": overrides, "resume_from": resume_from, "jobs": jobs != 1, "anyway": anyway}
        given |= {"keep_checkpoints": keep_checkpoints, "fork": not fork}
        if refused := ", ".join(f"--{option}" for option, value in given.items() if value):
            raise StudyError(f"{file} is a sweep over policies over candidates, which takes no {refused}")
        from halos_pl.candidates.sweep import sweep

        sweep(file, Path(out) if out else default_folder(study, None))
        return
    if jobs < 1:
        raise StudyError(f"--jobs is {jobs}; it must be at least 1")
    spec = load_study(study, overrides)
    folder = Path(out) if out else default_folder(study, overrides)
    checked = check(spec, Parsers())
    if spec.cluster is not None:
        with tempfile.TemporaryDirectory() as elsewhere:  # submitit makes its folder before the study's is claimed
            executor_of(spec, Path(elsewhere))
    earlier = check_earlier(spec, folder, checked, resume_from)
    trials = spec.trials(folder)
    runs = [*trials, *_decided(spec, folder, earlier).runs(folder)]
    left = [run for run in runs if not ended(run) and not earlier.has(run)]
    going_on = bool(left)
    weak = hopeless(spec, checked.examples) if going_on else None
    if weak and not anyway:
        raise StudyError(f"{spec.places['effect']}: {weak}; run it as it is with --anyway")
    claim(spec, folder, checked, weak, earlier)
    said = adopt(earlier, resume_from) if resume_from is not None else []
    if checked.uncontrolled:
        print(plain(f"halos: no positive control yet, so the report will claim nothing: {checked.uncontrolled}"))
    forked = forking(environment(jobs)) if fork and spec.cluster is None and can_fork() else nullcontext()
    try:
        with forked:
            if going_on:
                print(plain("\n".join([*power_lines(spec, checked.examples), *([f"halos: {weak}"] if weak else [])])))
                # A cluster's nodes differ from the machine that submits to them.
                times = None if spec.cluster is not None else timed_step(left, folder, environment(jobs))
                show_plan(spec, checked, runs, left, times, jobs)
            for line in said:
                print(plain(f"halos: {line}"))
            missing = [run for run in trials if not earlier.has(run)]
            failed = execute(spec, folder, jobs, keep_checkpoints, runs=missing)
            means = tuning_in(spec, folder).means
            spec = tuned(spec, means)
            for choice in choices(spec, means):
                print(plain(f"halos: {choice.summary}"))
            for line in unused(spec, earlier):
                print(plain(f"halos: {line}"))
            decided = [run for run in spec.runs(folder) if run.arm.decided and not earlier.has(run)]
            failed |= execute(spec, folder, jobs, keep_checkpoints, runs=decided)
    except (KeyboardInterrupt, Stopped):
        print("\nhalos: the runs were stopped; the same command resumes them", file=sys.stderr)
        raise
    skipped = _report(spec, folder)
    undecided = [arm.name for arm in spec.arms if not arm.decided]
    if (bad := len(failed) + skipped) or undecided:
        untuned = f", and no value is chosen for {', '.join(undecided)}" if undecided else ""
        raise StudyError(f"{bad} of {len(runs)} runs failed or are skipped{untuned}; see halos ablate status {folder}")


def _decided(study: Study, folder: Path, earlier: Earlier | None = None) -> Study:
    """The study, in which each arm whose tuning runs have ended has its chosen value."""
    return tuned(study, tuning_in(study, folder, earlier).means)


def _report(study: Study, folder: Path) -> int:
    """Writes the report and prints its first lines.

    Returns:
        Number of measured runs that are skipped.
    """
    from halos_pl.study.first_line import first_line
    from halos_pl.study.headline import headline
    from halos_pl.study.report import write_report
    from halos_pl.study.results import Results

    results = Results(study, folder)
    _warn_untold(results.done)
    path = write_report(results)
    reported = Results(study, folder, read_recorded(study, folder))
    lines = [first_line(reported), *headline(reported), f"halos: the report is {path}; report.md is beside it"]
    print("\n".join(map(plain, lines)))
    return len(results.faults)


def _warn_untold(done: list[Run]) -> None:
    if old := [run for run in done if untold(run.folder)]:
        print(
            f"halos: {len(old)} of {len(done)} runs count as finished, though the {SUMMARY} of the older version that"
            f" trained them does not record whether they took all their steps: {plain(old[0].folder)}"
            f"{', ...' if len(old) > 1 else ''}",
            file=sys.stderr,
        )


def status(folder: str) -> None:
    """Show the progress of a study.

    Args:
        folder: folder of the study.
    """
    if sweep_file(Path(folder) / STUDY) is not None:
        from halos_pl.candidates.report import read_sweep, status_lines

        for line in status_lines(*read_sweep(Path(folder))):
            print(plain(line))
        return
    study = study_in(Path(folder))
    tuning = tuning_in(study, Path(folder))
    reasons = {choice.arm: choice.why_not for choice in choices(study, tuning.means)}
    study = tuned(study, tuning.means)
    runs = [*study.trials(Path(folder)), *study.runs(Path(folder))]
    metrics, faults = finished(study, Path(folder))
    faults |= tuning.faults
    earlier = read_earlier(study, Path(folder))
    recorded = set(earlier.used(runs))
    done = [*filter(tuning.has, study.trials(Path(folder))), *metrics, *(run for run in recorded if not run.trial)]
    title = f"{escape(plain(folder))}: {len(done)} of {len(runs)} runs done"
    table = Table(title=title, title_justify="left")
    for column in ("run", "state", "reason"):
        table.add_column(column, overflow="fold")
    for run in runs:
        how, why = state(run), ""
        if run in recorded:
            how, why = "recorded", f"in {earlier.out / EARLIER / VALUES}"
        elif how == "failed":
            why = failure(run)["error"]
        elif how == "stopped":
            why = f"{shortfall(run.folder)}; the next halos ablate resumes it"
        elif how != "done" and run.measured:
            how, why = "skipped", f"{faults[run]}; the next halos ablate trains and measures it"
        elif run in faults:
            how, why = "skipped", f"{faults[run]}; remove {run.folder / FILE} to measure it again"
        elif not run.arm.decided:
            why = reasons[run.arm.name]
        elif how == "diverged":
            why = failure(run)["error"]
        table.add_row(escape(plain(run.folder)), how, escape(plain(why)))
    Console().print(table)
    spent = time_spent(study, Path(folder))
    if total := sum(spent.values()):
        listed = ", ".join(f"{name} {seconds:.0f} s ({seconds / total:.0%})" for name, seconds in spent.items())
        Console().print(f"Where the time of its commands went: {listed}.", highlight=False)
    _warn_untold(done)


def report(folder: str) -> None:
    """Recompute the report of a study, finished or not, from its runs or, if there are none, from its values.csv.gz.

    Executes the code that the runs' configs name.

    Args:
        folder: folder of the study: with its runs, or with study.yaml, values.csv.gz and record.json.

    Raises:
        StudyError: if the folder has no study.yaml, or neither runs nor values.
    """
    if sweep_file(Path(folder) / STUDY) is not None:
        from halos_pl.candidates.report import read_sweep, write_report

        spec, _ = read_sweep(Path(folder))
        print(plain(f"halos: the report is {write_report(spec, Path(folder))}"))
        return
    from halos_pl.study.results import has_runs

    study, path = study_in(Path(folder)), Path(folder)
    if not (path / VALUES).is_file() and not has_runs(study, path):
        raise StudyError(f"{folder}: nothing to report: no run has started, and there is no {VALUES}")
    _report(study, path)
