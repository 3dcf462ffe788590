"""The name of a token store in the cache: a hash of all that its content depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from halos_pl.data.formats import hub_version
from halos_pl.data.memory import MemorySource
from halos_pl.data.source import Source


@cache
def code_version() -> str:
    """A hash of this package's files: another version of them may read or tokenise rows differently."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that affects the token ids of a text: JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    # A template may write any special token, and transformers renders it.
    return [vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map, transformers.__version__]


def content_hash(path: Path) -> str:
    """A hash of the bytes of a file, or of all files of a folder and their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def store_key(source: Source, tokenizer: PreTrainedTokenizerBase, *how: str) -> str:
    """A hash of the source's content and settings, the tokenizer, this package's code, and ``how`` texts are read.

    Raises:
        OSError: the source cannot be read.
    """
    # The weight says how often rows are seen, not what they are.
    settings = {f.name: getattr(source, f.name) for f in fields(source) if f.name not in ("weight", "data")}
    path = Path(source.path)
    if isinstance(source, MemorySource):
        settings["path"], content = "", source.digest()
    elif path.exists():
        settings["path"] = "".join(path.suffixes)  # a copy elsewhere is the same source
        content = content_hash(path)
    else:
        content = hub_version(source)
    parts = [settings, content, code_version(), tokenizer_state(tokenizer), *how]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
