"""The client: requests in threads, repeated after passing failures, with replies kept on disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from halos_pl.endpoint.exchange import (
    EndpointError,
    MalformedReply,
    Reply,
    Request,
    UnusableReply,
    lacks_logprobs,
    read_reply,
)
from halos_pl.endpoint.failures import Failure, connection_failure, redactor, status_failure
from halos_pl.endpoint.pace import Pace, backoff
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.endpoint.time_limit import within
from halos_pl.endpoint.transcripts import Transcripts, content_key
from halos_pl.endpoint.usage import Usage

#: Seconds within which a connection must be made, and within which the first probe must be answered.
CONNECT, PROBE = 5.0, 10.0

_Job = tuple[int, str, Request]
_Outcome = tuple[int, Reply | BaseException]


class Endpoint:
    """A server with OpenAI's chat completions API.

    Args:
        settings: Settings of the endpoint.
        transcripts: JSON lines with all replies, which later calls with the same content reuse; None keeps none.
        pace: Waiting between attempts; tests replace it.

    Raises:
        EndpointError: The openai package is not installed.
        ValueError: No model is set, or the key or the file of transcripts is invalid.
    """

    def __init__(self, settings: EndpointSettings, transcripts: Path | None = None, pace: Pace | None = None) -> None:
        try:
            import openai
        except ImportError as error:
            raise EndpointError(
                "an endpoint needs the package openai: pip install 'halos_pl[endpoint]'", fatal=True
            ) from error
        if not settings.model:
            raise ValueError("endpoint.model is not set; it is the name of a model at the server")
        key = settings.api_key()
        self.settings, self.usage = settings, Usage()
        self._openai, self._redact = openai, redactor(key)
        self._transcripts = Transcripts(transcripts, self._redact)
        self._pace, self._reached = pace or Pace(), False
        self._client = openai.AsyncOpenAI(
            base_url=settings.url,
            api_key=key or "none",
            max_retries=0,
            # Half, so that an absent server is told from a slow one, which settings.timeout limits as a whole.
            timeout=openai.Timeout(None, connect=min(CONNECT, settings.timeout / 2)),
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not settings.is_local, follow_redirects=False),
        )

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply | EndpointError]]:
        """Sends requests, several at a time.

        Replies are written to the transcripts as they arrive, so a killed command that is repeated reuses them.

        Args:
            requests: The requests; read as they are sent.

        Yields:
            The number of a request in ``requests`` and its reply, or the error after the last attempt, in the order in
            which they finish.

        Raises:
            EndpointError: Every further request would fail: the server is down, refuses the key or lacks the model.
        """
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        stop, threads, pending = threading.Event(), list[threading.Thread](), 0
        try:
            for number, request in enumerate(requests):
                key = content_key(self.settings.model, request, self.settings.extra_body)
                if (reply := self._transcripts.find(key)) is not None:
                    self.usage.add(reply)
                    yield number, reply
                    continue
                self.check_reachable()
                if pending == len(threads):
                    threads.append(threading.Thread(target=self._work, args=(jobs, outcomes, stop), daemon=True))
                    threads[-1].start()
                jobs.put((number, key, request))
                pending += 1
                if pending == self.settings.concurrency:
                    yield self._next(outcomes)
                    pending -= 1
            while pending:
                yield self._next(outcomes)
                pending -= 1
        finally:
            stop.set()
            for _ in threads:
                jobs.put(None)

    @property
    def recorded(self) -> int:
        """Number of replies in the transcripts."""
        return len(self._transcripts)

    def unanswered(self, requests: Iterable[Request]) -> list[Request]:
        """The requests whose replies are not in the transcripts."""
        model, body = self.settings.model, self.settings.extra_body
        return [each for each in requests if self._transcripts.find(content_key(model, each, body)) is None]

    def check_reachable(self) -> None:
        """Connects to the server once, unless a call has done so.

        Raises:
            EndpointError: There is no connection, or the server refuses the key.
        """
        if self._reached:
            return
        failure = None
        try:
            within(PROBE, self._client.with_options(timeout=self._openai.Timeout(PROBE, connect=CONNECT)).models.list())
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403):  # others may not list models, or are still loading one
                failure = self._status_failure(error)
        except self._openai.APIConnectionError as error:
            failure = connection_failure(error)
            failure = failure if failure.unreachable else None  # a busy server accepts connections
        except Exception:  # the list is not in the format of the API; only a completion matters
            pass
        if failure is not None:
            raise self._error(failure, fatal=True)
        self._reached = True

    def _next(self, outcomes: SimpleQueue[_Outcome]) -> tuple[int, Reply | EndpointError]:
        number, outcome = outcomes.get()
        if isinstance(outcome, EndpointError) and not outcome.fatal:
            self.usage.add(outcome)
            return number, outcome
        if isinstance(outcome, BaseException):
            raise outcome
        self.usage.add(outcome)
        return number, outcome

    def _work(self, jobs: SimpleQueue[_Job | None], outcomes: SimpleQueue[_Outcome], stop: threading.Event) -> None:
        """A thread's work, until it gets None."""
        while (job := jobs.get()) is not None and not stop.is_set():
            number, key, request = job
            outcome: Reply | BaseException
            try:
                outcome = self._ask(request, stop)
                # A reply without the log-probs that were asked for is not kept: the server may give them later.
                if isinstance(outcome, Reply) and not lacks_logprobs(request, outcome):
                    outcome = self._transcripts.add(key, self.settings.model, request, outcome)
            except BaseException as error:  # raised again where the outcomes are read
                outcome = error
            outcomes.put((number, outcome))

    def _ask(self, request: Request, stop: threading.Event) -> Reply | EndpointError:
        """The reply to a request, or the error after the last attempt."""
        failure = Failure("stopped")
        for attempt in range(self.settings.retries + 1):
            self._pace.wait(stop)
            if stop.is_set():
                break
            outcome = self._attempt(request)
            if isinstance(outcome, Reply):
                return outcome
            failure = outcome
            if failure.kind != "again":
                return self._error(failure, fatal=failure.kind == "fatal", permanent=failure.kind == "request")
            if attempt == self.settings.retries:
                break
            seconds = max(failure.wait or 0.0, backoff(attempt, self._pace.jitter()))
            self._pace.say(self._redact(f"{self.settings.url}: {failure.text}"), seconds)
            if failure.wait is not None:  # the other threads wait, too
                self._pace.pause(seconds)
            else:
                self._pace.clock.sleep(seconds, stop)
        return self._error(failure, fatal=failure.unreachable, attempts=self.settings.retries + 1)

    def _error(self, failure: Failure, *, fatal: bool, permanent: bool = False, attempts: int = 1) -> EndpointError:
        tries = f" ({attempts} attempts)" if attempts > 1 else ""
        resume = "; start the server, or set endpoint.url" if failure.unreachable else ""
        text = self._redact(f"{self.settings.url}: {failure.text}{tries}{resume}")
        return EndpointError(text, fatal=fatal, permanent=permanent)

    def _attempt(self, request: Request) -> Reply | Failure:
        """The reply, or why there is none.

        Nothing is raised, so that no exception of the client, which may know the key, becomes the context of ours.
        """
        fields = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "n": request.n if request.n > 1 else None,
            "logprobs": True if request.logprobs or request.top_logprobs else None,
            "top_logprobs": request.top_logprobs or None,
            **(self.settings.extra_body or {}),
        }
        messages: Any = request.messages
        try:
            create = self._client.chat.completions.with_raw_response.create(
                model=self.settings.model,
                messages=messages,
                extra_body={name: value for name, value in fields.items() if value is not None},
            )
            response = within(self.settings.timeout, create)
            body = response.http_response.text
        except self._openai.APIStatusError as error:
            return self._status_failure(error)
        except (self._openai.APIConnectionError, TimeoutError) as error:
            return connection_failure(error)
        except UnicodeEncodeError:
            return Failure("the messages contain characters that are not Unicode text", "request")
        return self._read(body, request.n)

    def _read(self, body: str, number: int) -> Reply | Failure:
        """The reply in the text of a response, without the key, should the server repeat it."""
        try:
            reply = read_reply(json.loads(body), number)
        except MalformedReply as error:
            return Failure(str(error))
        except UnusableReply as error:
            return Failure(str(error), "request")
        except (ValueError, OverflowError, RecursionError):
            return Failure("the response is not JSON")
        return replace(reply, choices=[replace(each, text=self._redact(each.text)) for each in reply.choices])

    def _status_failure(self, error: Any) -> Failure:
        body = error.body if error.body is not None else error.response.text
        return status_failure(error.status_code, error.response.headers, body, self.settings)
