"""Answers of a model at a server with OpenAI's chat completions API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from halos_pl.collect.engine import Answer, Messages
from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import EndpointError, Request
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.sampling.remote import SET


class EndpointEngine:
    """A model at a server, which is asked for one completion per request, each with a seed of its own.

    Args:
        settings: the server.
        sampling: ``max_new_tokens``, ``temperature`` and ``top_p``.

    Raises:
        EndpointError: the server cannot be used.
    """

    def __init__(self, settings: EndpointSettings, sampling: dict[str, Any]) -> None:
        self._endpoint = Endpoint(settings)
        self._endpoint.check_reachable()
        self.workers = settings.concurrency
        self.model = {"name": settings.model, "url": settings.url}
        extra = settings.extra_body or {}
        removed = {option for field, option in SET.items() if field in extra}  # other values than null are refused
        self._how, self.seeded = sampling, "seed" not in removed
        self.sampling = {"engine": "endpoint"} | {name: each for name, each in sampling.items() if name not in removed}
        self.sampling |= {"extra_body": extra} if extra else {}

    def refuse(self, messages: Messages) -> None:
        """Only the server can tell whether it reads a conversation."""

    def answer(self, messages: Messages, seeds: Sequence[int], show: Callable[[list[str]], None]) -> list[Answer]:
        show([""] * len(seeds))
        how = self._how
        requests = [Request(messages, how["max_new_tokens"], how["temperature"], how["top_p"], seed) for seed in seeds]
        answers: dict[int, Answer] = {}
        for i, reply in self._endpoint.complete(requests):
            if isinstance(reply, EndpointError):
                raise reply
            [choice] = reply.choices
            answers[i] = Answer(choice.text, choice.finished)
            show([answers[k].text if k in answers else "" for k in range(len(seeds))])
        return [answers[i] for i in range(len(seeds))]
