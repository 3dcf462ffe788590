"""Replies of endpoints on disk, so that a killed command need not pay for them again."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from halos_pl.common.files import naming
from halos_pl.endpoint.exchange import Choice, Reply, Request


def content_key(model: str, request: Request, extra_body: dict[str, Any] | None = None) -> str:
    """Hash of everything that affects a reply, except the server's URL."""
    content = json.dumps([model, asdict(request), extra_body or {}], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class Transcripts:
    """Requests and replies as JSON lines, which are only appended to. Threads may share it.

    A last line that a killed process left incomplete is removed and reported.

    Args:
        path: File to read and extend; created with the first reply. None keeps the replies in memory.
        redact: Removes secrets from each line.

    Raises:
        ValueError: The file contains other lines; names file and line.
    """

    def __init__(self, path: Path | None, redact: Callable[[str], str] = str) -> None:
        self.path, self._redact, self._lock = path, redact, threading.Lock()
        self._replies: dict[str, Reply] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._replies)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                self._replies.setdefault(entry["key"], _reply(entry["reply"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is not a transcript of an endpoint; move the file or remove the line"
                ) from error
        if content[end:]:
            print(f"halos: {path}: dropped the last line, which a killed command left incomplete", file=sys.stderr)
            with path.open("r+b") as file:
                file.truncate(end)

    def find(self, key: str) -> Reply | None:
        """The reply to a request with this key, if any."""
        with self._lock:
            reply = self._replies.get(key)
        return None if reply is None else replace(reply, reused=True)

    def add(self, key: str, model: str, request: Request, reply: Reply) -> Reply:
        """Records a reply; returns the earlier one if another thread has recorded the same request meanwhile.

        Raises:
            OSError: The file cannot be written; names it.
        """
        stored = {name: value for name, value in asdict(reply).items() if name != "reused"}
        entry = {"key": key, "model": model, "request": asdict(request), "reply": stored}
        line = self._redact(json.dumps(entry, ensure_ascii=False)) + "\n"
        with self._lock:
            if key in self._replies:
                return self._replies[key]
            if self.path is not None:
                with naming(self.path), self.path.open("ab", buffering=0) as file:
                    file.write(line.encode("utf-8", "surrogatepass"))
            self._replies[key] = reply
        return reply


def _reply(stored: dict[str, Any]) -> Reply:
    return Reply(
        [
            Choice(each["text"], bool(each["finished"]), each["logprobs"], each["top_logprobs"])
            for each in stored["choices"]
        ],
        stored["prompt_tokens"],
        stored["completion_tokens"],
    )
