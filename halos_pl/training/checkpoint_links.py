"""The names of a run's checkpoints, which may be files, folders, or links to folders.

A folder cannot replace another one atomically, but a link can. So ``last.ckpt`` and ``previous.ckpt`` of a sharded run
are relative links to folders called ``step-N``. Other names are folders; one that replaces another takes its name once
the other is renamed. A kill in between leaves both complete, and :func:`recover` gives the new one its name.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from halos_pl.common.files import PART, remove, sync

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
    set_aside(link)  # copying the run has resolved its links
    os.replace(beside, link)


def keep_as(name: Path, aside: Path) -> None:
    """Gives a checkpoint a second name; where the file system has links, ``name`` exists throughout."""
    if name.is_symlink():
        point(aside, os.readlink(name))
        return
    set_aside(aside)
    beside = aside.with_name(f"{aside.name}{PART}")
    remove(beside)
    try:
        os.link(name, beside)
        os.replace(beside, aside)
    except OSError:  # no hard links, or a folder
        os.replace(name, aside)


def part_of(path: Path, step: int, rotate: bool) -> Path:
    """The name of a folder while it is written, another one each time, as network file systems cache names.

    Args:
        path: name of the checkpoint.
        step: step of the checkpoint.
        rotate: whether ``path`` will be a link to the folder.
    """
    return path.with_name(f"{f'step-{step}' if rotate else path.name}.{step}{PART}")


def set_aside(path: Path, *, folder: bool = False) -> Path:
    """Renames a checkpoint that another one cannot replace, so that this can take its name.

    Args:
        path: the checkpoint, if it exists.
        folder: whether the other one is a folder, which can replace neither a file nor a link.

    Returns:
        Its new name. After a kill, :func:`recover` undoes this.
    """
    old = path.with_name(f"{path.name}{_OLD}")
    if os.path.lexists(path) and (folder or (path.is_dir() and not path.is_symlink())):
        remove(old)
        os.rename(path, old)
    return old


def replace_folder(part: Path, path: Path) -> None:
    """Gives a complete folder the name ``path``, which an earlier checkpoint may have."""
    old = set_aside(path, folder=True)
    try:
        os.rename(part, path)
    except FileNotFoundError:
        if not path.is_dir():  # otherwise another process has recovered it meanwhile
            raise
    sync(path.parent)
    remove(old)


def recover(path: Path) -> None:
    """Gives a checkpoint its name if a kill has prevented that, and no other checkpoint has the name."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    pattern = re.compile(rf"{re.escape(path.name)}\.(\d+){re.escape(PART)}")
    parts = {int(m[1]): part for part in path.parent.iterdir() if (m := pattern.fullmatch(part.name))}
    complete = [step for step, part in parts.items() if (part / MANIFEST).is_file()]  # written last
    with suppress(OSError):  # there is none, another process was faster, or the folder is read-only
        os.rename(parts[max(complete)] if complete else path.with_name(f"{path.name}{_OLD}"), path)


def recover_all(folder: Path) -> None:
    """Recovers the checkpoints in a folder, and removes what killed processes have left there."""
    for left in list(folder.glob(f"*{PART}")):
        recover(folder / re.sub(rf"(\.\d+|\.old){re.escape(PART)}$", "", left.name))
    for left in folder.glob(f"*{PART}"):
        remove(left)


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
