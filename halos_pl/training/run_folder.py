"""The folder of a run: its name, whether a fit can write to it, and what happens to an earlier run in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from halos_pl.run_dir import LAST
from halos_pl.training.run_lock import refuse_held
from halos_pl.training.run_log import METRICS


def holds_run(run_dir: Path) -> bool:
    """Whether a folder contains an earlier fit."""
    return any((run_dir / mark).exists() for mark in (LAST, METRICS))


def named_run_dir(name: str) -> Path:
    """The run folder named in a config, where no shell expands ``~`` or variables.

    Raises:
        ValueError: if the name is empty or contains a variable.
    """
    if not name:
        raise ValueError('run_dir is empty; name a folder ("." is the current one)')
    if variable := re.search(r"\$(\w+|\{.*?\})", name):
        raise ValueError(
            f"run_dir is {name!r}, but a config does not expand variables such as {variable[0]}; write out the path, or"
            " set --run_dir on the command line, unquoted"
        )
    return Path(name).expanduser()


def check_run_dir(run_dir: Path, goes_on: bool) -> None:
    """Refuses a folder that a fit could not write to, before any work is done.

    Raises:
        OSError: if it is not a folder, is not writable, or contains an earlier run that cannot be renamed, or another
            process is writing to it.
    """
    folder = run_dir.resolve()
    if run_dir.is_symlink() and not folder.exists():
        raise FileNotFoundError(f"--run_dir {run_dir} is a link to {folder}, which does not exist; create that folder")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--run_dir {run_dir}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--run_dir {run_dir}: {there} is not writable; name another folder")
    refuse_held(folder, "fit")
    if not goes_on and holds_run(folder):
        _check_movable(run_dir)


def _check_movable(run_dir: Path) -> None:
    folder = run_dir.resolve()
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(
            f"--run_dir {run_dir} contains an earlier run and the working folder, so it cannot be renamed; name another"
            " folder, or resume that run with --ckpt_path last"
        )
    for command in ("test", "predict"):
        refuse_held(folder, command)


def move_aside(run_dir: Path) -> Path | None:
    """Renames a folder that contains an earlier run to the first free ``NAME.1``, ``NAME.2``, ...

    Returns:
        the new name; None if there is nothing to rename.

    Raises:
        FileExistsError: if the folder cannot be renamed, or another process is writing to it.
    """
    if not holds_run(run_dir):
        return None
    _check_movable(run_dir)
    folder, number = run_dir.resolve(), 1  # a link keeps pointing to the run
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    try:
        os.rename(folder, aside)
    except OSError as error:  # a mounted folder, or one in a read-only folder
        raise FileExistsError(
            f"--run_dir {run_dir} contains an earlier run, which cannot be renamed to {aside} ({error.strerror}); name"
            " another folder"
        ) from error
    rank_zero_info(
        f"halos: renamed the earlier run in {run_dir} to {aside} (to resume it: --run_dir {aside} --ckpt_path last)"
    )
    return aside
