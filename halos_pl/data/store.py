"""A source as token ids on disk: read, checked and tokenised once, then memory-mapped.

A store depends only on the source and the tokenizer, so all objectives, runs and ranks share it. It is found by its
content: see :func:`halos_pl.data.cache_key.store_key`.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from halos_pl.cache import Use, cache_root, limit, make_room
from halos_pl.common.files import PART, naming, publish, unique_name
from halos_pl.common.leases import Lease
from halos_pl.data.build_store import build
from halos_pl.data.cache_key import store_key
from halos_pl.data.example import DataError
from halos_pl.data.formats import is_hub_name
from halos_pl.data.layout import FILES, PROMPT, ROW, SPAN, SPANS, SUMS, checksums
from halos_pl.data.memory import MemorySource
from halos_pl.data.prompts import TextPrompts
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.data.spans import LossOn
from halos_pl.data.special import SpecialTokens
from halos_pl.data.tokenize import Encoder

SHOWN_FAULTS = 10
SHOWN_PLACES = 3


@dataclass(frozen=True)
class Store:
    """The token store of one source.

    Attributes:
        path: the source's label.
        tokens: int32 [t], the token ids of all texts in one sequence.
        prompts: ``PROMPT`` [p], the distinct prompts: start and length in ``tokens``, and a hash of their tokens.
        rows: ``ROW`` [n], in the order of the source.
        suffixes: parts of row names that follow the line.
        examples: number of valid rows of the source, each of which may give several of ``rows``.
        found_faults: the first ``KEPT_FAULTS`` faults, as (place without the source's name, reason).
        fault_count: number of all faults.
        fault_reasons: number of faults for each of the first ``KEPT_FAULTS`` reasons.
        skipped: number of valid rows that no loss can use, by reason.
        unused: columns that have values but are not read.
        digest: a hash of tokens, labels and weights, independent of file names.
        folder: folder of the store; None for one in memory.
        spelling: number of examples, faulty ones included, whose text spells a special token.
        spelled: the same for each such token.
        use: protects the store from removal while it is open.
        text_prompts: number of examples with a plain-text prompt.
        notes: remarks on examples, with the number of examples.
        spans: ``SPAN`` [s], by row, ranges of completion tokens that carry the loss; of a row without any, all do.
        before_line: separator of ``path`` and line in a row's name.
        weighted_by: the source's column with the weights of its rows; None without one.
    """

    path: str
    tokens: NDArray[np.int32]
    prompts: NDArray[Any]
    rows: NDArray[Any]
    suffixes: list[str]
    examples: int
    found_faults: list[tuple[str, str]]
    fault_count: int
    skipped: dict[str, int]
    digest: str
    folder: Path | None = None
    unused: list[str] = field(default_factory=list)
    spelling: int = 0
    spelled: dict[str, int] = field(default_factory=dict)
    use: Use | None = field(default=None, repr=False, compare=False)
    fault_reasons: dict[str, int] = field(default_factory=dict)
    text_prompts: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    spans: NDArray[Any] = field(default_factory=lambda: np.empty(0, SPAN))
    before_line: str = ":"
    weighted_by: str | None = None

    def __reduce__(self) -> Any:
        """Pickles the folder alone, as a worker maps the arrays itself."""
        return super().__reduce__() if self.folder is None else (_open, (self.path, self.folder, self.before_line))

    def name(self, row: int) -> str:
        """The row's name: ``SOURCE:LINE``, and which of the line's rows it is."""
        return f"{self.path}{self.before_line}{self.rows['line'][row]}{self.suffixes[self.rows['suffix'][row]]}"

    def prompt(self, number: int) -> NDArray[np.int32]:
        """Token ids of a prompt, uncut."""
        start = int(self.prompts["start"][number])
        return self.tokens[start : start + int(self.prompts["length"][number])]

    def completion(self, row: int) -> NDArray[np.int32]:
        """Token ids of a row's completion, uncut."""
        start = int(self.rows["start"][row])
        return self.tokens[start : start + int(self.rows["length"][row])]

    def loss(self, row: int) -> NDArray[np.bool_] | None:
        """Which tokens of a row's completion carry the loss, bool [t]; None if all do."""
        first, last = np.searchsorted(self.spans["row"], (row, row + 1))
        if first == last:
            return None
        carries = np.zeros(int(self.rows["length"][row]), bool)
        for _, start, stop in self.spans[first:last].tolist():
            carries[start:stop] = True
        return carries

    def first_loss(self) -> NDArray[np.int64]:
        """The first token of each row's completion that carries the loss, int64 [n]."""
        first = np.zeros(len(self.rows), np.int64)
        rows, places = np.unique(self.spans["row"], return_index=True)
        first[rows] = self.spans["start"][places]
        return first

    @property
    def causes(self) -> list[tuple[int, str]]:
        """For each reason the number of faulty rows and a line that names the first of them; most rows first."""
        places: dict[str, list[str]] = {}
        for place, reason in self.found_faults:
            places.setdefault(reason, []).append(f"{self.path}{place}")
        causes = []
        for reason, named in places.items():
            count = max(self.fault_reasons.get(reason, 0), len(named))
            shown = named if count <= SHOWN_PLACES else named[:SHOWN_PLACES]
            more = f" and {count - len(shown)} more rows" if count > len(shown) else ""
            causes.append((count, f"{', '.join(shown)}{more}: {reason}"))
        return sorted(causes, key=lambda cause: -cause[0])

    @property
    def faults(self) -> list[str]:
        """The lines of ``causes``."""
        return [line for _, line in self.causes]


def fault_list(causes: list[tuple[int, str]], count: int) -> str:
    """The first few causes of ``count`` faults, a line each, and the number of further faults."""
    shown = causes[:SHOWN_FAULTS]
    more = count - sum(rows for rows, _ in shown)
    lines = [line for _, line in shown]
    return "\n".join([*lines, *([f"... and {more} more fault{'s' * (more > 1)}"] if more else [])])


def _open(path: str, folder: Path, before_line: str = ":") -> Store:
    def mapped(name: str, dtype: Any) -> NDArray[Any]:
        file = folder / name
        empty: NDArray[Any] = np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(file, dtype, mode="r") if file.stat().st_size else empty

    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = mapped("tokens", "<i4"), mapped("prompts", PROMPT), mapped("rows", ROW)
    spans = mapped(SPANS, SPAN) if (folder / SPANS).is_file() else np.empty(0, SPAN)
    return Store(path, *arrays, **meta, spans=spans, folder=folder, before_line=before_line)


def _load(source: Source, folder: Path) -> Store | None:
    """The store in ``folder``; None if there is none, or if its checksums do not match."""
    if not all((folder / name).is_file() for name in ("meta.json", *FILES, SUMS)):
        return None  # a pipe would block
    try:
        if (folder / SUMS).read_bytes() == checksums(folder).encode():
            return _open(source.label, folder, source.before_line)
    except (OSError, ValueError, TypeError):
        pass
    return None


def open_store(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None = None,
    special_tokens_in_text: SpecialTokens = "refuse",
    text_prompts: TextPrompts = "plain",
    loss_on: LossOn = "last",
) -> Store:
    """The store of ``source``: from the cache, or built. A damaged one is deleted, logged and built again.

    Args:
        source: source to read.
        tokenizer: the policy's tokenizer, with a chat template if the source has messages.
        folder: folder of all stores; default: ``data`` in :func:`halos_pl.cache.cache_root`.
        special_tokens_in_text: see :class:`halos_pl.data.special.SpecialText`.
        text_prompts: see :mod:`halos_pl.data.prompts`.
        loss_on: see :mod:`halos_pl.data.loss_on`.

    Raises:
        DataError: the source as a whole is faulty, or the cache cannot be written. Faults of rows are in the store.
    """
    if not isinstance(source, MemorySource) and not Path(source.path).exists() and not is_hub_name(source.path):
        raise DataError(str(next(iter(read(source)))))
    home = folder or cache_root() / "data"
    try:
        place = home / store_key(source, tokenizer, special_tokens_in_text, text_prompts, loss_on)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error.strerror}); check its permissions") from error
    limit()  # a faulty setting fails before the work
    with suppress(OSError):  # a read-only cache can still be read
        home.mkdir(parents=True, exist_ok=True)
    use = Use(place)
    if store := _load(source, place):  # without the lock, which a read-only cache does not allow
        return replace(store, use=use)
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / ".writable").touch()
    except OSError as error:
        raise DataError(
            f"the cache folder {home} cannot be written ({error.strerror}); name another one with data.cache_dir or"
            " HALOS_CACHE"
        ) from error
    with Lease(Path(f"{place}.lock")).held():
        if (store := _load(source, place)) is None:  # else another process has built it meanwhile
            if place.exists():
                from lightning.pytorch.utilities import rank_zero_info

                rank_zero_info(f"halos: the cached tokens of {source.path} are damaged; they are recomputed")
            part = place.with_name(f"{place.name}.{unique_name()}{PART}")
            part.mkdir()
            try:
                with naming(part):
                    build(source, Encoder(tokenizer, special_tokens_in_text, loss_on), part, text_prompts)
                publish(part, place, intact=lambda: _load(source, place) is not None)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            store = _open(source.label, place, source.before_line)
    make_room(home)
    return replace(store, use=use)
