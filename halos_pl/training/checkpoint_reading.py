"""Reads a run's checkpoints: verifies their bytes, and never runs code from them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from halos_pl.run_dir import LAST, PREVIOUS
from halos_pl.training.checkpoint_manifest import REST, Manifest, read_manifest, wrong_digest, wrong_files
from halos_pl.training.checkpoint_shards import Shards
from halos_pl.training.checkpoint_tree import put


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

    Reads all of it, a file at about 0.5 GB per second, unless this process has already read it.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        return manifest if isinstance(manifest, str) else wrong_files(manifest) or wrong_digest(manifest)
    status = path.stat()
    return _damage_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


def alternative(path: Path) -> str:
    """Suggests an intact checkpoint from the same folder, as the end of a message; empty if there is none."""
    for name in (LAST.name, PREVIOUS.name):
        other = path.with_name(name)
        if other.exists() and not other.samefile(path) and not damage(other):
            return f"; {other} is intact: resume with --ckpt_path {other}"
    return ""


def read_checkpoint(
    path: Path, *, resume: bool = False, mmap: bool = False, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Loads a checkpoint of a halos run, a file or a folder, to the CPU. Verifies its bytes and runs no code in it.

    Args:
        path: the checkpoint.
        resume: whether it must contain everything that a fit needs to resume, not only the weights.
        mmap: whether to inspect it only: the tensors of a file are mapped, not read; the shards of a folder are neither
            read nor verified, and their tensors are on the meta device.
        only: the entries whose tensors are needed, such as ``state_dict``; those of other entries of a folder are on
            the meta device. Default: all.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if it is damaged, would run code, or is not from a halos run.
    """
    manifest = read_manifest(path) if path.is_dir() else None
    if isinstance(manifest, Manifest):
        wrong = wrong_files(manifest) or wrong_digest(manifest, only=[REST] if mmap else None)
    else:
        wrong = manifest or damage(path)
    if wrong:
        raise CheckpointError(f"{path} {wrong}{alternative(path)}")
    file = manifest.folder / REST if isinstance(manifest, Manifest) else path
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and file is path)
        if isinstance(manifest, Manifest):
            _put_tensors(content, manifest, () if mmap else only)
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


def step_of(path: Path) -> int:
    """The number of optimizer steps after which a checkpoint was saved; for the errors see :func:`read_checkpoint`."""
    return int(read_checkpoint(path, mmap=True)["global_step"])


def check_checkpoint(path: Path, *, resume: bool, alone: bool) -> None:
    """Refuses a checkpoint that cannot be used, before data and model are loaded.

    Args:
        path: the checkpoint.
        resume: whether a fit is to resume from it.
        alone: whether this process is the only one so far. Otherwise the shards of a folder are only verified when the
            ranks load them, as they share that work then and fail together.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if it cannot be used.
    """
    read_checkpoint(path, resume=resume, mmap=True)
    if alone and (wrong := damage(path)):
        raise CheckpointError(f"{path} {wrong}{alternative(path)}")


def _put_tensors(content: Any, manifest: Manifest, only: Collection[str] | None) -> None:
    wanted = [entry for entry in manifest.entries if only is None or entry.path[0] in only]
    whole: dict[str, torch.Tensor] = {}
    with Shards(manifest.folder, manifest.shards if wanted else ()) as shards:
        for entry in wanted:
            if entry.key not in whole:
                whole[entry.key] = shards.whole(entry.key, entry.shape, entry.dtype)
            put(content, entry.path, whole[entry.key])
    for entry in manifest.entries:
        if only is not None and entry.path[0] not in only:
            put(content, entry.path, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))


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
