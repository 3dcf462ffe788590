"""The model card of an exported model, and its upload to the hub."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from halos_pl.cli.verdicts import formula
from halos_pl.common.experiments import OBJECTIVES_TABLE
from halos_pl.common.files import write
from halos_pl.common.yaml_files import read_yaml
from halos_pl.evaluation.files import FILE, MEASURED
from halos_pl.provenance import own_revision
from halos_pl.run_dir import CONFIG, SUMMARY, TEST, shortfall
from halos_pl.study.markdown import fence, markdown

CARD = "README.md"
#: Marks a card that a later export may replace.
_MARK = "<!-- Written by halos export. -->"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def write_card(run: str, folder: Path, command: Sequence[str], step: int | None = None) -> None:
    """Writes the model card ``README.md``, unless the folder has one of another author.

    Args:
        run: Name of the exported model; a run's folder for most of the content.
        folder: Folder of the export.
        command: Words of the command line of the export.
        step: Optimizer step of the exported checkpoint, for a run.
    """
    path = folder / CARD
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        print(f"halos: kept {path}, which halos export has not written")
        return
    write(path, model_card(run, folder.resolve().name, command, step))


def model_card(run: str, title: str, command: Sequence[str], step: int | None = None) -> str:
    """The text of a model card: base, objective with its verdict, data with their hashes, figures and commands.

    Args:
        run: Name of the exported model.
        title: Title of the card.
        command: Words of the command line of the export.
        step: Optimizer step of the exported checkpoint, for a run. Figures of other steps are left out.
    """
    home = Path(run)
    is_run = (home / CONFIG).is_file() and not (home / "config.json").is_file()
    config = read_yaml(home / CONFIG)[0] if is_run else {}
    base = str(config["model"]["policy"]["path"]) if is_run else run
    on_hub = _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()
    data = ModelCardData(base_model=base if on_hub else None, library_name="transformers", tags=["halos_pl"])
    name = base if on_hub or base.startswith("package:") else Path(base).name  # paths of this machine tell nothing
    lines = ["---", data.to_yaml(), "---", _MARK, "", f"# {markdown(title)}", "", f"- Base model: {markdown(name)}"]
    if is_run:
        lines += _objective(config, home)
        lines += _training(home, step)
    joined = shlex.join(Path(word).resolve().name if Path(word).exists() else word for word in command)
    commands = [
        "halos fit --config config.yaml  # the file in the run's folder, which this folder does not contain"
    ] * is_run + [joined]
    marks = fence(joined)
    lines += ["", "## Commands", "", f"{marks}bash", *commands, marks, "", f"Made with halos_pl {own_revision()}."]
    return "\n".join(lines) + "\n"


def _objective(config: Mapping[str, Any], run: Path) -> list[str]:
    model = config["model"]
    text = formula(model)
    lines = [f"- Objective: `{text}`"]
    shipped = json.loads(OBJECTIVES_TABLE.read_text(encoding="utf-8"))
    row = next((row for row in shipped if row["formula"] == text), None)
    if row is not None:
        lines.append(f"- Shipped as: {row['name']}")
        verdict = row["verdict"]["icml"]
    else:
        from halos_pl.conformance.check import reports
        from halos_pl.training.trained import module_of_run

        verdict = reports(module_of_run(run).objective)["icml"].verdict
    lines.append(f"- Verdict of `halos check`: {verdict}")
    lora = model["policy"].get("lora")
    return [*lines, f"- Trained: a LoRA adapter of rank {lora['r']}" if lora else "- Trained: all weights"]


def _training(run: Path, step: int | None) -> list[str]:
    """The lines on data and figures, from the files in a run's folder."""
    summary = _json(run / SUMMARY)
    lines = []
    if reason := shortfall(run):
        lines.append(f"- Training: not finished; {reason}")
    total = summary.get("steps")
    if step is not None:
        lines.append(f"- Optimizer steps: {step}" + (f" of the run's {total}" if total not in (None, step) else ""))
    if summary.get("digests"):
        lines += ["", "## Training data", "", "| source | hash of its content |", "|---|---|"]
        lines += [f"| {markdown(Path(str(name)).name)} | `{digest}` |" for name, digest in summary["digests"].items()]
    figures = list(_figures(run, summary, step))
    if figures:
        lines += ["", "## Figures", "", "| figure | value | source |", "|---|---|---|", *figures]
    return lines


def _figures(run: Path, summary: Mapping[str, Any], step: int | None) -> Iterator[str]:
    """The rows of figures of ``step``. Prints which figures of other weights are left out."""
    tested, how = _json(run / TEST), _json(run / MEASURED)
    tested_at, evaluated_at = tested.pop("step", None), None if "model" in how else how.get("step")
    evaluated = {name: values for name, values in _json(run / FILE).items() if isinstance(values, dict) and values}
    means = {name: f"{fmean(each.values()):.4g} (n = {len(each)})" for name, each in evaluated.items()}
    trained = summary.get("metrics") or {}
    for source, at, figures in (
        ("last step", summary.get("steps"), {name: f"{value:.4g}" for name, value in trained.items()}),
        ("halos test", tested_at, {name: f"{value:.4g}" for name, value in tested.items()}),
        ("halos evaluate", evaluated_at, means),
    ):
        if at == step:
            yield from (f"| {markdown(name)} | {value} | {source} |" for name, value in figures.items())
        elif figures:
            of = "an unknown step" if at is None else f"step {at}"
            print(f"halos: the model card leaves out the figures of {source}: they are of {of}, not of step {step}")


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def check_repository(name: str) -> None:
    """Refuses a repository that cannot be written, before any work.

    Raises:
        OSError: The name is invalid, the hub cannot be reached, or nobody is logged in.
    """
    try:
        validate_repo_id(name)
        HfApi().whoami()
    except Exception as error:
        raise OSError(f"--push_to_hub {name}: {_line(error)}") from error


def push(folder: Path, name: str) -> None:
    """Uploads a folder to a repository of the hub, which is created as a private one if there is none.

    Raises:
        OSError: The upload failed; the folder stays.
    """
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        place = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Model of halos export", ignore_patterns=[".*"]
        )
    except Exception as error:
        raise OSError(
            f"--push_to_hub {name}: {_line(error)}; {folder} is complete: upload it with hf upload {name} {folder}"
        ) from error
    print(f"halos: uploaded {folder} to {place}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
