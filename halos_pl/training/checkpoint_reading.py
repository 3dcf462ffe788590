"""Reads a run's checkpoints: verifies their bytes, and never runs code from them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from halos_pl.run_dir import LAST, PREVIOUS


class CheckpointError(ValueError):
    """A checkpoint is damaged, contains code, or is not from a halos run; the message names the file."""


@lru_cache(maxsize=8)
def _damage_of(path: Path, inode: int, size: int, changed: int) -> str | None:
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, size - 22))
        end = file.read(4)
    if not size:
        return "is empty"
    if start != b"PK\3\4":
        if start[:1] == b"\x80":
            return "is a bare pickle, which is never loaded, as it may run code"
        return f"is not a checkpoint, or its beginning is damaged (it begins with {start!r})"
    if end != b"PK\5\6":
        return "is damaged: it was cut off, or something was appended to it"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                return "is damaged: it contains an entry twice"
            if min((entry.header_offset for entry in entries), default=0):
                return "is damaged: bytes were inserted before its beginning"
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    return f"is damaged: the size of {entry.filename} is wrong"
            wrong = archive.testzip()
            return f"is damaged: the checksum of {wrong} is wrong" if wrong else None
    except Exception as error:  # zipfile raises many kinds for a damaged directory
        return f"is damaged: {error}"


def damage(path: Path) -> str | None:
    """How the bytes of a checkpoint are damaged; None if they are intact. ``torch.load`` verifies no checksum.

    Reads the whole file, at about 0.5 GB per second, unless this process has already read it.
    """
    status = path.stat()
    return _damage_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


def alternative(path: Path) -> str:
    """Suggests an intact checkpoint from the same folder, as the end of a message; empty if there is none."""
    for name in (LAST.name, PREVIOUS.name):
        other = path.with_name(name)
        if other.is_file() and not other.samefile(path) and not damage(other):
            return f"; {other} is intact: resume with --ckpt_path {other}"
    return ""


def read_checkpoint(path: Path, *, resume: bool = False, mmap: bool = False) -> dict[str, Any]:
    """Loads a checkpoint of a halos run to the CPU. Verifies its bytes and executes nothing in it.

    Args:
        path: the file.
        resume: whether it must contain everything that a fit needs to resume, not only the weights.
        mmap: whether to map the tensors instead of reading them, to inspect the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        CheckpointError: if the file is damaged, would run code, or is not from a halos run.
    """
    if wrong := damage(path):
        raise CheckpointError(f"{path} {wrong}{alternative(path)}")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        name = refused_class(error)
        what = f"contains an object of {name}" if name else f"contains more than tensors and plain values ({error})"
        what = what.splitlines()[0]
        raise CheckpointError(
            f"{path} {what}: loading it could run code, so it is refused{alternative(path)}"
        ) from error
    except Exception as error:  # torch raises many kinds for other programs' files
        what = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not a checkpoint of a halos run: {what}{alternative(path)}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(str(name).startswith(("scorer.", "objective.")) for name in state):
        is_dict = isinstance(content, dict)
        inside = ", ".join(list(map(str, state or content))[:3]) if is_dict else type(content).__name__
        raise CheckpointError(f"{path} is not a checkpoint of a halos run; it contains {inside}{alternative(path)}")
    missing = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in content]
    if resume and missing:
        raise CheckpointError(
            f"{path} contains only weights (no {', '.join(missing)}), so a fit cannot resume from it; export it and"
            f" train the exported model{alternative(path)}"
        )
    if resume and (wrong := _malformed_entry(content)):
        raise CheckpointError(f"{path} cannot be resumed from: its entry {wrong} is malformed{alternative(path)}")
    checkpoint: dict[str, Any] = content
    return checkpoint


def refused_class(error: pickle.UnpicklingError) -> str | None:
    """The class or function that ``torch.load(weights_only=True)`` refused to load, if the error names one."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1] if name else None


def _malformed_entry(checkpoint: Mapping[str, Any]) -> str:
    """The first entry from which a fit cannot resume; empty if there is none."""
    loops = checkpoint["loops"].get("fit_loop") if isinstance(checkpoint["loops"], Mapping) else None
    counts = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    if not isinstance(loops, Mapping) or not all(isinstance(loops.get(name), Mapping) for name in counts):
        return "loops"
    for name in ("optimizer_states", "lr_schedulers"):
        if not isinstance(checkpoint[name], list) or not all(isinstance(state, Mapping) for state in checkpoint[name]):
            return name
    return "" if checkpoint["optimizer_states"] else "optimizer_states"


def refuse_code(weights_only: bool | None) -> None:
    """Refuses ``weights_only=False``.

    Raises:
        CheckpointError: if it is False.
    """
    if weights_only is False:
        raise CheckpointError(
            "weights_only is false, but a checkpoint is never loaded in a way that could run its code; remove"
            " --weights_only"
        )
