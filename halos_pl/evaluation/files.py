"""The files of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from halos_pl.data.example import DataError

FILE = "evaluation.json"
BEFORE = "before.json"  #: the same for a run's model before training
MEASURED = "measured.json"  #: the settings and the data of the evaluation
ROWS = "held_out.jsonl"
ANSWERS = "answers.jsonl"
WIN_RATE = "win_rate.json"  #: the report on a judge's verdicts
VERDICTS = "verdicts.jsonl"  #: each reply of the judge, and how it was read
TRANSCRIPTS = "transcripts.jsonl"  #: requests to the judge and its replies, which later evaluations reuse
#: Folders of lm-eval's files: of the model, and of a run's model before training.
BENCHMARKS, BENCHMARKS_BEFORE = "benchmarks", "benchmarks_before"
#: Files and folders that an evaluation replaces, or removes if it has no such results.
OUTPUTS = (FILE, BEFORE, MEASURED, ROWS, ANSWERS, WIN_RATE, VERDICTS, BENCHMARKS, BENCHMARKS_BEFORE)


def trained_on(run: Path, metric: str) -> str | None:
    """How many questions of a benchmark the run's training data contain, in words; None if none."""
    tasks: dict[str, dict[str, Any]] = measured_how(run).get("tasks") or {}
    return tasks.get(metric.partition("/")[0], {}).get("trained_on")


def measured_how(run: Path) -> dict[str, Any]:
    """How a run was measured; empty if unknown.

    Its ``evaluate`` arguments, digests of ``files``, the ``step`` of its checkpoint, and code (``by``).

    Raises:
        DataError: if the file is damaged; names it.
    """
    path = run / MEASURED
    how = read_object(path) if path.is_file() else {}
    tasks = how.get("tasks") or {}
    parts = {"evaluate": how.get("evaluate", {}), "files": how.get("files", {}), "tasks": tasks}
    parts |= {f"tasks.{name}": task for name, task in tasks.items()} if isinstance(tasks, dict) else {}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise DataError(f"{path} is damaged ({name} is no object); run halos evaluate again")
    return how


def read_object(path: Path, cure: str = "run halos evaluate again") -> dict[str, Any]:
    """The JSON object in one of the files.

    Args:
        path: the file.
        cure: what to do if it is damaged.

    Raises:
        DataError: if there is none; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); {cure}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged (no object, but {type(content).__name__}); {cure}")
    return content


def refuse_loss(folder: Path, inputs: Iterable[str], transcripts: Path | None = None) -> None:
    """Refuses a folder in which an evaluation would replace files that it reads, or that no evaluation wrote.

    Args:
        folder: the folder to write to.
        inputs: what is read: files, folders or patterns.
        transcripts: the file that replies of a judge are added to; None without one.

    Raises:
        DataError: names the file.
    """
    outputs = [folder / name for name in OUTPUTS]
    written = [*outputs, transcripts] if transcripts else outputs
    clashes = [(text, output) for text in inputs for output in written if _is_read(text, output)]
    clashes += [(str(transcripts), output) for output in outputs if transcripts and _is_read(str(transcripts), output)]
    for text, output in clashes:
        raise DataError(f"{text} is an input, but {output} would be written; name another folder with --out")
    is_earlier = _is_evaluation(folder)
    for output in outputs:
        is_folder = output.name in (BENCHMARKS, BENCHMARKS_BEFORE)
        if not output.exists() or (is_folder and output.is_dir() and not any(output.iterdir())):
            continue
        if not is_earlier or is_folder != output.is_dir() or (is_folder and not (output / "results.json").is_file()):
            raise DataError(
                f"{output} would be replaced, but is from no earlier evaluation; move it, or name another folder with"
                " --out"
            )


def keep_earlier(folder: Path, arguments: Mapping[str, Any]) -> Path | None:
    """Moves the results of an earlier evaluation with other arguments into a folder beside them.

    Args:
        folder: the folder to write to.
        arguments: the recorded arguments of this evaluation.

    Returns:
        the new folder ``evaluation.N``; None if there are no such results.
    """
    if not (folder / FILE).is_file() or measured_how(folder).get("evaluate") == json.loads(json.dumps(arguments)):
        return None
    place = next(each for n in count(1) if not (each := folder / f"evaluation.{n}").exists())
    place.mkdir()
    for name in reversed(OUTPUTS):  # FILE last, so that a move that is interrupted goes on
        if (folder / name).exists():
            (folder / name).replace(place / name)
    return place


def _is_read(text: str, output: Path) -> bool:
    """Whether a file, folder or pattern includes an output or lies in it. Patterns match outputs to come as well."""
    read, place = Path(text).resolve(), output.resolve()
    return read == place or place in read.parents or place.match(str(read))


def _is_evaluation(folder: Path) -> bool:
    """Whether an evaluation, even an unfinished one, wrote to a folder."""
    try:
        return "evaluate" in measured_how(folder)
    except (DataError, OSError):
        return False
