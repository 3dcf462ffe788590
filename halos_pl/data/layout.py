"""The files of a token store and their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

# One row of feedback. ``label``: 1 desirable, 0 undesirable, -1 if there is only a score (NaN: none). ``pair``: the row
# of the pair's other completion, -1 without one. ``text``: a hash of the completion's tokens. ``agree``, ``disagree``:
# how many people judge it as ``label`` says, and how many the opposite; both 0 without a record. ``gold``: the row of
# its gold answer, -1 without one; a gold answer is no feedback, and its ``gold`` is its own row.
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
        ("weight", "<f8"),
        ("agree", "<f8"),
        ("disagree", "<f8"),
        ("gold", "<i8"),
    ]
)
SPAN = np.dtype([("row", "<i8"), ("start", "<i4"), ("stop", "<i4")])
FILES = ("prompts", "rows", "tokens")
SPANS = "spans"  # exists only if a completion carries the loss in parts
PROMPT = np.dtype([("start", "<i8"), ("length", "<i4"), ("key", "S16")])
SUMS = "SHA256SUMS"  # in the format of sha256sum


def checksums(folder: Path) -> str:
    """The SHA-256 of each file of a store, in the format of ``sha256sum``."""
    lines = []
    for name in ("meta.json", *FILES, *([SPANS] if (folder / SPANS).is_file() else [])):
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)
