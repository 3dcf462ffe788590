"""The state of online training in its folder: the settings that it began with, and the stages that are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.files import write
from halos_pl.evaluation.files import ANSWERS, FILE
from halos_pl.rounds.spec import OFFLINE, Round, Rounds, RoundsError
from halos_pl.run_dir import LAST, shortfall
from halos_pl.training.checkpoint_manifest import file_digest

#: Column of the held-out answers to label: the name of their row.
ROW = "held_out_row"
PLAN, FINISHED, STUDY = "plan.json", "stages.json", "rounds.yaml"


def claim(study: Rounds, out: Path, settings: Mapping[str, Any]) -> None:
    """Makes ``out`` the folder of these settings.

    Raises:
        RoundsError: It belongs to others; names the setting that differs.
    """
    plan = out / PLAN
    if plan.is_file():
        earlier: Mapping[str, Any] = json.loads(plan.read_text(encoding="utf-8"))["settings"]
        for key in dict.fromkeys([*earlier, *settings]):
            before, now = earlier.get(key), settings.get(key)
            if before == now:
                continue
            if key == "rounds" and before is None:  # an offline run was added
                continue
            if before is None and key == OFFLINE:
                continue
            raise RoundsError(
                f"{out}: {key} was {_shown(before)} in the rounds there and is {_shown(now)} now; restore it to"
                " continue them, or name another folder with --out"
            )
        if (begun := sorted(out.glob("round-*"))) and len(begun) > study.rounds:
            raise RoundsError(
                f"{out}: rounds is {study.rounds}, but {len(begun)} rounds have begun there; raise it to continue them,"
                " or name another folder with --out"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise RoundsError(f"{out} is not empty and is not a folder of rounds; name another one with --out")
    out.mkdir(parents=True, exist_ok=True)
    write(plan, json.dumps({"study": str(study.path), "settings": settings}, indent=2) + "\n")
    write(out / STUDY, study.path.read_text(encoding="utf-8"))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def finished(each: Round) -> dict[str, Any]:
    """The finished stages of a round: seconds and the digest of the output, by stage."""
    path = each.folder / FINISHED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def output(each: Round, stage: str) -> Path:
    """The file that a stage writes last."""
    return {
        "sample": each.samples,
        "label": each.labels,
        "fit": each.run / LAST,
        "evaluate": each.run / FILE,
        "score": each.scores,
        "export": each.model,
    }[stage]


def record(each: Round, stage: str, seconds: float) -> None:
    """Records that a stage is finished.

    Raises:
        RoundsError: It has no output.
    """
    path = output(each, stage)
    if stage == "fit" and (short := shortfall(each.run)):
        raise RoundsError(f"{each.name}: {stage}: {short}")
    if not path.exists():
        raise RoundsError(f"{each.name}: {stage}: {path} is missing, though the command succeeded")
    stages = finished(each)
    stages[stage] = {"seconds": round(seconds, 1)}
    if path.suffix in (".jsonl", ".json") and path.is_file():
        stages[stage]["sha256"] = file_digest(path)
    write(each.folder / FINISHED, json.dumps(stages, indent=2) + "\n")


def check_outputs(each: Round) -> None:
    """Refuses outputs of finished stages that have changed since.

    Raises:
        RoundsError: Names the file.
    """
    for stage, recorded in finished(each).items():
        path = output(each, stage)
        if "sha256" in recorded and (not path.is_file() or file_digest(path) != recorded["sha256"]):
            what = "has changed since" if path.is_file() else "is missing, though it was written by"
            raise RoundsError(
                f"{path} {what} stage {stage} of {each.name}; restore it, or remove {each.folder} and the folders of"
                " later rounds to repeat them"
            )


def answers_of(each: Round) -> list[dict[str, Any]]:
    """The held-out answers of a round, and those of the first model in ``before``."""
    with (each.run / ANSWERS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
