"""Finds a run's last or best checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from halos_pl.run_dir import LAST, PREVIOUS
from halos_pl.training.checkpoint_links import recover
from halos_pl.training.checkpoint_reading import CheckpointError, alternative, read_checkpoint


def find_checkpoint(run: Path, name: str | None = None) -> Path:
    """A run's checkpoint, a file or a folder.

    Args:
        run: the run's folder.
        name: ``last`` (or None), ``best`` (according to the run's ``ModelCheckpoint``), or a path.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if the run does not record which checkpoint is best, or the file cannot be used.
    """
    last, previous = run / LAST, run / PREVIOUS
    recover(last)
    if name in (None, "last"):
        if last.exists() or not previous.exists():
            return _existing(last, f"{run} is not the folder of a run that has reached a checkpoint")
        rank_zero_info(f"halos: {last} does not exist; using {previous}")
        return previous
    if name != "best":
        return _existing(Path(str(name)), "a checkpoint is last, best, or a path")
    return _best(run)


def _best(run: Path) -> Path:
    """The best checkpoint by the metric that the run's ModelCheckpoint monitors.

    Its path is recorded in ``last.ckpt``. If that file is gone, because the fit has found a better one since, the
    newest other checkpoint names it.
    """
    last = find_checkpoint(run)
    others = sorted({*last.parent.rglob("*.ckpt")} - {last}, key=lambda path: -path.stat().st_mtime)
    gone = ""
    for number, path in enumerate((last, *others)):
        try:
            states = read_checkpoint(path, mmap=True).get("callbacks", {}).values()
        except CheckpointError:
            if not number:
                raise
            continue
        kept = [state for state in states if isinstance(state, Mapping) and "best_model_path" in state]
        monitored = {state["best_model_path"]: state for state in kept if state.get("monitor")}
        monitored.pop("", None)
        if len(monitored) != 1:
            if number:
                continue
            raise CheckpointError(f"cannot tell which checkpoint is best: {_why_unclear(run, kept, monitored)}")
        name, state = monitored.popitem()
        parts = Path(name).parts[Path(name).is_absolute() :]
        # The run's folder may have been renamed since, and another run may have taken its place.
        inside = (run.joinpath(*parts[first:]) for first in range(len(parts)))
        for best in (*inside, Path(name)):
            recover(best)
            if best.exists():
                score = state.get("best_model_score")
                of = f" ({float(score):.6g})" if score is not None else ""
                rank_zero_info(f"halos: {best} is the best checkpoint of {run} by {state['monitor']}{of}")
                return best
        gone = gone or name
    raise FileNotFoundError(f"{gone} does not exist; it was the best checkpoint of {run}")


def _why_unclear(run: Path, kept: Sequence[Mapping[str, Any]], monitored: Mapping[str, Mapping[str, Any]]) -> str:
    if monitored:
        each = ", ".join(f"{path} (by {state['monitor']})" for path, state in sorted(monitored.items()))
        return f"the ModelCheckpoints of {run} have one each: {each}; name one of these files"
    if any(state.get("monitor") for state in kept):
        return f"the ModelCheckpoint of {run} has not saved any yet"
    if kept:
        return f"the ModelCheckpoint of {run} monitors nothing; name a file, or give it a monitor"
    return f"{run} was trained without a ModelCheckpoint; use last, or name a file"


def _existing(path: Path, why: str) -> Path:
    recover(path)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is not a file or a folder{alternative(path)}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {why}")
    return path
