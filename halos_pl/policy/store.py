"""The reference store: log pi_ref of completions, keyed by content and shared by all runs.

A SQLite file in the cache folder with one entry per (reference weights, precision, prompt, completion). Its entries
do not depend on batches, order or epochs. Several processes may use it at once; checksums detect damaged entries, which
are then recomputed.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from halos_pl.batch import TokenBatch
from halos_pl.cache import LARGEST, REFERENCE, Use, cache_root, limit
from halos_pl.policy.sharding import most_over_ranks
from halos_pl.policy.spec import ModelError

_DAY = 86400
_TABLE = "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, used INTEGER, sum INTEGER, logps BLOB)"


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
        path: path of the SQLite file; default: ``reference/logps.sqlite`` in :func:`halos_pl.cache.cache_root`.
        largest: maximum size of the file in bytes; the limit of the whole cache also applies.

    Attributes:
        damaged: number of damaged entries found, which are recomputed.

    Raises:
        ModelError: the file cannot be created or written.
    """

    def __init__(self, path: Path | None = None, largest: int = LARGEST) -> None:
        self.path = path or cache_root() / REFERENCE
        self.largest = min(largest, limit())
        self.damaged = 0
        self._silenced = False
        try:
            try:
                self._db = self._connection()
            except sqlite3.OperationalError:  # busy or read-only, not damaged
                raise
            except sqlite3.DatabaseError as error:
                self._renew(error)
        except (OSError, sqlite3.OperationalError) as error:
            raise ModelError(
                f"the reference store {self.path} cannot be written ({error}); set HALOS_CACHE to another folder, or"
                " model.reference_store to false"
            ) from error

    def _connection(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not hasattr(self, "_use"):
            self._use = Use(self.path)
        db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)  # waits for another process's step
        db.text_factory = bytes  # a damaged entry may be marked as text
        try:
            with db:
                db.execute(_TABLE)
        except BaseException:
            db.close()
            raise
        self._inode = self.path.stat().st_ino
        return db

    def _renew(self, error: Exception) -> None:
        """Reconnects; a damaged file is deleted first, unless another process has already replaced it."""
        if hasattr(self, "_db"):
            self._db.close()
        with FileLock(self.path.with_suffix(".lock")):
            try:
                self._db = self._connection()
                if self._db.execute("PRAGMA quick_check").fetchone()[0] == b"ok":
                    return
                self._db.close()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                pass
            rank_zero_info(
                f"halos: the reference store {self.path} is damaged ({error}); it is deleted, and its entries are"
                " recomputed"
            )
            self.path.unlink()
            self._db = self._connection()

    def _try(self, work: Callable[[], None]) -> None:
        """Does ``work`` on the current file, as another process may have moved or removed the one opened before.

        If it fails, tries again with a new file. If that fails too, as on a full disk, warns once: the run does not
        need the store.
        """
        why: Exception | None = None
        for _ in range(2):
            try:
                if why is not None:
                    self._renew(why)
                elif not self.path.exists() or self.path.stat().st_ino != self._inode:
                    self._db.close()
                    self._db = self._connection()
                return work()
            except (OSError, sqlite3.Error) as error:
                why = error
        if not self._silenced:
            self._silenced = True
            rank_zero_warn(f"halos: the reference store {self.path} cannot be used ({why}); continuing without it")

    def get(self, wanted: Sequence[bytes]) -> dict[bytes, Tensor]:
        """The stored entries of ``wanted``, float32 [tokens] each, without missing and damaged ones."""
        stored: dict[bytes, Tensor] = {}
        bad: list[bytes] = []
        now = int(time.time())

        def read() -> None:
            stale: list[bytes] = []
            for key in dict.fromkeys(wanted):
                row = self._db.execute("SELECT used, sum, logps FROM logps WHERE key = ?", (key,)).fetchone()
                if row is None:
                    continue
                used, checksum, blob = row
                well_formed = isinstance(used, int) and isinstance(blob, bytes) and len(blob) % 4 == 0
                if not well_formed or zlib.crc32(key + blob) != checksum:
                    bad.append(key)
                    continue
                stored[key] = torch.from_numpy(np.frombuffer(blob, "<f4").astype(np.float32))
                stale += [key] if now - used > _DAY else []
            if bad or stale:  # the time of use is updated once a day, not at each step
                with self._db:
                    self._db.executemany("DELETE FROM logps WHERE key = ?", [(key,) for key in bad])
                    self._db.executemany("UPDATE logps SET used = ? WHERE key = ?", [(now, key) for key in stale])

        self._try(read)
        if bad:
            self.damaged += len(bad)
            rank_zero_info(f"halos: {len(bad)} damaged entries of the reference store {self.path} are recomputed")
        return stored

    def put(self, entries: dict[bytes, Tensor]) -> None:
        """Stores log-probs, float32 [tokens] each, except those that are not finite."""
        now = int(time.time())
        rows = []
        for key, logps in entries.items():
            if bool(logps.isfinite().all()):
                blob = logps.detach().cpu().numpy().astype("<f4").tobytes()
                rows.append((key, now, zlib.crc32(key + blob), blob))

        def write() -> None:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?, ?)", rows)
            self._make_room()

        self._try(write)

    def _make_room(self) -> None:
        def figure(name: str) -> int:
            return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

        size = (figure("page_count") - figure("freelist_count")) * figure("page_size")
        if size > self.largest:
            # At least a tenth, so that this is rare; more if the limit has been lowered.
            surplus = math.ceil(len(self) * max(0.1, 1 - self.largest / size))
            with self._db:
                self._db.execute(
                    "DELETE FROM logps WHERE key IN (SELECT key FROM logps ORDER BY used, rowid LIMIT ?)", (surplus,)
                )
            if figure("freelist_count") > figure("page_count") / 2:
                self._db.execute("VACUUM")  # returns the space to the disk

    def __len__(self) -> int:
        """The number of entries."""
        return int(self._db.execute("SELECT count(*) FROM logps").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._db.close()
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
        names = keys(" ".join(map(str, (self.reference.fingerprint, *self._numerics()))), batch)
        logps = self.store.get(names)
        missing = [i for i, name in enumerate(names) if name not in logps]
        self.rows_stored += len(batch) - len(missing)
        if self._sharded:
            # Each pass of a sharded reference is a pass of all ranks, over all of their rows.
            missing = list(range(len(batch))) if most_over_ranks(len(missing))[0] else []
        if missing:
            computed = self.reference.logps(batch.select(torch.tensor(missing, device=batch.prompt.device)))
            fresh = {names[i]: row[: len(batch.completions[i])] for i, row in zip(missing, computed, strict=True)}
            self.store.put(fresh)
            logps |= fresh
        return pad_sequence([logps[name].to(batch.prompt.device) for name in names], batch_first=True)
