"""Takes over the runs that an earlier session recorded, if they belong to the study as it is now."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.messages import counted
from halos_pl.study.choice import tuned
from halos_pl.study.contents import evaluation_by_content, files_by_content
from halos_pl.study.earlier import EARLIER, Earlier, has_folder, read_earlier
from halos_pl.study.preflight import Checked
from halos_pl.study.recorded import DIGEST, RECORD, VALUES, Figures, Key, check_examples
from halos_pl.study.spec import Run, Study, StudyError
from halos_pl.study.state import BY_CONTENT
from halos_pl.study.tuning import tuning_in


def by_content(study: Study, checked: Checked) -> dict[str, Any]:
    """What the runs of a study are trained from and how they are measured, whatever the paths of files."""
    validating = checked.validating
    return {
        "arms": {arm.folder: checked.arms[arm.title].content for arm in study.variants},
        "measured": evaluation_by_content(checked.measuring),
        "tuning": None if validating is None else evaluation_by_content(validating),
        "files": files_by_content([*checked.measuring["files"], *(validating or {}).get("files", [])]),
    }


def check_earlier(study: Study, out: Path, checked: Checked, source: str | None) -> Earlier:
    """The recorded runs that count as done.

    Args:
        study, out: the study and its folder.
        checked: its pre-flight.
        source: folder with ``values.csv.gz`` and ``record.json`` of an earlier session; None for those that the study's
            folder took over before, if any.

    Raises:
        StudyError: if there are no such files, or their runs were trained or measured otherwise than the study's.
    """
    folder = out / EARLIER if source is None else Path(source)
    if source is None and not folder.is_dir():
        return Earlier(study, out)
    for name in (VALUES, RECORD):
        if not (folder / name).is_file():
            raise StudyError(f"{folder} has no {name}; resume from a folder with {VALUES} and {RECORD} of the study")
    earlier = read_earlier(study, out, folder)
    _check_record(study, folder, earlier, by_content(study, checked))
    runs: dict[Key, Figures] = {
        (run.arm.title, run.seed): earlier.figures(run) for run in _known(study, earlier) if not run.trial
    }
    check_examples(runs, study, folder / VALUES)
    if source is not None:
        _check_none_lost(study, out, earlier, folder)
    return earlier


def _known(study: Study, earlier: Earlier) -> list[Run]:
    return [run for run in study.possible_runs(earlier.out) if earlier.knows(run)]


def _check_record(study: Study, folder: Path, earlier: Earlier, now: Mapping[str, Any]) -> None:
    """Refuses runs that were trained or measured otherwise than those of the study."""
    note = folder / RECORD
    then = earlier.record.get(BY_CONTENT)
    if then is None or DIGEST not in earlier.record:
        raise StudyError(
            f"{note} does not hold digests of what its runs were trained from and measured on: an older version wrote"
            f" it. Train them again; or, where their folders still are, repeat halos ablate there to record them anew"
        )
    if not now["arms"].keys() & then["arms"].keys():
        raise StudyError(f"{note} is of another study, {earlier.record.get('study')}: it has none of this study's arms")
    for arm in study.variants:
        if then["arms"].get(arm.folder, content := now["arms"][arm.folder]) != content:
            raise StudyError(
                f"{note}: the runs of arm {arm.title!r} were trained with another config or other data than"
                f" {study.path}:{arm.line} names; restore those, give the arm another name, or do not resume from"
                f" {folder}"
            )
    for trial, key in ((False, "measured"), (True, "tuning")):
        runs = [
            run for run in study.possible_runs(earlier.out) if run.trial is trial and earlier.name(run) in earlier.runs
        ]
        runs = [run for run in runs if trial or earlier.figures(run)]
        if runs and (differ := _differ(now[key], then[key])):
            place = study.places["tune" if trial else "evaluate"]
            raise StudyError(
                f"{note}: {earlier.name(runs[0])} was measured differently than {place} says: {', '.join(differ)};"
                f" restore that, or do not resume from {folder}"
            )


def _differ(now: Mapping[str, Any] | None, then: Mapping[str, Any] | None) -> list[str]:
    """The arguments of an evaluation that differ; ``files`` if only the content of a file that they import does."""
    one, two = ((each or {}).get("evaluate", {}) for each in (now, then))
    keys = sorted(key for key in {*one, *two} if one.get(key) != two.get(key))
    return keys or (["files"] if now != then else [])


def _check_none_lost(study: Study, out: Path, earlier: Earlier, folder: Path) -> None:
    """Refuses to replace recorded runs by others that lack some of them."""
    before = read_earlier(study, out)
    decided = tuned(study, tuning_in(study, out, before).means)
    lost = [run for run in before.used([*study.trials(out), *decided.runs(out)]) if not earlier.knows(run)]
    if lost:
        raise StudyError(
            f"{folder} lacks {counted(len(lost), 'run')} of {out / EARLIER}, such as {before.name(lost[0])};"
            " resume without --resume_from, or name another --out"
        )


def adopt(earlier: Earlier, source: str) -> list[str]:
    """Copies the files of an earlier session into the study's folder.

    Returns:
        a line on how many runs count as done, and one on those that have a folder.
    """
    target = earlier.out / EARLIER
    target.mkdir(exist_ok=True)
    for name in (VALUES, RECORD):
        if not (target / name).exists() or not (target / name).samefile(Path(source) / name):
            shutil.copyfile(Path(source) / name, target / f"{name}.part")
            (target / f"{name}.part").replace(target / name)
    known = _known(earlier.study, earlier)
    folders = [run for run in known if has_folder(run)]
    lines = [f"{counted(len(known) - len(folders), 'run')} recorded in {source} count as done"]
    if folders:
        lines.append(
            f"{counted(len(folders), 'run')} with a folder in {earlier.out} take precedence over their recorded values,"
            f" such as {earlier.name(folders[0])}"
        )
    return lines


def unused(study: Study, earlier: Earlier) -> list[str]:
    """A line for each reason why recorded runs of a study, whose arms have their chosen values, are not used."""
    lines = []
    lacking = [run for run in study.runs(earlier.out) if earlier.figures(run) and not has_folder(run)]
    if lacking := [run for run in lacking if earlier.lacks(run)]:
        names = dict.fromkeys(metric for run in lacking for metric in earlier.lacks(run))
        lines.append(
            f"{counted(len(lacking), 'recorded run')} without {', '.join(names)} are not used, such as"
            f" {earlier.name(lacking[0])}; they are trained again"
        )
    for arm in study.arms:
        others = [
            run
            for run in study.possible_runs(earlier.out)
            if run.arm.name == arm.name and run.arm.folder != arm.folder and not run.trial and earlier.figures(run)
        ]
        if others and arm.decided:
            lines.append(
                f"{counted(len(others), 'recorded run')} of {arm.name} with {others[0].arm.candidate} are not used, as"
                f" {arm.candidate} is chosen now"
            )
    return lines
