"""Replies of endpoints on disk, so that a killed command need not pay for them again."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from halos_pl.common.files import check_target, lock, naming
from halos_pl.endpoint.exchange import Choice, Reply, Request

#: Seconds between looks at whether another process has finished.
POLL = 0.2


def content_key(model: str, request: Request, extra_body: dict[str, Any] | None = None) -> str:
    """Hash of everything that affects a reply, except the server's URL."""
    content = json.dumps([model, asdict(request), extra_body or {}], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


class Transcripts:
    """Requests and replies as JSON lines, which are only appended to. Threads may share it.

    Other processes that need the file wait until this one ends, and then find its replies instead of asking again. A
    last line that a killed process left incomplete is removed and reported.

    Args:
        path: File to read and extend; created with the first question for a reply. None keeps the replies in memory.
        redact: Removes secrets from each line.

    Raises:
        ValueError: The file contains other lines; names file and line.
        OSError: The file cannot be written; names it.
    """

    def __init__(self, path: Path | None, redact: Callable[[str], str] = str) -> None:
        self.path, self._redact, self._lock = path, redact, threading.Lock()
        self._replies: dict[str, Reply] = {}
        self._file: IO[bytes] | None = None
        if path is not None:
            check_target(path)
            if path.exists():
                self._open(path)

    def __len__(self) -> int:
        return len(self._replies)

    def _open(self, path: Path) -> None:
        """Opens the file, once no other process has it open, and reads it."""
        file, told = path.open("a+b", buffering=0), False
        while True:
            try:
                lock(file, path)
                break
            except FileExistsError:
                if not told:
                    print(f"halos: waits for another process, which is writing to {path}", file=sys.stderr, flush=True)
                told = True
                time.sleep(POLL)
        self._read(file, path)
        self._file = file

    def _read(self, file: IO[bytes], path: Path) -> None:
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                self._replies.setdefault(entry["key"], _reply(entry["reply"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number} is not a transcript of an endpoint; move the file or remove the line"
                ) from error
        if content[end:]:
            print(f"halos: {path}: dropped the last line, which a killed command left incomplete", file=sys.stderr)
            file.truncate(end)

    def find(self, key: str) -> Reply | None:
        """The reply to a request with this key, if any.

        Raises:
            ValueError, OSError: The file cannot be used.
        """
        with self._lock:
            if self._file is None and self.path is not None:
                self._open(self.path)
            reply = self._replies.get(key)
        return None if reply is None else replace(reply, reused=True)

    def add(self, key: str, model: str, request: Request, reply: Reply) -> Reply:
        """Records a reply to a request that was not found; returns that of another thread if it came first.

        Raises:
            OSError: The file cannot be written; names it.
        """
        stored = {name: value for name, value in asdict(reply).items() if name != "reused"}
        entry = {"key": key, "model": model, "request": asdict(request), "reply": stored}
        line = self._redact(json.dumps(entry, ensure_ascii=False)) + "\n"
        with self._lock:
            if key in self._replies:
                return self._replies[key]
            if self.path is not None and self._file is not None:
                with naming(self.path):
                    self._file.write(line.encode("utf-8", "surrogatepass"))
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
