"""Reads and tokenises a source once, in bounded memory, and writes its token store."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from halos_pl.data.example import DataError, Example, Fault, Skipped
from halos_pl.data.layout import FILES, PROMPT, ROW, SPAN, SPANS, SUMS, checksums
from halos_pl.data.prompts import TextPrompts
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.data.tokenize import Encoder, Tokens

CHUNK = 1024  # examples tokenised at a time
CHUNK_SIZE = 16_000_000  # characters of them
KEPT_FAULTS = 1000


class _Writer:
    """Appends examples to the files of a store."""

    def __init__(self, folder: Path, source: Source, encoder: Encoder) -> None:
        self.folder, self.source, self.encoder = folder, source, encoder
        self.files = {name: (folder / name).open("wb") for name in (*FILES, SPANS)}
        self.place = self.row = self.examples = self.fault_count = self.text_prompts = 0
        self.prompts: dict[bytes, int] = {}  # by a hash of their tokens
        self.suffixes: dict[str, int] = {}
        self.faults: list[tuple[str, str]] = []
        self.reasons: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.unused: dict[str, None] = {}
        self.weighted_by: str | None = None
        self.digest = hashlib.sha256()

    def fault(self, fault: Fault) -> None:
        self.fault_count += 1
        new = fault.reason not in self.reasons
        if not new or len(self.reasons) < KEPT_FAULTS:
            self.reasons[fault.reason] = self.reasons.get(fault.reason, 0) + 1
        if len(self.faults) < KEPT_FAULTS or (new and len(self.reasons) < KEPT_FAULTS):
            # Without the source's name, which differs for a copy of the file.
            self.faults.append((fault.place.removeprefix(self.source.path), fault.reason))

    def add(self, examples: list[Example]) -> None:
        """Tokenises and writes examples; one that cannot be tokenised is a fault."""
        rows: list[tuple[Any, ...]] = []
        new: list[tuple[int, int, bytes]] = []
        for example, tokens in zip(examples, self.encoder.encode(examples), strict=True):
            if isinstance(tokens, ValueError):
                self.fault(Fault(example.row_id, str(tokens)))
                continue
            self.examples += 1
            self.text_prompts += example.text_prompt
            self.weighted_by = example.weighted_by
            raw = np.asarray(tokens.prompt, dtype="<i4").tobytes()
            key = hashlib.blake2b(raw, digest_size=16).digest()
            if key not in self.prompts:
                self.prompts[key] = len(self.prompts)
                new.append((self.place, len(tokens.prompt), key))
                self.files["tokens"].write(raw)
                self.place += len(tokens.prompt)
            rows += self._rows(example, self.prompts[key], tokens)
        for name, written in (("rows", np.array(rows, dtype=ROW)), ("prompts", np.array(new, dtype=PROMPT))):
            self.files[name].write(written.tobytes())
        for example_rows in rows:  # what the model sees, and the labels
            prompt, _, length, label, score, pair, _, _, text, *weights, gold = example_rows
            self.digest.update(repr((prompt, length, label, score, pair - self.row, text, weights)).encode())
            self.digest.update(repr(gold - self.row).encode() if gold >= 0 else b"")
        self.digest.update(b"".join(key for _, _, key in new))

    def _rows(self, example: Example, prompt: int, tokens: Tokens) -> Iterator[tuple[Any, ...]]:
        line, _, rest = example.row_id.removeprefix(self.source.place("")).partition("#")
        part = f"#{rest}" if rest else ""
        first = self.row
        gold = first + len(tokens.completions) - 1 if example.gold else -1
        for k, (ids, carrying) in enumerate(zip(tokens.completions, tokens.spans, strict=True)):
            several = len(tokens.completions) > 1
            is_gold = self.row == gold
            which = ("#chosen", "#rejected", "#gold")[k] if example.paired else f"#{k + 1}" if several else ""
            suffix = self.suffixes.setdefault(part + which, len(self.suffixes))
            label, score = example.labels[k], example.scores[k]
            votes = (0.0, 0.0) if is_gold or example.votes is None else example.votes
            if not (label or example.paired):
                votes = votes[::-1]
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
                first + 1 - k if example.paired and not is_gold else -1,
                int(line),
                suffix,
                int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"),
                example.weight,
                *votes,
                gold if label else -1,
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
            "weighted_by": self.weighted_by,
            "notes": dict(self.encoder.notes),
            "digest": self.digest.hexdigest(),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        (self.folder / SUMS).write_text(checksums(self.folder), encoding="utf-8")


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """The items in lists, shorter where items are large: tokenising takes a hundred times their size."""
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


def build(source: Source, encoder: Encoder, folder: Path, text_prompts: TextPrompts) -> None:
    """Reads and tokenises ``source`` and writes its store into ``folder``.

    Raises:
        DataError: the source as a whole is faulty. Faults of rows are stored.
    """
    description = TextColumn("{task.description}", markup=False)  # a path may contain brackets
    columns = (SpinnerColumn(), description, TextColumn("{task.completed:,} rows"))
    with Progress(*columns, TimeElapsedColumn(), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"checking {source.path}", total=None)
        writer = _Writer(folder, source, encoder)
        try:
            for chunk in _chunks(read(source, writer.unused, text_prompts, encoder.loss_on)):
                examples = []
                for item in chunk:
                    if isinstance(item, Skipped):
                        writer.skipped[item.reason] += 1
                    elif isinstance(item, Fault):
                        if item.fatal:
                            raise DataError(str(item))
                        writer.fault(item)
                    else:
                        examples.append(item)
                writer.add(examples)
                progress.update(task, advance=len(chunk))
        finally:
            writer.close()
