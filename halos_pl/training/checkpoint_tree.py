"""Takes the tensors out of a checkpoint's tree, to be written in shards, and puts them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Entries of a checkpoint whose tensors grow with the model; elsewhere, only sharded tensors go to the shards.
LARGE = ("state_dict", "optimizer_states", "reference_model")


@dataclass(frozen=True)
class Entry:
    """A tensor's place in the tree.

    Attributes:
        path: keys and indices that lead to it.
        shape: shape of the whole tensor.
        dtype: its dtype.
        key: name under which its data are stored; tied weights share one.
    """

    path: tuple[str | int, ...]
    shape: torch.Size
    dtype: torch.dtype
    key: str


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def walk(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """The tensors in a tree of dicts and lists, with their paths."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from walk(value, (*path, key))


def without(tree: Any, paths: set[tuple[str | int, ...]], path: tuple[str | int, ...] = ()) -> Any:
    """A copy of the tree with None in place of the tensors at ``paths``."""
    if isinstance(tree, Mapping):
        return {key: without(value, paths, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without(value, paths, (*path, number)) for number, value in enumerate(tree)]
    return None if path in paths else tree


def put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Puts a value back at its path."""
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def at(tree: Any, path: tuple[str | int, ...]) -> Any:
    """The value at a path; None if there is none."""
    for key in path:
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        else:
            tree = tree[key] if isinstance(tree, list) and isinstance(key, int) and key < len(tree) else None
    return tree


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], list[Entry]]:
    """Takes the tensors out of a checkpoint.

    Returns:
        The rest of the tree, the tensors by key, each once, and the places where they belong.

    Raises:
        ValueError: if a tensor is of a class of its own, such as the state of an 8-bit optimizer, or is not added up
            over the ranks, or two would have the same name.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}
    entries = []
    for path, tensor in walk(checkpoint):
        if path[0] not in LARGE and not isinstance(tensor, DTensor):
            continue
        key = ".".join(map(str, path))
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"{key} is not added up over the ranks, as the checkpoint of a sharded run requires")
        part = local_of(tensor)
        if type(part) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{key} is a {type(part).__name__}, which the checkpoint of a sharded run cannot contain")
        # Tensors that share their storage do so on all ranks, even if this rank's parts are empty.
        place = (part.untyped_storage()._cdata, part.storage_offset(), part.stride(), tensor.shape, tensor.dtype)
        entries.append(Entry(path, tensor.shape, tensor.dtype, names.setdefault(place, key)))
        if names[place] == key:
            if key in tensors:
                raise ValueError(f"the checkpoint contains two tensors called {key}")
            tensors[key] = tensor
    return without(checkpoint, {entry.path for entry in entries}), tensors, entries
