"""Numbers and price of tokens, estimated before a command and counted during it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from halos_pl.common.messages import counted
from halos_pl.endpoint.exchange import EndpointError, Reply, Request
from halos_pl.endpoint.settings import EndpointSettings

#: Characters per token that the estimate assumes; a tokenizer's figure for English is about 4.
CHARACTERS = 4


@dataclass
class Usage:
    """Counts of requests and tokens.

    Attributes:
        replies: Number of replies from the server.
        reused: Number of replies from the transcripts.
        failed: Number of requests without a usable reply.
        prompt_tokens, completion_tokens: Numbers of tokens in the server's replies.
        uncounted: Number of replies for which the server gives no count.
    """

    replies: int = 0
    reused: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def add(self, outcome: Reply | EndpointError) -> None:
        """Counts the outcome of a request."""
        if isinstance(outcome, EndpointError):
            self.failed += 1
        elif outcome.reused:
            self.reused += 1
        else:
            self.replies += 1
            self.prompt_tokens += outcome.prompt_tokens or 0
            self.completion_tokens += outcome.completion_tokens or 0
            self.uncounted += outcome.prompt_tokens is None or outcome.completion_tokens is None

    def line(self, settings: EndpointSettings) -> str:
        """A line for the log."""
        parts = [counted(self.replies, "new reply").replace("replys", "replies")]
        parts += [f"{self.reused} reused"] * bool(self.reused) + [f"{self.failed} failed"] * bool(self.failed)
        parts.append(f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens")
        if self.uncounted:
            parts.append(f"without those of {self.uncounted} replies, which the server did not count")
        return f"{settings.model}: {', '.join(parts)}{_price(settings, self.prompt_tokens, self.completion_tokens)}"


def estimate(requests: Iterable[Request], settings: EndpointSettings) -> str:
    """A line on the number of requests, about how many tokens they have, and the most that they can cost."""
    number = prompt = completion = 0
    limited = True
    for request in requests:
        number += 1
        prompt += sum(len(str(message.get("content") or "")) for message in request.messages) // CHARACTERS
        most = settings.most_tokens(request.max_tokens)
        limited = limited and most is not None
        completion += request.n * (most or 0)
    most_text = f"at most {completion:,} completion tokens" if limited else "completion tokens without a limit"
    price = _price(settings, prompt, completion).replace(", ", f", at {'most' if limited else 'least'} about ")
    return f"{settings.model}: {counted(number, 'request')}, about {prompt:,} prompt tokens and {most_text}{price}"


def _price(settings: EndpointSettings, prompt: int, completion: int) -> str:
    if settings.price_in is None or settings.price_out is None:
        return ""
    return f", {(prompt * settings.price_in + completion * settings.price_out) / 1e6:.4g} USD"
