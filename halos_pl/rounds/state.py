"""The state of online training in its folder: the settings that it began with, and the stages that are finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.files import part_of, write
from halos_pl.evaluation.files import ANSWERS, FILE
from halos_pl.rounds.spec import OFFLINE, TEXT, Round, Rounds, RoundsError
from halos_pl.run_dir import LAST, shortfall
from halos_pl.training.checkpoint_manifest import file_digest

#: Column of the held-out answers to label: the name of their row.
ROW = "held_out_row"
PLAN, FINISHED, STUDY = "plan.json", "stages.json", "rounds.yaml"


def claim(study: Rounds, out: Path, settings: Mapping[str, Any]) -> None:
    """Makes ``out`` the folder of these settings if it is new.

    Raises:
        RoundsError: It belongs to others; names the setting that differs.
    """
    if (out / PLAN).is_file():
        _compare(study, out, settings)
    elif out.is_dir() and any(out.iterdir()):
        raise RoundsError(f"{out} is not empty and is not a folder of rounds; name another one with --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write(study, out, settings)


def bind(study: Rounds, out: Path, settings: Mapping[str, Any]) -> None:
    """Records the settings that the next stages use. Call it while no other process works on ``out``.

    Raises:
        RoundsError: Another process has begun a stage with others; names the setting that differs.
    """
    _compare(study, out, settings)
    _write(study, out, settings)


def _write(study: Rounds, out: Path, settings: Mapping[str, Any]) -> None:
    write(out / PLAN, json.dumps({"study": str(study.path), "settings": settings}, indent=2) + "\n")
    write(out / STUDY, study.path.read_text(encoding="utf-8"))


def _compare(study: Rounds, out: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a setting that has changed since a stage has used it."""
    earlier: Mapping[str, Any] = json.loads((out / PLAN).read_text(encoding="utf-8"))["settings"]
    for key in dict.fromkeys([*earlier, *settings]):
        before, now = earlier.get(key), settings.get(key)
        stage = _first_stage(key)
        if before == now or (path := _begun(study, out, stage)) is None:
            continue
        shown = _shown(before, now)
        first = Round(study, out, 1)
        again = "" if stage == OFFLINE or stage in finished(first) else f", remove {path} to repeat {stage}"
        raise RoundsError(
            f"{out}: {key} was {shown[0]} in the rounds there and is {shown[1]} now; restore it to continue"
            f" them{again}, or name another folder with --out"
        )
    if (begun := sorted(out.glob("round-*"))) and len(begun) > study.rounds:
        raise RoundsError(
            f"{out}: rounds is {study.rounds}, but {len(begun)} rounds have begun there; raise it to continue them,"
            " or name another folder with --out"
        )


def _first_stage(key: str) -> str:
    """The first stage that uses a setting."""
    if key in (OFFLINE, "rounds"):
        return OFFLINE
    if key.startswith(("label.", "the content of label.")):
        return "label"
    if key in ("reference", "optimizer") or (key.startswith("fit: ") and key.removeprefix("fit: data.") not in TEXT):
        return "fit"
    if key in ("held_out_prompts", "answers") or key.startswith(("evaluate.", "the content of evaluate.")):
        return "evaluate"
    return "sample"


def _begun(study: Rounds, out: Path, stage: str) -> Path | None:
    """The output of a stage of the first round, or of the offline run; None if it has not begun."""
    if stage == OFFLINE:
        folder = Round(study, out, 0).folder
        return folder if folder.exists() else None
    first = Round(study, out, 1)
    path = output(first, stage)
    if stage in finished(first) or path.exists():
        return path
    part = part_of(path)
    return part if part.is_file() and part.stat().st_size else None


def _shown(before: Any, now: Any) -> tuple[str, str]:
    """Two settings as JSON; if they are long, from shortly before the place where they differ."""
    texts = json.dumps(before), json.dumps(now)
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - 20) if max(map(len, texts)) > 60 else 0
    cut = [f"{'...' if start else ''}{text[start:]}" for text in texts]
    one, other = (text if len(text) <= 60 else f"{text[:57]}..." for text in cut)
    return one, other


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
