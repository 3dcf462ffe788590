"""Writes checkpoint files so that a kill at any moment leaves an intact one."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from halos_pl.common.files import PART, remove, sync
from halos_pl.training.checkpoint_links import keep_as, remove_checkpoint, remove_unused, set_aside
from halos_pl.training.checkpoint_reading import read_checkpoint, refuse_code


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, flushes it to disk and renames it; verifies a file before loading it.

    A kill at any moment leaves the old file or the new one. ``storage_options={"keep": path}`` also keeps the old one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes ``checkpoint`` to ``path``.

        Raises:
            OSError: if the file, which the message names, cannot be written; an older one there is unchanged.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path)
            return
        path = Path(path)
        beside = path.with_name(f"{path.name}{PART}")
        keep = (storage_options or {}).get("keep")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, beside)
            sync(beside)
            if keep is not None and path.exists():
                keep_as(path, Path(keep))
            old = set_aside(path)
            os.replace(beside, path)
            sync(path.parent)
            remove(old)
            remove_unused(path.parent)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{path} cannot be written: {write_reason(error, path.parent, keep)}") from error
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads the checkpoint at ``path`` to the CPU.

        Raises:
            CheckpointError: see :func:`~halos_pl.training.checkpoint_reading.read_checkpoint`.
        """
        refuse_code(weights_only)
        return read_checkpoint(Path(path))

    def check_folder(self, folder: Path) -> None:
        """Refuses a folder that no checkpoint can be written to.

        Raises:
            OSError: names the folder.
        """
        trial = folder / f"trial{PART}"
        trial.touch()
        trial.unlink()

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a file or a folder, if it exists."""
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            remove_checkpoint(Path(path))


def write_reason(error: Exception, folder: Path, keep: Any = None) -> str:
    """Why a checkpoint cannot be written to ``folder``; a way to save space if another one is kept there as well."""
    less = "; --checkpoint.keep 1 takes a third less space" if keep is not None else ""
    if isinstance(error, OSError):
        return f"{error.strerror or error}{less}"
    if "unexpected pos" not in str(error):
        return f"{str(error).splitlines()[0]}{less}"
    with suppress(OSError):  # torch's words for a truncated write
        free = shutil.disk_usage(folder).free / 1e6
        return f"only part of it was written, with {free:.0f} MB left on the disk{less}"
    return f"only part of it was written{less}"
