"""Claims a folder for one study; it may contain no other study's runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halos_pl.common.files import write
from halos_pl.evaluation.files import FILE, measured_how
from halos_pl.study.adopt import by_content
from halos_pl.study.earlier import Earlier
from halos_pl.study.preflight import Checked
from halos_pl.study.spec import Study, StudyError
from halos_pl.study.state import BY_CONTENT, OVERRIDES, PLAN, STUDY, read_plan


def claim(study: Study, out: Path, checked: Checked, weak: str | None = None, earlier: Earlier | None = None) -> None:
    """Makes ``out`` the folder of this study.

    Args:
        study, out: the study and its folder.
        checked: its pre-flight.
        weak: why its planned power is hopeless, if it runs anyway; the report states it.
        earlier: recorded runs that it takes over; None if there are none.

    Raises:
        StudyError: if it belongs to another one, or contains runs that were trained or measured otherwise.
    """
    digests = checked.digests
    plan: dict[str, Any] = {
        "study": str(study.path),
        "overrides": None if study.overrides is None else str(study.overrides),
        "digests": {arm.folder: digests[arm.title] for arm in study.variants},
        "seeds": list(study.seeds),
        "primary": study.primary,
        **checked.measuring,
        "tuning": checked.validating,
        "anyway": weak,
        BY_CONTENT: by_content(study, checked),
    }
    # A metric chosen later may be the one with the best result.
    if earlier is not None and any(earlier.figures(run) for run in study.possible_runs(out) if not run.trial):
        plan |= {"primary": earlier.record.get("primary"), "anyway": weak or earlier.record.get("anyway")}
    if before := read_plan(out):
        _check_same(study, out, plan, before)
        plan["digests"] = {**before["digests"], **plan["digests"]}
        contents = plan[BY_CONTENT]
        contents["arms"] = {**before.get(BY_CONTENT, {}).get("arms", {}), **contents["arms"]}
        plan["anyway"] = plan["anyway"] or before.get("anyway")
        if any(run.measured and not run.trial for run in study.possible_runs(out)):
            plan["primary"] = before.get("primary")
    elif out.is_dir() and any(out.iterdir()):
        raise StudyError(f"{out} is not empty and is not a study's folder; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    write(out / PLAN, json.dumps(plan, indent=2) + "\n")
    for name, source in ((STUDY, study.path), (OVERRIDES, study.overrides)):
        if source is not None:
            write(out / name, source.read_text(encoding="utf-8"))
        else:
            (out / name).unlink(missing_ok=True)


def _check_same(study: Study, out: Path, plan: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuses a folder whose runs are not those of the plan.

    A study file with another name is the same study if they share a run, as when an arm was added or the file renamed.
    """
    same = any(before["digests"].get(folder) == digest for folder, digest in plan["digests"].items())
    others = any((out / folder).is_dir() for folder in before["digests"])
    if others and not same and Path(before["study"]).resolve() != study.path.resolve():
        raise StudyError(f"{out} contains the results of another study, {before['study']}; choose another --out")
    for arm in study.variants:
        folder = out / arm.folder
        if folder.is_dir() and before["digests"].get(arm.folder) != plan["digests"][arm.folder]:
            raise StudyError(
                f"{out} contains the results of another study: arm {arm.title!r} had another config or other data; name"
                f" another folder with --out, or remove {folder} to run the arm again"
            )
    for run in study.possible_runs(out):
        how = plan["tuning"] if run.trial else plan
        if run.done and any(how[key] != measured_how(run.folder).get(key) for key in ("evaluate", "files")):
            raise StudyError(
                f"{out} contains the results of another study: {run.folder} was measured differently or on other files;"
                f" name another folder with --out, or remove each {FILE} in it to measure again (and to train again if"
                " there is no checkpoint)"
            )
