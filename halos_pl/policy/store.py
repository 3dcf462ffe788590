"""The reference store: log pi_ref of completions, kept by content and shared by all runs.

A SQLite file below the cache folder, one entry for each (reference weights, precision, prompt, completion). What it
holds does not depend on batches, order or epochs. Several processes may use it at once; an entry is found damaged by
its checksum and then computed again.
"""

from __future__ import annotations

import hashlib
import json
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

from halos_pl.cache import cache_root
from halos_pl.outcomes import FlatBatch
from halos_pl.policy.loading import ModelError

LARGEST = 4 << 30  # bytes; the entries that were used longest ago make room for new ones
FILE = Path("reference") / "logps.sqlite"
_DAY = 86400
_TABLE = "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, used INTEGER, sum INTEGER, logps BLOB)"


# What a config says that changes no log-prob; nor does what begins with _.
_NO_MATTER = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict"}


def fingerprint(tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any]) -> str:
    """A hash of a model: of names, dtypes, shapes and bytes of its weights, and of what is computed with them.

    Args:
        tensors: the weights; one on an accelerator is copied.
        config: as ``to_dict`` of transformers' config gives it.
    """
    matters = {k: v for k, v in config.items() if k not in _NO_MATTER and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keys(model: str, batch: FlatBatch) -> list[bytes]:
    """The key of each row, 16 bytes: of reference (see :func:`fingerprint`), prompt, completion and its loss."""

    def raw(ids: Tensor) -> bytes:
        return len(ids).to_bytes(4, "little") + ids.cpu().numpy().astype("<i4").tobytes()

    prompts = [hashlib.blake2b(model.encode() + raw(ids)) for ids in batch.prompts]
    found = []
    for row, (prompt, completion) in enumerate(zip(batch.prompt.tolist(), batch.completions, strict=True)):
        digest = prompts[prompt].copy()
        digest.update(raw(completion))
        loss = batch.loss[row] if batch.loss else None
        if loss is not None:
            digest.update(loss.cpu().numpy().tobytes())
        found.append(digest.digest()[:16])
    return found


class ReferenceStore:
    """Log-probs of completion tokens under frozen reference models, on disk.

    Args:
        path: of the SQLite file; left out, ``reference/logps.sqlite`` in :func:`halos_pl.cache.cache_root`.
        largest: bytes that the file may grow to.

    Attributes:
        damaged: entries that were found damaged, and are computed again.

    Raises:
        ModelError: where the file cannot be written.
    """

    def __init__(self, path: Path | None = None, largest: int = LARGEST) -> None:
        self.path = path or cache_root() / FILE
        self.largest = largest
        self.damaged = 0
        self._silenced = False
        try:
            try:
                self._db = self._connection()
            except sqlite3.OperationalError:  # busy or not to be written: no damage
                raise
            except sqlite3.DatabaseError as error:
                self._mend(error)
        except (OSError, sqlite3.OperationalError) as error:
            raise ModelError(
                f"the reference store {self.path} cannot be written ({error}); name another folder with HALOS_CACHE, or"
                " say model.reference_store false"
            ) from error

    def _connection(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, timeout=60, check_same_thread=False)  # waits for another process's step
        db.text_factory = bytes  # a damaged entry may say of itself that it is a text
        try:
            with db:
                db.execute(_TABLE)
        except BaseException:
            db.close()
            raise
        self._inode = self.path.stat().st_ino
        return db

    def _mend(self, error: Exception) -> None:
        """Connects anew; a file that is no whole database is put aside before.

        Another process may have found the same, and have mended it already.
        """
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
            aside = self.path.with_suffix(".damaged")
            rank_zero_info(
                f"halos: the reference store {self.path} is damaged ({error}); it is now {aside.name}, and what it held"
                " is computed again"
            )
            self.path.replace(aside)
            self._db = self._connection()

    def _try(self, work: Callable[[], None]) -> None:
        """Does ``work`` with the file that is there: another process may have put aside or removed what was.

        Once more where it had to be mended. Where it cannot be done, as on a full disk, that is said once: it is no
        reason to end a run.
        """
        why: Exception | None = None
        for _ in range(2):
            try:
                if why is not None:
                    self._mend(why)
                elif not self.path.exists() or self.path.stat().st_ino != self._inode:
                    self._db.close()
                    self._db = self._connection()
                return work()
            except (OSError, sqlite3.Error) as error:
                why = error
        if not self._silenced:
            self._silenced = True
            rank_zero_warn(f"halos: the reference store {self.path} cannot be used ({why}); the run goes on without it")

    def get(self, wanted: Sequence[bytes]) -> dict[bytes, Tensor]:
        """What is stored of ``wanted``, float32 [tokens] each; what is not there or damaged is left out."""
        found: dict[bytes, Tensor] = {}
        bad: list[bytes] = []
        now = int(time.time())

        def read() -> None:
            stale: list[bytes] = []
            for key in dict.fromkeys(wanted):
                row = self._db.execute("SELECT used, sum, logps FROM logps WHERE key = ?", (key,)).fetchone()
                if row is None:
                    continue
                used, checksum, blob = row
                whole = isinstance(used, int) and isinstance(blob, bytes) and len(blob) % 4 == 0
                if not whole or zlib.crc32(key + blob) != checksum:
                    bad.append(key)
                    continue
                found[key] = torch.from_numpy(np.frombuffer(blob, "<f4").astype(np.float32))
                stale += [key] if now - used > _DAY else []
            if bad or stale:  # the day of use is written once a day, not once a step
                with self._db:
                    self._db.executemany("DELETE FROM logps WHERE key = ?", [(key,) for key in bad])
                    self._db.executemany("UPDATE logps SET used = ? WHERE key = ?", [(now, key) for key in stale])

        self._try(read)
        if bad:
            self.damaged += len(bad)
            rank_zero_info(f"halos: {len(bad)} damaged entries of the reference store {self.path} are computed again")
        return found

    def put(self, entries: dict[bytes, Tensor]) -> None:
        """Keeps log-probs, float32 [tokens] each; what is not finite is not kept."""
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
            count = len(self)
            with self._db:  # a tenth at a time, so that it is not done at each step
                self._db.execute(
                    "DELETE FROM logps WHERE key IN (SELECT key FROM logps ORDER BY used, rowid LIMIT ?)",
                    (max(1, count // 10),),
                )

    def __len__(self) -> int:
        """Entries."""
        return int(self._db.execute("SELECT count(*) FROM logps").fetchone()[0])

    def close(self) -> None:
        """Lets go of the file."""
        self._db.close()
