"""``halos ablate``: carries out a study, says how far it is, and writes its report."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halos_pl.common.messages import plain
from halos_pl.common.stopping import Stopped
from halos_pl.evaluation.evaluate import FILE
from halos_pl.study.execute import (
    OVER,
    STUDY,
    claim,
    environment,
    execute,
    executor_of,
    failure,
    show_plan,
    state,
    timed_step,
)
from halos_pl.study.first_line import first_line
from halos_pl.study.headline import headline
from halos_pl.study.plan import StudyError, check, default_folder, load_study
from halos_pl.study.planned_power import power_lines
from halos_pl.study.recorded import VALUES, read_recorded
from halos_pl.study.report import write_report
from halos_pl.study.results import Results
from halos_pl.training.ending import SUMMARY, shortfall, untold


def ablate(
    study: str, *, over: str | None = None, out: str | None = None, jobs: int = 1, keep_checkpoints: bool = False
) -> None:
    """Carry out a study: train and measure every arm with every seed, and write a report. Goes on where it was.

    Args:
        study: the study's YAML file.
        over: a second file, another scale: its options are laid over those of the study, one by one, and its configs,
            seeds and measuring replace the study's.
        out: folder of everything it writes; default: runs/ and the file's name.
        jobs: runs at a time; they share the processor's cores.
        keep_checkpoints: keep each run's last checkpoint when it has been measured.
    """
    if jobs < 1:
        raise StudyError(f"--jobs is {jobs}; it must be at least 1")
    plan = load_study(study, over)
    folder = Path(out) if out else default_folder(study, over)
    checked = check(plan)
    if plan.cluster is not None:
        with tempfile.TemporaryDirectory() as beside:  # it makes its folder at once, and the study's has to be claimed
            executor_of(plan, Path(beside))
    claim(plan, folder, {name: arm.digest for name, arm in checked.items()})
    runs = plan.runs(folder)
    try:
        if not all(run.done for run in runs):
            print(plain("\n".join(power_lines(plan, next(iter(checked.values())).examples))))
            # A cluster's machines are not like the one that hands them their work.
            times = None if plan.cluster is not None else timed_step(plan, folder, environment(jobs))
            show_plan(plan, checked, runs, times, jobs)
        failed = execute(plan, folder, jobs, keep_checkpoints)
    except (KeyboardInterrupt, Stopped):
        print("\nhalos: the runs have stopped; the same command resumes them", file=sys.stderr)
        raise
    results = Results(plan, folder)
    _say_report(results)
    if bad := len(failed) + len(results.faults):
        raise StudyError(f"{bad} of {len(runs)} runs have failed or are skipped: halos ablate status {folder}")


def _say_report(results: Results) -> None:
    _say_untold(results)
    path = write_report(results)
    results = Results(results.study, results.out, read_recorded(results.study, results.out))  # as the report has them
    said = [first_line(results), *headline(results), f"halos: the report is {path}, and report.md beside it"]
    print("\n".join(map(plain, said)))


def _say_untold(results: Results) -> None:
    if old := [run for run in results.done if untold(run.folder)]:
        print(
            f"halos: {len(old)} of {len(results.done)} runs were trained by an older version, whose {SUMMARY} does not"
            f" say whether they took all their steps; they count as finished: {plain(old[0].folder)}"
            f"{', ...' if len(old) > 1 else ''}",
            file=sys.stderr,
        )


def _study_of(folder: str) -> Results:
    path = Path(folder)
    if not (path / STUDY).is_file():
        raise StudyError(f"{folder} is not the folder of a study: it holds no {STUDY}")
    over = path / OVER
    return Results(load_study(path / STUDY, over if over.is_file() else None), path)


def status(folder: str) -> None:
    """Say how far a study is.

    Args:
        folder: the study's folder.
    """
    results = _study_of(folder)
    title = f"{escape(plain(folder))}: {len(results.done)} of {len(results.runs)} runs done"
    table = Table(title=title, title_justify="left")
    for column in ("run", "state", "why"):
        table.add_column(column, overflow="fold")
    for run in results.runs:
        how, why = state(run), ""
        if how == "failed":
            why = failure(run)["error"]
        elif how == "stopped":
            why = f"{shortfall(run.folder)}; the next halos ablate resumes it"
        elif how != "done" and run.measured:
            how, why = "skipped", f"{results.faults[run]}; the next halos ablate trains and measures it"
        elif run in results.faults:
            how, why = "skipped", f"{results.faults[run]}; remove {run.folder / FILE} to measure it again"
        table.add_row(escape(plain(run.folder)), how, escape(plain(why)))
    Console().print(table)
    _say_untold(results)


def report(folder: str) -> None:
    """Recompute the report of a study, finished or not, from its runs or, where none are there, its values.csv.gz.

    The code that the runs' configs name is executed.

    Args:
        folder: the study's folder: of its runs, or with its study.yaml, values.csv.gz and record.json.

    Raises:
        StudyError: for a folder without study.yaml, or with neither runs nor values.
    """
    results = _study_of(folder)
    if not results.has_runs and not (results.out / VALUES).is_file():
        raise StudyError(f"{folder}: there is nothing to report: no run has begun, and there is no {VALUES}")
    _say_report(results)
