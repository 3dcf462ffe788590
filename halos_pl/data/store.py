"""A source as token ids on disk: read, checked and tokenised once, then memory-mapped by whoever needs it.

What is stored depends on the source and the tokenizer and on nothing else, so that all objectives, runs and ranks
share it. It is found again by its content: the key is a hash of the source's bytes, of how it is read, of the
tokenizer, and of the code that reads.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from halos_pl.cache import Use, cache_root, limit, make_room
from halos_pl.common.files import naming, remove
from halos_pl.data import (
    arrow,
    broken,
    calls,
    columns,
    formats,
    loss_on,
    meanings,
    memory,
    prompts,
    published,
    read,
    schemas,
    spans,
    special,
    text,
    tokenize,
    turns,
    values,
)
from halos_pl.data import example as example_module
from halos_pl.data.example import DataError, Example, Fault, Skipped
from halos_pl.data.source import Source

CHUNK = 1024  # examples tokenised at a time
CHUNK_SIZE = 16_000_000  # characters of them
SUMS = "SHA256SUMS"  # as sha256sum writes and checks it
SHOWN_FAULTS = 10
SHOWN_PLACES = 3
KEPT_FAULTS = 1000

# One row of feedback. ``label``: 1 desirable, 0 undesirable, -1 where only a score is known (NaN: none). ``pair``: the
# row of the pair's other completion, -1 where there is none. ``text``: a hash of the completion's tokens.
ROW = np.dtype(
    [
        ("prompt", "<i4"),
        ("start", "<i8"),
        ("length", "<i4"),
        ("label", "<i1"),
        ("score", "<f8"),
        ("pair", "<i8"),
        ("line", "<i8"),
        ("suffix", "<i4"),
        ("text", "<u8"),
    ]
)
SPAN = np.dtype([("row", "<i8"), ("start", "<i4"), ("stop", "<i4")])
FILES = ("prompts", "rows", "tokens")
SPANS = "spans"  # a file that is there only where some completion carries the loss in parts
PROMPT = np.dtype([("start", "<i8"), ("length", "<i4"), ("key", "S16")])


@dataclass(frozen=True)
class Store:
    """What is on disk of one source.

    Attributes:
        path: the source's label: its path as it was given.
        tokens: int32 [t], the token ids of all texts one after the other.
        prompts: ``PROMPT`` [p], the distinct prompts: place and length in ``tokens``, and a hash of their tokens.
        rows: ``ROW`` [n], in the order of the source.
        suffixes: what follows the line in a row's name.
        examples: sound rows of the source; one may give several of ``rows``.
        found_faults: the first ``KEPT_FAULTS`` faults, as (what follows the source's name in their place, reason).
        fault_count: all of them.
        fault_reasons: how many faults have each of the first ``KEPT_FAULTS`` reasons.
        skipped: number of rows that are sound but say nothing, by reason.
        unused: columns that say something and that nothing reads.
        digest: a hash of tokens and rows; file names are no part of it.
        folder: where it is; None for one that was made in memory.
        spelling: number of examples, faulty ones included, whose text spells a special token.
        spelled: of these for each such token.
        use: keeps it from being removed.
        text_prompts: number of examples whose prompt is plain text in the source.
        notes: what is to be said of some examples, and of how many.
        spans: ``SPAN`` [s], by row, stretches of completions that carry the loss; none where all of one does.
        before_line: between ``path`` and line in a row's name.
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

    def __reduce__(self) -> Any:
        """Sent to a worker as its place: pickled, the mapped arrays would be copied."""
        return super().__reduce__() if self.folder is None else (_open, (self.path, self.folder, self.before_line))

    def name(self, row: int) -> str:
        """``SOURCE:LINE``, and which of the line's rows it is."""
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
        """bool [t], which tokens of a row's completion carry the loss; None where all of them do."""
        first, last = np.searchsorted(self.spans["row"], (row, row + 1))
        if first == last:
            return None
        found = np.zeros(int(self.rows["length"][row]), bool)
        for _, start, stop in self.spans[first:last].tolist():
            found[start:stop] = True
        return found

    def first_loss(self) -> NDArray[np.int64]:
        """int64 [n], the first token of each row's completion that carries the loss."""
        first = np.zeros(len(self.rows), np.int64)
        rows, places = np.unique(self.spans["row"], return_index=True)
        first[rows] = self.spans["start"][places]
        return first

    @property
    def causes(self) -> list[tuple[int, str]]:
        """Of each reason why rows are faulty the number of rows, and a line that names the first; most rows first."""
        places: dict[str, list[str]] = {}
        for place, reason in self.found_faults:
            places.setdefault(reason, []).append(f"{self.path}{place}")
        found = []
        for reason, named in places.items():
            count = max(self.fault_reasons.get(reason, 0), len(named))
            shown = named if count <= SHOWN_PLACES else named[:SHOWN_PLACES]
            more = f" and {count - len(shown)} more rows" if count > len(shown) else ""
            found.append((count, f"{', '.join(shown)}{more}: {reason}"))
        return sorted(found, key=lambda cause: -cause[0])

    @property
    def faults(self) -> list[str]:
        """The lines of ``causes``."""
        return [line for _, line in self.causes]


def fault_list(causes: list[tuple[int, str]], count: int) -> str:
    """The first few causes of ``count`` faults, and how many more faults there are."""
    shown = causes[:SHOWN_FAULTS]
    more = count - sum(rows for rows, _ in shown)
    lines = [line for _, line in shown]
    return "\n".join([*lines, *([f"... and {more} more fault{'s' * (more > 1)}"] if more else [])])


class _Writer:
    """Appends examples to the files of a store."""

    def __init__(self, folder: Path, source: Source, encoder: tokenize.Encoder) -> None:
        self.folder, self.source, self.encoder = folder, source, encoder
        self.files = {name: (folder / name).open("wb") for name in (*FILES, SPANS)}
        self.place = self.row = self.examples = self.fault_count = self.text_prompts = 0
        self.known: dict[bytes, int] = {}
        self.suffixes: dict[str, int] = {}
        self.faults: list[tuple[str, str]] = []
        self.reasons: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.unused: dict[str, None] = {}
        self.digest = hashlib.sha256()

    def fault(self, fault: Fault) -> None:
        self.fault_count += 1
        new = fault.reason not in self.reasons
        if not new or len(self.reasons) < KEPT_FAULTS:
            self.reasons[fault.reason] = self.reasons.get(fault.reason, 0) + 1
        if len(self.faults) < KEPT_FAULTS or (new and len(self.reasons) < KEPT_FAULTS):
            # Without the source's own name: a copy of the file has another.
            self.faults.append((fault.place.removeprefix(self.source.path), fault.reason))

    def add(self, examples: list[Example]) -> None:
        """Tokenises and writes; an example that cannot be tokenised is a fault."""
        rows: list[tuple[Any, ...]] = []
        new: list[tuple[int, int, bytes]] = []
        for example, found in zip(examples, self.encoder.encode(examples), strict=True):
            if isinstance(found, ValueError):
                self.fault(Fault(example.row_id, str(found)))
                continue
            self.examples += 1
            self.text_prompts += example.text_prompt
            raw = np.asarray(found.prompt, dtype="<i4").tobytes()
            key = hashlib.blake2b(raw, digest_size=16).digest()
            if key not in self.known:
                self.known[key] = len(self.known)
                new.append((self.place, len(found.prompt), key))
                self.files["tokens"].write(raw)
                self.place += len(found.prompt)
            rows += self._rows(example, self.known[key], found)
        for name, written in (("rows", np.array(rows, dtype=ROW)), ("prompts", np.array(new, dtype=PROMPT))):
            self.files[name].write(written.tobytes())
        for example_rows in rows:  # what the model sees, and how it was judged
            prompt, _, length, label, score, pair, _, _, text = example_rows
            self.digest.update(repr((prompt, length, label, score, pair - self.row, text)).encode())
        self.digest.update(b"".join(key for _, _, key in new))

    def _rows(self, example: Example, prompt: int, found: tokenize.Tokens) -> Iterator[tuple[Any, ...]]:
        line, _, rest = example.row_id.removeprefix(self.source.place("")).partition("#")
        part = f"#{rest}" if rest else ""
        first = self.row
        for k, (ids, carrying) in enumerate(zip(found.completions, found.spans, strict=True)):
            several = len(found.completions) > 1
            which = ("#chosen", "#rejected")[k] if example.paired else f"#{k + 1}" if several else ""
            suffix = self.suffixes.setdefault(part + which, len(self.suffixes))
            label, score = example.labels[k], example.scores[k]
            raw = np.asarray(ids, dtype="<i4").tobytes()
            self.files["tokens"].write(raw)
            self.files[SPANS].write(np.array([(self.row, *span) for span in carrying], dtype=SPAN).tobytes())
            self.digest.update(repr(carrying).encode() if carrying else b"")
            yield (
                prompt,
                self.place,
                len(ids),
                -1 if label is None else int(label),
                np.nan if score is None else score,
                first + 1 - k if example.paired else -1,
                int(line),
                suffix,
                int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"),
            )
            self.place += len(ids)
            self.row += 1

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if not (self.folder / SPANS).stat().st_size:
            (self.folder / SPANS).unlink()
        meta = {
            "suffixes": list(self.suffixes),
            "examples": self.examples,
            "found_faults": self.faults,
            "fault_count": self.fault_count,
            "fault_reasons": self.reasons,
            "skipped": dict(self.skipped),
            "unused": list(self.unused),
            "spelling": self.encoder.spelling,
            "spelled": dict(self.encoder.spelled.most_common()),
            "text_prompts": self.text_prompts,
            "notes": dict(self.encoder.notes),
            "digest": self.digest.hexdigest(),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        (self.folder / SUMS).write_text(_sums(self.folder), encoding="utf-8")


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Lists of some items; a few where they are large, for tokenising takes a hundred times their size."""
    chunk: list[Any] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += item.size if isinstance(item, Example) else 0
        if len(chunk) == CHUNK or size > CHUNK_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _build(source: Source, encoder: tokenize.Encoder, folder: Path, text_prompts: prompts.TextPrompts) -> None:
    """Reads the source once, in bounded memory, and writes its store into ``folder``.

    Raises:
        DataError: for a fault of the source as a whole, a missing file, say; faults of rows are stored.
    """
    what = TextColumn("{task.description}", markup=False)  # a path may hold brackets
    columns = (SpinnerColumn(), what, TextColumn("{task.completed:,} rows"))
    with Progress(*columns, TimeElapsedColumn(), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"checking {source.path}", total=None)
        writer = _Writer(folder, source, encoder)
        try:
            for chunk in _chunks(read.read(source, writer.unused, text_prompts, encoder.loss_on)):
                sound = []
                for item in chunk:
                    if isinstance(item, Skipped):
                        writer.skipped[item.reason] += 1
                    elif isinstance(item, Fault):
                        if item.fatal:
                            raise DataError(str(item))
                        writer.fault(item)
                    else:
                        sound.append(item)
                writer.add(sound)
                progress.update(task, advance=len(chunk))
        finally:
            writer.close()


@cache
def _code() -> str:
    """A hash of the code that decides what a store holds."""
    digest = hashlib.sha256()
    for module in (
        example_module,
        broken,
        text,
        arrow,
        formats,
        values,
        published,
        schemas,
        columns,
        meanings,
        memory,
        prompts,
        loss_on,
        read,
        tokenize,
        spans,
        special,
        turns,
        calls,
        sys.modules[__name__],
    ):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    # A template may write any special token, and is carried out by transformers.
    return [vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map, transformers.__version__]


def _content(path: Path) -> str:
    """A hash of the bytes of a file, or of all files of a folder and their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, *how: str) -> str:
    # How often rows are seen does not change them.
    settings = {f.name: getattr(source, f.name) for f in fields(source) if f.name not in ("weight", "data")}
    path = Path(source.path)
    if isinstance(source, memory.MemorySource):
        settings["path"], content = "", source.digest()
    elif path.exists():
        settings["path"] = "".join(path.suffixes)  # a copy elsewhere is the same source
        content = _content(path)
    else:
        content = formats.hub_version(source)
    parts = [settings, content, _code(), _tokenizer_state(tokenizer), *how]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _open(path: str, folder: Path, before_line: str = ":") -> Store:
    def mapped(name: str, dtype: Any) -> NDArray[Any]:
        file = folder / name
        empty: NDArray[Any] = np.empty(0, dtype)  # an empty file cannot be mapped
        return np.memmap(file, dtype, mode="r") if file.stat().st_size else empty

    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = mapped("tokens", "<i4"), mapped("prompts", PROMPT), mapped("rows", ROW)
    spans = mapped(SPANS, SPAN) if (folder / SPANS).is_file() else np.empty(0, SPAN)
    return Store(path, *arrays, **meta, spans=spans, folder=folder, before_line=before_line)


def _sums(folder: Path) -> str:
    lines = []
    for name in ("meta.json", *FILES, *([SPANS] if (folder / SPANS).is_file() else [])):
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def _found(path: str, folder: Path, before_line: str) -> Store | None:
    """The store in ``folder``; None where there is none, or where a byte of it is not what was written."""
    if not all((folder / name).is_file() for name in ("meta.json", *FILES, SUMS)):
        return None  # a pipe, say, would never end
    try:
        return _open(path, folder, before_line) if (folder / SUMS).read_bytes() == _sums(folder).encode() else None
    except (OSError, ValueError, TypeError):
        return None


def open_store(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None = None,
    special_tokens_in_text: special.SpecialTokens = "refuse",
    text_prompts: prompts.TextPrompts = "plain",
    loss_on: spans.LossOn = "last",
) -> Store:
    """The store of ``source``, made if it is not there yet.

    Args:
        source: what to read.
        tokenizer: with a chat template where the source has messages.
        folder: of all stores; left out, ``data`` in :func:`halos_pl.cache.cache_root`.
        special_tokens_in_text: see :class:`halos_pl.data.special.SpecialText`.
        text_prompts: see :mod:`halos_pl.data.prompts`.
        loss_on: see :mod:`halos_pl.data.loss_on`.

    Raises:
        DataError: for a fault of the source as a whole, a missing file, say. Faults of rows are in the store.
    """
    path = Path(source.path)
    in_memory = isinstance(source, memory.MemorySource)
    if not in_memory and not path.exists() and not formats.is_hub_name(source.path):
        raise DataError(str(next(iter(read.read(source)))))
    home = folder or cache_root() / "data"
    try:
        place = home / _key(source, tokenizer, special_tokens_in_text, text_prompts, loss_on)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error.strerror}); check its permissions") from error
    limit()  # a faulty setting is said before the work
    with suppress(OSError):  # a cache that is only read may be read-only
        home.mkdir(parents=True, exist_ok=True)
    use = Use(place)
    if store := _found(source.label, place, source.before_line):  # without the lock, for the same reason
        return replace(store, use=use)
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / ".writable").touch()
    except OSError as error:
        raise DataError(
            f"the cache folder {home} cannot be written ({error.strerror}); name another one with data.cache_dir or"
            " HALOS_CACHE"
        ) from error
    with FileLock(f"{place}.lock"):
        if (store := _found(source.label, place, source.before_line)) is None:  # not written meanwhile
            if place.exists():
                rank_zero_info(f"halos: what the cache holds of {source.path} is damaged; it is recomputed")
            part = place.with_suffix(".part")
            remove(part)
            part.mkdir()
            try:
                with naming(part):
                    _build(source, tokenize.Encoder(tokenizer, special_tokens_in_text, loss_on), part, text_prompts)
                remove(place)
                os.replace(part, place)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            store = _open(source.label, place, source.before_line)
    make_room(home)
    return replace(store, use=use)
