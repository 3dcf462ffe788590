"""Requests to an endpoint, its replies, and errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A request for completions of a conversation.

    Args:
        messages: Messages with ``role`` and ``content``.
        max_tokens: Maximum number of tokens of a completion.
        temperature: Temperature of the softmax; 0 takes the most likely token.
        top_p: Total probability of the most likely tokens to sample from.
        seed: Seed of the sampling; None leaves it to the server.
        n: Number of completions.
        logprobs: Whether to ask for the log-prob of each sampled token.
        top_logprobs: Number of most likely tokens whose log-probs to ask for, at each place of the completion.
        repeat: Number that tells requests of the same content apart, so that each gets a reply of its own. It is not
            sent to the server.
    """

    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    repeat: int = 0


#: How far above 0 servers may round log-probs, and the least log-prob: the least number in float32.
ROUNDING, LEAST = 1e-2, -3.4028235e38
#: Above any number of tokens of a request.
MOST_TOKENS = 2**31


@dataclass(frozen=True)
class Choice:
    """One completion.

    Attributes:
        text: Its text; empty if the model wrote none. Halves of characters (lone surrogates), which no file could
            hold, are replaced.
        finished: Whether the model ended it, rather than the limit on its length or a filter.
        logprobs: Log-prob of each sampled token, in nats; None if the server gives none.
        top_logprobs: Log-prob of each of the most likely tokens at each place, in nats; None if the server gives none.

    Raises:
        MalformedReply: A log-prob is no number, or above 0.
    """

    text: str
    finished: bool
    logprobs: list[float] | None = None
    top_logprobs: list[dict[str, float]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        for value in (*(self.logprobs or ()), *(v for place in self.top_logprobs or () for v in place.values())):
            if not value <= ROUNDING:  # NaN, too
                raise MalformedReply(f"the logprob of a token is {value:g}; it must be at most 0")


@dataclass(frozen=True)
class Reply:
    """The completions of a request.

    Attributes:
        choices: The completions, as many as requested.
        prompt_tokens, completion_tokens: Numbers of tokens that the server counted; None if it gives none that is
            possible.
        reused: Whether the reply comes from the transcripts.
    """

    choices: list[Choice]
    prompt_tokens: int | None
    completion_tokens: int | None
    reused: bool = False


def lacks_logprobs(request: Request, reply: Reply) -> bool:
    """Whether a completion comes without the log-probs that were asked for, as from servers that give none.

    One most likely token instead of several is none: it does not tell how likely the others are.
    """

    def lacking(choice: Choice) -> bool:
        fewest = min(map(len, choice.top_logprobs or ()), default=0)
        return (request.logprobs and choice.logprobs is None) or fewest < min(request.top_logprobs, 2)

    return any(choice.text and lacking(choice) for choice in reply.choices)


class EndpointError(OSError):
    """A request without a usable reply, or an endpoint that cannot be used.

    Args:
        text: One line on the fault and its remedy; never contains the API key.
        fatal: Whether every further request would fail, too.
        permanent: Whether the same request would fail again.
    """

    def __init__(self, text: str, *, fatal: bool = False, permanent: bool = False) -> None:
        super().__init__(text)
        self.fatal, self.permanent = fatal, permanent

    def at(self, place: str) -> EndpointError:
        """The same error, which names the place of the request."""
        return EndpointError(f"{place}: {self}", fatal=self.fatal, permanent=self.permanent)


def sent_again(errors: Sequence[EndpointError]) -> str:
    """What repeating the command does for requests that failed."""
    number = sum(error.permanent for error in errors)
    if number == len(errors):
        return "the same command would fail on them again"
    hopeless = f", though {number} would fail again" if number else ""
    return f"the same command sends only these again{hopeless}"


class MalformedReply(ValueError):
    """A reply that breaks the API's format; the next attempt may do better."""


class UnusableReply(ValueError):
    """A reply that cannot be used; the next attempt would give the same."""


#: ``finish_reason`` of completions that the model ended, in the words of several servers.
_FINISHED = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")
#: That of completions that it did not end, and of those that the server broke off.
_UNFINISHED = ("length", "max_tokens", "model_length", "content_filter")
_ABORTED = ("abort", "error", "insufficient_system_resource", None)


def read_reply(body: Any, number: int) -> Reply:
    """The reply in a decoded response.

    Args:
        body: Decoded JSON.
        number: Number of choices that was requested.

    Raises:
        MalformedReply: The response breaks the API's format.
        UnusableReply: It has another number of choices, but at least one, or one that is no text.
    """
    if not isinstance(body, Mapping):
        raise MalformedReply("the response is not a JSON object")
    if error := body.get("error"):
        raise MalformedReply(f"the response is an error: {error_text(error)}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise MalformedReply("the response has no choices")
    if len(choices) != number:
        hint = "; the server may ignore n: send one request per completion" if number > 1 else ""
        raise UnusableReply(f"the response has {len(choices)} choices instead of {number}{hint}")
    usage = body.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    return Reply(
        [_choice(each) for each in _in_order(choices)],
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
    )


def error_text(error: Any) -> str:
    """The message of an error in a response, in one line."""
    text = error.get("message", error) if isinstance(error, Mapping) else error
    line = " ".join(str(text).split())
    return f"{line[:297]}..." if len(line) > 300 else line


def _in_order(choices: list[Any]) -> list[Any]:
    places = [each.get("index") if isinstance(each, Mapping) else None for each in choices]
    if sorted(places, key=repr) != sorted(range(len(choices)), key=repr):
        return choices
    return [choices[places.index(i)] for i in range(len(choices))]


#: Fields of a message in which servers put the reasoning that precedes its content.
_REASONING = ("reasoning_content", "reasoning")


def _choice(choice: Any) -> Choice:
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        raise MalformedReply("a choice has no message")
    text, reason = message.get("content"), choice.get("finish_reason")
    if not isinstance(text, str | None):
        raise MalformedReply("the content of a message is not text")
    if reason in _ABORTED:
        raise MalformedReply(f"the server broke the completion off (finish_reason: {reason})")
    if message.get("tool_calls") or reason in ("tool_calls", "function_call"):
        raise UnusableReply("the model called a tool, which is no completion; start the server without tools")
    if text is None and (refusal := message.get("refusal")):
        raise UnusableReply(f"the model refused to answer: {error_text(refusal)}")
    if reason not in _FINISHED + _UNFINISHED:
        raise UnusableReply(f"finish_reason {reason!r:.40} does not tell whether the model ended the completion")
    reasons = any(message.get(name) for name in _REASONING)
    if reasons and not (text or "").strip() and reason in _FINISHED:
        raise UnusableReply(
            "the reply has reasoning but no content; if the model does not reason, start the server without a reasoning"
            " parser"
        )
    field = choice.get("logprobs")
    content = field.get("content") if isinstance(field, Mapping) else None
    if not isinstance(content, list) or not content or reasons:  # log-probs include those of the reasoning
        return Choice(text or "", reason in _FINISHED)
    return Choice(text or "", reason in _FINISHED, _logprobs(content), _top_logprobs(content))


def _logprobs(content: list[Any]) -> list[float]:
    values: list[Any] = [each.get("logprob") if isinstance(each, Mapping) else None for each in content]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and LEAST <= v < math.inf for v in values):
        raise MalformedReply(f"a token has no log-prob from {LEAST:.1e} to 0")
    return [float(value) for value in values]


def _top_logprobs(content: list[Any]) -> list[dict[str, float]] | None:
    """The most likely tokens at each place and their log-probs; None unless the server gives some everywhere."""
    places: list[Any] = [each.get("top_logprobs") if isinstance(each, Mapping) else None for each in content]
    if not places or not all(places):
        return None
    try:
        return [{each["token"]: float(each["logprob"]) for each in place} for place in places]
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedReply("the most likely tokens of a place have no token or no logprob") from error


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_TOKENS else None
