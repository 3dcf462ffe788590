"""The names of a run's checkpoints, which may be files, folders, or links to folders.

A folder cannot replace another one atomically, but a link can. So ``last.ckpt`` and ``previous.ckpt`` of a sharded run
are relative links to folders called ``step-N``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from halos_pl.common.files import PART, remove

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step-\d+(-\d+)?")
_OLD = f".old{PART}"


def folder_for(parent: Path, step: int) -> Path:
    """A free name for the folder of a step's checkpoint."""
    folder, number = parent / f"step-{step}", 1
    while os.path.lexists(folder):
        number += 1
        folder = parent / f"step-{step}-{number}"
    return folder


def point(link: Path, target: str) -> None:
    """Makes ``link`` a link to ``target``, relative to its own folder; it exists throughout, unless it is a folder now.

    Raises:
        OSError: if the file system has no symbolic links.
    """
    beside = link.with_name(f"{link.name}.link{PART}")
    remove(beside)
    try:
        beside.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise OSError(
            f"{link.parent} is on a file system without symbolic links, which the checkpoints of a sharded run need;"
            " choose another run_dir"
        ) from error
    if link.is_dir() and not link.is_symlink():  # copying the run has resolved its links
        os.rename(link, link.with_name(f"{link.name}{_OLD}"))
    os.replace(beside, link)


def keep_as(name: Path, aside: Path) -> None:
    """Gives a checkpoint a second name; where the file system has links, ``name`` exists throughout."""
    if name.is_symlink():
        point(aside, os.readlink(name))
        return
    if aside.is_dir() and not aside.is_symlink():
        os.rename(aside, aside.with_name(f"{aside.name}{_OLD}"))
    beside = aside.with_name(f"{aside.name}{PART}")
    remove(beside)
    try:
        os.link(name, beside)
        os.replace(beside, aside)
    except OSError:  # no hard links, or a folder
        os.replace(name, aside)


def remove_unused(parent: Path) -> None:
    """Removes the folders of older checkpoints, which no link in ``parent`` points to."""
    used = {path.resolve() for path in parent.iterdir() if path.is_symlink()}
    for path in parent.iterdir():
        unused = _FOLDER.fullmatch(path.name) and path.resolve() not in used and (path / MANIFEST).is_file()
        if unused or path.name.endswith(_OLD):
            remove(path)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, if it exists; a folder that another link points to stays."""
    remove(path)
    if path.parent.is_dir():
        remove_unused(path.parent)
