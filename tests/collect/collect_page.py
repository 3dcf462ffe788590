"""A model whose answers the tests decide, and the page of ``halos collect`` on a port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halos_pl.collect.access import Access
from halos_pl.collect.conversations import Conversations
from halos_pl.collect.engine import Answer
from halos_pl.collect.feedback_file import FeedbackFile
from halos_pl.collect.gallery import Gallery


class FakeEngine:
    """Answers with ``answer to MESSAGE``, numbered if there are two, word by word.

    Attributes:
        asked: messages and seeds of each call.
        most: largest number of calls at the same time.
        gate: while it is cleared, answers stop after their first word.
        fails: raised instead of the next answer.
        texts: the next answers, instead of the usual ones.
    """

    def __init__(self, pause: float = 0.0) -> None:
        self.model: dict[str, Any] = {"name": "fake", "weights": "0123"}
        self.sampling: dict[str, Any] = {"engine": "fake", "max_new_tokens": 40, "temperature": 0.7}
        self.workers, self.seeded, self.pause = 1, True, pause
        self.asked: list[tuple[list[dict[str, Any]], list[int]]] = []
        self.now = self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Exception | None = None
        self.texts: list[str] | None = None
        self.refused: str | None = None

    def refuse(self, messages: list[dict[str, Any]]) -> None:
        if self.refused is not None:
            raise ValueError(self.refused)

    def answer(
        self, messages: list[dict[str, Any]], seeds: list[int], show: Callable[[list[str]], None]
    ) -> list[Answer]:
        number = len(seeds)
        self.asked.append((messages, seeds))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.fails is not None:
                error, self.fails = self.fails, None
                raise error
            usual = [f"answer {'AB'[i] + ' ' if number > 1 else ''}to {messages[-1]['content']}" for i in range(number)]
            texts, self.texts = self.texts or usual, None
            words = max(len(text.split()) for text in texts)
            for end in range(1, words + 1):
                show([" ".join(text.split()[:end]) for text in texts])
                time.sleep(self.pause)
                while not self.gate.wait(0.02):
                    show([" ".join(text.split()[:end]) for text in texts])
            return [Answer(text, len(text.split()) < 40, True) for text in texts]
        finally:
            self.now -= 1


def make_site(path: Path, kind: Any = "thumbs", engine: Any = None, password: str | None = None, **options: Any) -> Any:
    """A site that collects into ``path``; without an engine, a gallery of it."""
    from halos_pl.collect.app import Site

    hosts = None if password else frozenset(("localhost", "127.0.0.1", "testserver"))
    conversations = None if engine is None else Conversations(engine, FeedbackFile(path, kind), **options)
    return Site(Access(password, hosts, "halos_test"), conversations, Gallery(path), "fake" if engine else path.name)


@contextmanager
def serving(site: Any) -> Iterator[str]:
    """The site on a free port, and its address."""
    from uvicorn import Config, Server

    from halos_pl.collect.app import make_app
    from halos_pl.collect.server import address_of, bound

    listener = bound("127.0.0.1", 0)
    server = Server(Config(make_app(site), log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield address_of(listener)[0]
    finally:
        server.should_exit = True
        close(site)
        thread.join(10)
        listener.close()


def close(site: Any) -> None:
    """Ends the threads of a site, and gives its file back."""
    if site.conversations is not None:
        site.conversations.close()
        site.conversations.file.close()
