"""The engine ``endpoint``: a model at a server with OpenAI's chat completions API."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import PromptRow
from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import Choice, EndpointError, Reply, Request
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.endpoint.usage import estimate
from halos_pl.sampling.engine import Sampled, SamplingSettings

#: Fields of a request that options set, and these options.
SET = {"max_tokens": "max_new_tokens", **{name: name for name in ("temperature", "top_p", "seed", "logprobs")}}


def named_server(
    model: str,
    engine: str,
    endpoint: EndpointSettings | None,
    local: Mapping[str, Any],
    remote: Mapping[str, Any] | None = None,
) -> EndpointSettings | None:
    """The server to sample at; None for a model in this process.

    Args:
        model: Name of the model.
        engine: ``transformers`` or ``endpoint``.
        endpoint: Settings of the server, if there are any.
        local: Options for a model in this process alone, by name; false unless given.
        remote: Options for a server alone.

    Raises:
        DataError: An option has no effect, or contradicts another one.
    """
    if engine == "transformers":
        if used := [name for name, value in (remote or {}).items() if value]:
            raise DataError(f"--{used[0]} has no effect on a model in this process; use --engine endpoint, or omit it")
        if endpoint is not None:
            raise DataError("--endpoint.url is only used with --engine endpoint; set that, or remove it")
        return None
    if endpoint is None:
        raise DataError("--engine endpoint needs --endpoint.url, the base URL of a server")
    if endpoint.model not in ("", model):
        raise DataError(f"the model is {model}, but --endpoint.model is {endpoint.model}; omit the latter")
    if used := [name for name, value in local.items() if value]:
        raise DataError(f"--{used[0]} has no effect on a server; use --engine transformers, or omit it")
    for field, option in SET.items():
        if (endpoint.extra_body or {}).get(field) is not None:
            raise DataError(f"endpoint.extra_body sets {field}; set --{option} instead (null removes the field)")
    return replace(endpoint, model=model)


class EndpointEngine:
    """Samples at a server, one request per completion, so that each has its seed.

    Args:
        settings: The server.
        rows: The prompts, as messages.
        sampling: How to draw.
        logprobs: Whether to ask for log-probs.
        transcripts: File that keeps replies until all are there.

    Raises:
        DataError: A prompt cannot be sent; names it.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        rows: Sequence[PromptRow],
        sampling: SamplingSettings,
        *,
        logprobs: bool,
        transcripts: Path | None,
    ) -> None:
        self.rows, self.sampling, self.logprobs = rows, sampling, logprobs
        for row in rows:
            if row.tools:
                raise DataError(f"{row.place}: the prompt has tools, which --engine endpoint does not send")
            if isinstance(row.prompt, str) or row.prompt[-1]["role"] == "assistant":
                raise DataError(
                    f"{row.place}: a server only answers messages that end with another one than the assistant's;"
                    " use --engine transformers to continue a text"
                )
        self._endpoint = Endpoint(settings, transcripts)

    def load(self) -> dict[str, Any]:
        self._endpoint.check_reachable()
        return {}

    def _requests(self, row: PromptRow) -> list[Request]:
        how = self.sampling
        messages = [dict(message) for message in row.prompt if isinstance(message, dict)]
        return [
            Request(messages, how.max_new_tokens, how.temperature, how.top_p, seed, logprobs=self.logprobs)
            for seed in how.seeds(row)
        ]

    def sample(self, done: Collection[int]) -> Iterator[tuple[int, list[Sampled] | EndpointError]]:
        n = self.sampling.n
        left = [i for i in range(len(self.rows)) if i not in done]
        requests = [request for i in left for request in self._requests(self.rows[i])]
        print(f"halos: {estimate(requests, self._endpoint.settings)}")
        waiting: dict[int, dict[int, Reply]] = {}
        given = False
        failed: set[int] = set()
        for number, outcome in self._endpoint.complete(requests):
            row, k = left[number // n], number % n
            if self.logprobs and isinstance(outcome, Reply):
                lacking = any(_logprobs(choice) is None for choice in outcome.choices)
                if lacking and not given:  # the others would cost, and fail
                    raise EndpointError(
                        f"{self.rows[row].place}: the reply has no log-probs; if the server gives none, set --logprobs"
                        " false",
                        fatal=True,
                    )
                given = given or any(choice.logprobs for choice in outcome.choices)
                outcome = EndpointError("the reply has no log-probs") if lacking else outcome
            if isinstance(outcome, EndpointError):
                if row not in failed:
                    failed.add(row)
                    yield row, outcome
                continue
            replies = waiting.setdefault(row, {})
            replies[k] = outcome
            if len(replies) == n:
                sent = "seed" not in (self._endpoint.settings.extra_body or {})
                seeds = self.sampling.seeds(self.rows[row])
                yield row, [_sampled(replies[k], seed if sent else None) for k, seed in enumerate(seeds)]
                del waiting[row]

    def summary(self) -> str:
        return self._endpoint.usage.line(self._endpoint.settings)


def _sampled(reply: Reply, seed: int | None) -> Sampled:
    (choice,) = reply.choices
    return Sampled(choice.text, choice.finished, seed, reply.completion_tokens, _logprobs(choice), None)


def _logprobs(choice: Choice) -> list[float] | None:
    """The log-probs of a completion. One that the model ended at once has none, and servers give no list for it."""
    return [] if choice.logprobs is None and choice.finished and not choice.text else choice.logprobs
