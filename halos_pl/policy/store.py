"""The reference store: log pi_ref of completions, keyed by content and shared by all runs.

A folder of the cache with one entry per (reference weights, numerics, prompt, completion). Its entries do not depend
on batches, order or epochs. Processes on several machines may use it at once; checksums detect damaged entries, which
are then recomputed. For its files see :mod:`halos_pl.policy.segments`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from halos_pl.batch import TokenBatch
from halos_pl.cache import LARGEST, REFERENCE, Use, cache_root, limit
from halos_pl.common import spent
from halos_pl.common.transfer import moved
from halos_pl.policy.segments import Segments
from halos_pl.policy.sharding import most_over_ranks
from halos_pl.policy.spec import ModelError

#: Keys of a config that do not affect log-probs; nor do those that start with _.
_IRRELEVANT = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "return_dict",
    "distributed_config",
}


def fingerprint(tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> str:
    """A hash of a model's config and of the names, dtypes, shapes and bytes of its weights.

    Args:
        tensors: names and weights; those on an accelerator are copied to the CPU.
        config: transformers' config as a dict.
    """
    relevant = {k: v for k, v in config.items() if k not in _IRRELEVANT and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keys(model: str, batch: TokenBatch) -> list[bytes]:
    """The 16-byte key of each row: a hash of reference (see :func:`fingerprint`), prompt, completion and loss mask."""

    def raw(ids: Tensor) -> bytes:
        return len(ids).to_bytes(4, "little") + ids.cpu().numpy().astype("<i4").tobytes()

    prompts = [hashlib.blake2b(model.encode() + raw(ids)) for ids in batch.prompts]
    row_keys = []
    for row, (prompt, completion) in enumerate(zip(batch.prompt.tolist(), batch.completions, strict=True)):
        digest = prompts[prompt].copy()
        digest.update(raw(completion))
        loss = batch.loss[row] if batch.loss else None
        if loss is not None:
            digest.update(loss.cpu().numpy().tobytes())
        row_keys.append(digest.digest()[:16])
    return row_keys


class ReferenceStore:
    """Log-probs of completion tokens under frozen reference models, on disk.

    Args:
        path: path of the folder; default: ``reference/logps`` in :func:`halos_pl.cache.cache_root`.
        largest: maximum size of the folder in bytes; the limit of the whole cache also applies.

    Raises:
        ModelError: the folder cannot be created or written.
    """

    def __init__(self, path: Path | None = None, largest: int = LARGEST) -> None:
        self.path = path or cache_root() / REFERENCE
        self._reported, self._silenced = 0, False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._use = Use(self.path)
            self._segments = Segments(self.path, min(largest, limit()))
        except OSError as error:
            raise ModelError(
                f"the reference store {self.path} cannot be written ({error}); set HALOS_CACHE to another folder, or"
                " model.reference_store to false"
            ) from error
        self._report()

    @property
    def damaged(self) -> int:
        """Number of damaged entries and blocks of entries found, which are recomputed."""
        return self._segments.damaged

    def get(self, wanted: Sequence[bytes]) -> dict[bytes, Tensor]:
        """The stored entries of ``wanted``, float32 [tokens] each, without missing and damaged ones."""
        stored: dict[bytes, Tensor] = {}
        with self._continuing():
            for key, value in self._segments.get(wanted).items():
                stored[key] = torch.from_numpy(np.frombuffer(value, "<f4").astype(np.float32))
        self._report()
        return stored

    def put(self, entries: Mapping[bytes, Tensor]) -> None:
        """Stores log-probs, float32 [tokens] each, except those that are not finite."""
        arrays = {key: logps.detach().cpu().numpy().astype("<f4") for key, logps in entries.items()}
        with self._continuing():
            self._segments.put({key: logps.tobytes() for key, logps in arrays.items() if np.isfinite(logps).all()})

    @contextmanager
    def _continuing(self) -> Iterator[None]:
        """Warns once if the store fails, as on a full disk: the run does not need it."""
        try:
            yield
        except OSError as error:
            if not self._silenced:
                self._silenced = True
                rank_zero_warn(
                    f"halos: the reference store {self.path} cannot be used ({error}); continuing without it"
                )

    def _report(self) -> None:
        if new := self.damaged - self._reported:
            self._reported = self.damaged
            rank_zero_info(f"halos: {new} damaged entries of the reference store {self.path} are recomputed")

    def __len__(self) -> int:
        """The number of entries."""
        return len(self._segments)

    def close(self) -> None:
        """Closes the files."""
        self._segments.close()
        self._use.end()


class StoredReference:
    """A reference whose log-probs come from a store; those that it lacks are computed and added.

    Args:
        reference: reference that was bound with ``stored``.
        store: store of its log-probs.
        numerics: function that returns the settings that affect log-probs (the policy's ``Scorer.numerics``); called
            for each batch.
        sharded: whether the reference is sharded over the ranks, so that all of them must compute if one of them does.

    Attributes:
        rows_stored: number of rows that were found in the store.
    """

    def __init__(
        self, reference: Any, store: ReferenceStore, numerics: Callable[[], tuple[Any, ...]], sharded: bool = False
    ) -> None:
        self.reference, self.store, self._numerics, self._sharded = reference, store, numerics, sharded
        self.rows_stored = 0

    @property
    def rows_computed(self) -> int:
        """Number of rows that the reference has scored."""
        return int(self.reference.rows_computed)

    def scoring(self) -> Any:
        """A context manager that gives the model, which may have to be loaded first."""
        return self.reference.scoring()

    @torch.no_grad()
    def logps(self, batch: TokenBatch) -> Tensor:
        """Log-probs of the completion tokens, float32 [n, T]; stored ones differ from these by rounding."""
        names = keys(" ".join(map(str, (self.reference.fingerprint, *self._numerics()))), batch.on_host)
        logps = self.store.get(names)
        missing = [i for i, name in enumerate(names) if name not in logps]
        if self._sharded:
            # Each pass of a sharded reference is a pass of all ranks, over all of their rows.
            missing = list(range(len(batch))) if most_over_ranks(len(missing))[0] else []
        self.rows_stored += len(batch) - len(missing)
        if missing:
            (index,) = moved([torch.tensor(missing, device="cpu")], batch.prompt.device)
            with spent.part(spent.REFERENCE):
                computed = self.reference.logps(batch.select(index, missing)).cpu()
            fresh = {names[i]: row[: len(batch.completions[i])] for i, row in zip(missing, computed, strict=True)}
            self.store.put(fresh)
            logps |= fresh
        of_rows = pad_sequence([logps[name] for name in names], batch_first=True)
        return moved([of_rows.flatten()], batch.prompt.device)[0].view_as(of_rows)
