"""The manifest of a folder checkpoint: its files with their digests, and its tensors. Nothing here runs code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from halos_pl.common.files import sync
from halos_pl.training.checkpoint_links import MANIFEST
from halos_pl.training.checkpoint_shards import SUFFIX
from halos_pl.training.checkpoint_tree import Entry

#: Everything but the large tensors, for ``torch.load(weights_only=True)``.
REST = "rest.pt"
_VERSION = 1


class Manifest:
    """The content of a manifest.

    Attributes:
        folder: the checkpoint's folder.
        files: size and SHA-256 of each file.
        entries: the tensors in the shards.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {
            str(name): {"bytes": int(facts["bytes"]), "sha256": str(facts["sha256"])}
            for name, facts in content["files"].items()
        }
        self.entries = [
            Entry(tuple(path), torch.Size(shape), getattr(torch, dtype), key)
            for path, shape, dtype, key in content["tensors"]
        ]
        if any("/" in name or name in ("", MANIFEST) for name in self.files):
            raise ValueError("it names a file outside the folder")
        if not all(isinstance(entry.dtype, torch.dtype) for entry in self.entries):
            raise ValueError("it names an unknown dtype")

    @property
    def shards(self) -> list[str]:
        """Names of the files with tensors."""
        return [name for name in self.files if name.endswith(SUFFIX)]


def write_manifest(
    folder: Path, files: Mapping[str, Any], entries: Sequence[Entry], *, step: int, ranks: int, replicas: int
) -> None:
    """Writes the manifest of a folder whose other files are complete, and flushes both to the disk.

    Raises:
        OSError: if it cannot be written.
    """
    content = {
        "version": _VERSION,
        "step": step,
        "ranks": ranks,
        "replicas": replicas,
        "torch": str(torch.__version__),
        "files": dict(files),
        "tensors": [(e.path, list(e.shape), str(e.dtype).removeprefix("torch."), e.key) for e in entries],
    }
    text = json.dumps({"halos checkpoint": content, "sha256": _digest_of(content)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _digest_once(path: Path, inode: int, size: int, changed: int) -> str:
    return file_digest(path)


def read_manifest(folder: Path) -> Manifest | str:
    """The manifest of a folder, or how it is damaged.

    A link is followed now, so that all files are those of one checkpoint, even if a running fit replaces the link.
    """
    folder = folder.resolve()
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / ".metadata").exists():
            return "is a checkpoint of another program: its .metadata is a pickle, which is never loaded"
        return f"is not a checkpoint, or is damaged: it has no {MANIFEST}"
    try:
        whole = json.loads(path.read_bytes())
        content = whole["halos checkpoint"]
        if whole["sha256"] != _digest_of(content):
            return f"is damaged: the checksum of {MANIFEST} is wrong"
        if content["version"] != _VERSION:
            return f"has format {content['version']} of a newer halos_pl; this one reads format {_VERSION}"
        return Manifest(folder, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"is damaged: {MANIFEST} cannot be read ({' '.join(str(error).split())})"


def wrong_files(manifest: Manifest) -> str | None:
    """Which file of a folder is missing, has another size, or does not belong there; None if none is."""
    for name, facts in manifest.files.items():
        path = manifest.folder / name
        if not path.is_file():
            return f"is damaged: {name} is missing"
        if (size := path.stat().st_size) != facts["bytes"]:
            return f"is damaged: {name} has {size} bytes instead of {facts['bytes']}"
    foreign = sorted({path.name for path in manifest.folder.glob(f"*{SUFFIX}")} - manifest.files.keys())
    return f"is damaged: {foreign[0]} does not belong to it" if foreign else None


def wrong_digest(manifest: Manifest, rank: int = 0, ranks: int = 1, *, only: Sequence[str] | None = None) -> str | None:
    """Which file's bytes are damaged, among this rank's share of the files; None if none is.

    Args:
        manifest: manifest of the folder.
        rank: number of this rank, from 0.
        ranks: number of ranks that share the work.
        only: names of the files to verify; default: all.
    """
    names = sorted(manifest.files if only is None else only, key=lambda name: -manifest.files[name]["bytes"])

    def check(name: str) -> str | None:
        path = manifest.folder / name
        status = path.stat()
        digest = _digest_once(path, status.st_ino, status.st_size, status.st_mtime_ns)
        right = digest == manifest.files[name]["sha256"]
        return None if right else f"is damaged: the checksum of {name} is wrong"

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // ranks))) as threads:
        return next(filter(None, threads.map(check, names[rank::ranks])), None)
