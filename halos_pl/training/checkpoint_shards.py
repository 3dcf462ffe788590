"""The shards of a folder checkpoint: safetensors files that torch's distributed checkpoint plans and fills.

Each rank writes one file with its part of each tensor; a part that several ranks have is written once. The layout is
that of torch's ``HuggingFaceStorageReader``, which can read the files as well. torch's default writer is not used, as
its ``.metadata`` file is a pickle, which could run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

SUFFIX = ".safetensors"
_OFFSETS = "DCP_SHARDING_INFO"  # the key of torch's own writer
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardWriter(StorageWriter):
    """Writes the shards of ``torch.distributed.checkpoint.save`` to a folder, and then calls ``commit`` on rank 0.

    Tensors are copied to the CPU and hashed one at a time, as they are written.

    Args:
        folder: folder to write to.
        clear: called with the folder on rank 0 before anything is written; makes it an empty folder.
        commit: called on rank 0 with the size and SHA-256 of each file, once all of them are on the disk.
    """

    def __init__(
        self, folder: Path, clear: Callable[[Path], None], commit: Callable[[dict[str, dict[str, Any]]], None]
    ) -> None:
        self._folder, self._clear, self._commit = folder, clear, commit

    def reset(self, checkpoint_id: Any = None) -> None:
        """Does nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._clear(self._folder)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file.

        Raises:
            OSError: if it cannot be written.
            TypeError: if safetensors has no such dtype.
        """
        written: Future[list[WriteResult]] = Future()
        if not plan.items:
            written.set_result([])
            return written
        # Large items first, so that each is aligned to its size.
        items: list[Any] = sorted(plan.items, key=lambda item: -_data_of(item).properties.dtype.itemsize)
        header: dict[str, Any] = {}
        offsets, end = {}, 0
        for item in items:
            name, data = item.index.fqn, _data_of(item)
            if (kind := _DTYPES.get(data.properties.dtype)) is None:
                raise TypeError(f"{name} is {data.properties.dtype}, which a checkpoint cannot contain")
            start, end = end, end + data.chunk.sizes.numel() * data.properties.dtype.itemsize
            header[name] = {"dtype": kind, "shape": list(data.chunk.sizes), "data_offsets": [start, end]}
            offsets[name] = {"saved_offsets": list(data.chunk.offsets)}
        header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", _OFFSETS: json.dumps(offsets)}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        path = self._folder / f"shard-{plan.storage_data:05d}{SUFFIX}"
        self._folder.mkdir(parents=True, exist_ok=True)  # on a network file system, rank 0's may not be visible yet
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for piece in (len(head).to_bytes(8, "little"), head):
                file.write(piece)
                digest.update(piece)
            for item in items:
                tensor: Any = planner.resolve_data(item)
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(memoryview(content))
                digest.update(content)
            file.flush()
            os.fsync(file.fileno())
        size = 8 + len(head) + end
        facts = {"name": path.name, "bytes": size, "sha256": digest.hexdigest()}
        written.set_result([WriteResult(items[0].index, size, facts)])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits the checkpoint.

        Raises:
            OSError: if it cannot be written, or rank 0 does not see a file of another rank.
        """
        files = {facts.pop("name"): facts for part in results for facts in (result.storage_data for result in part)}
        for name, facts in files.items():
            path = self._folder / name
            size = path.stat().st_size if path.exists() else None
            if size != facts["bytes"]:
                raise OSError(
                    f"{path}, which another rank has written, is not complete on rank 0; run_dir must be on a file"
                    " system that all nodes share"
                )
        self._commit(files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _data_of(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None  # the rest goes to another file
    return item.tensor_data


class Shards:
    """The tensors in a folder's shards, of which any part can be read; to be used as a context manager.

    Args:
        folder: the folder.
        files: names of its shards.

    Raises:
        Exception: of many kinds, if a file is not one of safetensors.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self._stack = ExitStack()
        #: Parts of each tensor: the file, the offsets, and the shape.
        self._parts: dict[str, list[tuple[Any, list[int], list[int]]]] = {}
        for name in files:
            file: Any = self._stack.enter_context(safe_open(folder / name, "pt"))
            offsets = json.loads(file.metadata()[_OFFSETS])
            for key in file.keys():  # noqa: SIM118
                part = (file, offsets[key]["saved_offsets"], file.get_slice(key).get_shape())
                self._parts.setdefault(key, []).append(part)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self._parts = {}

    def complete(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the parts of a tensor make up the whole of it."""
        numbers = [torch.Size(part).numel() for _, _, part in self._parts.get(name, [])]
        return bool(numbers) and sum(numbers) == torch.Size(shape).numel()

    def read(self, name: str, into: Tensor, offsets: Sequence[int]) -> None:
        """Reads a block of a tensor, converted to the dtype of ``into``.

        Args:
            name: the tensor.
            into: tensor on any device to fill; its shape is that of the block.
            offsets: where the block begins in the whole tensor.
        """
        for file, start, shape in self._parts[name]:
            if not shape:
                into.copy_(file.get_tensor(name))
                continue
            low = [max(a, b) for a, b in zip(offsets, start, strict=True)]
            ends = zip(offsets, into.shape, start, shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            block = file.get_slice(name)[_block(low, high, start)]
            into[_block(low, high, offsets)].copy_(block)

    def whole(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A whole tensor, on the CPU.

        Raises:
            ValueError: if parts of it are missing.
        """
        if not self.complete(name, shape):
            raise ValueError(f"parts of {name} are missing")
        tensor = torch.empty(list(shape), dtype=dtype)
        self.read(name, tensor, [0] * len(shape))
        return tensor


def _block(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


class WholeTensors:
    """The same as :class:`Shards` for tensors in memory, or mapped into it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> WholeTensors:
        return self

    def __exit__(self, *error: Any) -> None:
        self._tensors = {}

    def complete(self, name: str, shape: Sequence[int]) -> bool:
        return name in self._tensors and self._tensors[name].shape == torch.Size(shape)

    def read(self, name: str, into: Tensor, offsets: Sequence[int]) -> None:
        into.copy_(self._tensors[name][tuple(slice(o, o + n) for o, n in zip(offsets, into.shape, strict=True))])
