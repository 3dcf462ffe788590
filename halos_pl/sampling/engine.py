"""The interface of a sampling engine."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import PromptRow
from halos_pl.endpoint.exchange import EndpointError
from halos_pl.policy.sampling import check_sampling


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Args:
        n: Number of completions per prompt.
        max_new_tokens: Maximum number of tokens per completion.
        temperature: Temperature of the softmax; 0 takes the most likely token.
        top_p: Total probability of the most likely tokens to sample from.
        seed: Seed from which the seeds of all completions are derived.
    """

    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def check(self, batch_size: int | None = None) -> None:
        """Refuses values that are outside their ranges, or with which all completions of a prompt are equal.

        Raises:
            DataError: Names the setting.
        """
        check_sampling(batch_size=batch_size, **vars(self))
        if self.n > 1 and self.temperature == 0:
            raise DataError(f"n is {self.n} with temperature 0, which gives equal completions; raise it, or set n to 1")

    def seeds(self, row: PromptRow) -> list[int]:
        """The seed of each completion of a prompt, below 2^31; a function of ``seed``, the prompt's line and its index.

        So a resumed command draws the same completions as an uninterrupted one.
        """
        texts = [f"{self.seed} {row.number} {k}" for k in range(self.n)]
        return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1 for text in texts]


@dataclass(frozen=True)
class Sampled:
    """One completion.

    Attributes:
        text: Its text, without the token that ended it.
        finished: Whether the model ended it.
        seed: Its seed; None if a server draws it.
        tokens: Number of its tokens; None if unknown.
        logprobs: Log-prob of each token in nats, at temperature 1; None if the engine gives none.
        same_tokens: Whether training on the text gives the sampled tokens; None if unknown.
    """

    text: str
    finished: bool
    seed: int | None
    tokens: int | None
    logprobs: list[float] | None
    same_tokens: bool | None


class Engine(Protocol):
    """Draws the completions of a file's prompts."""

    def load(self) -> dict[str, Any]:
        """Loads the model or connects to it, and returns its identity.

        A file is not resumed with a model of another identity.

        Raises:
            ValueError: The model cannot be loaded, or a prompt does not fit it.
            EndpointError: The server cannot be used.
        """

    def sample(self, done: Collection[int]) -> Iterator[tuple[int, list[Sampled] | EndpointError]]:
        """Draws completions.

        Args:
            done: Indices of the prompts that need none.

        Yields:
            The index of a prompt and its completions or why it has none, in the order in which they finish.
        """

    def summary(self) -> str:
        """A line for the log, at the end; empty if there is nothing to report."""
