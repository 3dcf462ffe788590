"""Checkpoints of sharded runs: a folder that all ranks write and read together, each its own shards.

A folder obeys the rules of a single file: it appears atomically, its bytes are verified before use, and reading it runs
no code. Any number of ranks can read it, also a single process, and ranks can read a single file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as distributed_save
from torch.distributed.tensor import DTensor, Replicate

from halos_pl.common.files import PART, remove, sync
from halos_pl.distributed import rank, world_size
from halos_pl.training.checkpoint_files import CheckpointFiles, write_reason
from halos_pl.training.checkpoint_links import (
    folder_for,
    keep_as,
    part_of,
    point,
    recover,
    remove_unused,
    replace_folder,
)
from halos_pl.training.checkpoint_manifest import (
    REST,
    Manifest,
    file_digest,
    read_manifest,
    write_manifest,
    wrong_digest,
)
from halos_pl.training.checkpoint_reading import (
    CheckpointError,
    alternative,
    read_checkpoint,
    refuse_code,
)
from halos_pl.training.checkpoint_shards import Shards, ShardWriter, WholeTensors
from halos_pl.training.checkpoint_tree import Entry, at, local_of, put, split


def together(action: Callable[[], Any]) -> Any:
    """Calls ``action`` on this rank; if it fails on any rank, all ranks raise that error. All ranks must call it.

    Raises:
        OSError: if a file cannot be read.
        CheckpointError: if a checkpoint cannot be used.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    errors: list[Any] = [error and (isinstance(error, OSError), str(error))]
    if world_size() > 1:
        errors *= world_size()
        dist.all_gather_object(errors, errors[0])
    if error:
        raise error
    if first := next(filter(None, errors), None):
        raise (OSError if first[0] else CheckpointError)(first[1])
    return result


def save_sharded(
    checkpoint: Mapping[str, Any], path: str | Path, *, rotate: bool = False, keep: Path | None = None
) -> None:
    """Writes a checkpoint, whose tensors may be sharded, to a folder. All ranks must call it.

    The folder gets its name once it is complete and flushed to the disk, so a kill at any moment leaves the earlier
    checkpoint or the new one. Without ``rotate``, an earlier checkpoint at ``path`` is renamed just before; after a
    kill in between, the new one gets its name when it is looked for.

    Args:
        checkpoint: the checkpoint; all ranks must have the same entries, and rank 0's other values are saved.
        path: name of the checkpoint.
        rotate: whether ``path`` becomes a link to a folder ``step-N`` beside it, which is replaced atomically.
        keep: second name for the checkpoint that was at ``path``, if any.

    Raises:
        OSError: on all ranks, if one cannot write its part; the message gives the reason, and nothing is changed.
        ValueError: if ``path`` is a URL.
    """
    if "://" in str(path):
        raise ValueError(f"{path} is a URL, but the checkpoint of a sharded run is a folder; choose another dirpath")
    path = Path(path)
    rest, tensors, entries = split(checkpoint)
    step = int(checkpoint.get("global_step", 0))
    part = part_of(path, step, rotate)

    def commit(files: dict[str, dict[str, Any]]) -> None:
        torch.save(rest, part / REST)
        sync(part / REST)
        files[REST] = {"bytes": (part / REST).stat().st_size, "sha256": file_digest(part / REST)}
        layouts = (t for t in tensors.values() if isinstance(t, DTensor))
        write_manifest(
            part, files, entries, step=step, ranks=world_size(), replicas=next(map(_replicas, layouts), world_size())
        )
        if rotate:
            folder = folder_for(path.parent, step)
            os.rename(part, folder)
            sync(path.parent)
            if keep is not None and os.path.lexists(path):
                keep_as(path, keep)
            point(path, folder.name)
            sync(path.parent)
            remove_unused(path.parent)
        else:
            replace_folder(part, path)

    def make_empty(folder: Path) -> None:
        recover(path)
        remove(folder)
        folder.mkdir(parents=True)

    writer = ShardWriter(part, make_empty, commit)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            distributed_save(tensors, storage_writer=writer)
    except CheckpointException as error:
        number, (cause, _) = min(error.failures.items())
        if rank() == 0:
            remove(part)
        if not isinstance(cause, OSError | RuntimeError):  # such as KeyboardInterrupt
            raise cause from None
        which = f" by rank {number}" if world_size() > 1 else ""
        raise OSError(f"{path} cannot be written{which}: {write_reason(cause, path.parent, keep)}") from cause


def _replicas(tensor: DTensor) -> int:
    sizes = [tensor.device_mesh.size(n) for n, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return torch.Size(sizes).numel()


def load_sharded(path: Path, live: Mapping[str, Any], only: Collection[str] | None = None) -> dict[str, Any]:
    """Reads a checkpoint, a folder or a file, into a sharded run. All ranks must call it; each reads its own parts.

    Args:
        path: the checkpoint.
        live: the run's ``state_dict``, ``optimizer_states`` and ``reference_model``, as they would be saved now, and
            ``parameters``: the parameters of each optimizer, in the order of its groups. The tensors of ``state_dict``
            are overwritten if they have the shape of those in the checkpoint; the other tensors show how to shard new
            ones.
        only: the entries whose tensors are needed, such as ``state_dict``; default: all.

    Returns:
        The checkpoint. A weight that the run lacks, or that has another shape there, is on the meta device.

    Raises:
        CheckpointError: on all ranks, if the checkpoint is damaged, contains code, or is not from a halos run.
        OSError: on all ranks, if a file cannot be read.
    """
    checkpoint: dict[str, Any] = together(lambda: read_checkpoint(path, mmap=True))
    manifest: Manifest | None = together(lambda: _manifest(path)) if path.is_dir() else None
    if manifest is None:
        needed = {name: part for name, part in checkpoint.items() if only is None or name in only}
        rest, tensors, entries = split(needed)
        checkpoint |= rest
    else:
        entries = manifest.entries

    def read() -> None:
        with Shards(manifest.folder, manifest.shards) if manifest else WholeTensors(tensors) as source:
            for entry in entries:
                if only is not None and entry.path[0] not in only:
                    continue
                put(checkpoint, entry.path, _read(source, entry, live, path))

    together(read)
    return checkpoint


def _manifest(path: Path) -> Manifest:
    manifest = read_manifest(path)
    if isinstance(manifest, str):
        raise CheckpointError(f"{path} {manifest}{alternative(path)}")
    if wrong := wrong_digest(manifest, rank(), world_size()):
        raise CheckpointError(f"{path} {wrong}{alternative(path)}")
    return manifest


def _read(source: Any, entry: Entry, live: Mapping[str, Any], path: Path) -> Tensor:
    current, parameter = at(live, entry.path), _parameter_of(entry.path, live)
    if entry.path[0] == "state_dict":
        if not isinstance(current, Tensor) or current.shape != entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        tensor = current
    else:
        tensor = _like(current if isinstance(current, Tensor) else parameter, entry)
    if not source.complete(entry.key, entry.shape):
        raise CheckpointError(f"{path} is damaged: parts of {'.'.join(map(str, entry.path))} are missing")
    with torch.no_grad():
        source.read(entry.key, local_of(tensor), offsets_of(tensor))
    if tensor.dim() and isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        # Such as the directions of LBFGS, which span all parameters: torch does not combine plain tensors with shards.
        mesh = parameter.device_mesh
        return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return tensor


def _like(template: Tensor | None, entry: Entry) -> Tensor:
    """A new tensor for an entry, sharded like the template if it has the same shape."""
    if template is not None and template.shape == entry.shape:
        return torch.empty_like(template, dtype=entry.dtype, requires_grad=False)
    return torch.empty(entry.shape, dtype=entry.dtype)


def _parameter_of(path: tuple[str | int, ...], live: Mapping[str, Any]) -> Tensor | None:
    """The parameter that an entry of an optimizer's state belongs to, if any."""
    if len(path) < 5 or path[0] != "optimizer_states" or path[2] != "state":
        return None
    parameter = at(live.get("parameters", []), (path[1], path[3]))
    return parameter if isinstance(parameter, Tensor) else None


def offsets_of(tensor: Tensor) -> Sequence[int]:
    """Where this rank's part begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets)


class ShardedCheckpoints(CheckpointFiles):
    """Writes checkpoints as folders; all ranks must save together. Each process loads a whole checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See :func:`save_sharded`; ``storage_options`` are its other arguments.

        Raises:
            OSError: if the folder cannot be written.
        """
        save_sharded(checkpoint, path, **(storage_options or {}))

    def check_folder(self, folder: Path) -> None:
        super().check_folder(folder)
        trial = folder / f"trial{PART}"
        point(trial, folder.name)
        trial.unlink()


class FolderCheckpoints(Strategy):
    """The part of a strategy that saves and loads a sharded run; must come before Lightning's strategy as a base."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoint_io = ShardedCheckpoints()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state; its tensors stay sharded."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state by parameter number, as in a single file; its tensors stay sharded."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """All ranks write the checkpoint together, under rank 0's name for it."""
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(filepath), storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """See :func:`load_sharded`; the module's weights are loaded in place.

        Raises:
            CheckpointError: on all ranks, if the checkpoint cannot be used.
        """
        refuse_code(weights_only)
        module: Any = self.lightning_module
        models = getattr(module, "models", None)
        live = {
            "state_dict": module.state_dict(),
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
            "parameters": [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers],
            "reference_model": models.reference_model.state() if models is not None and models.bound else {},
        }
        return load_sharded(Path(self.broadcast(checkpoint_path)), live)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Does nothing: :meth:`load_checkpoint` has loaded the weights."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
