"""Settings of an endpoint, without its key."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

#: Fields of a request that limit the tokens of a completion.
LIMITS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class EndpointSettings:
    """A server with OpenAI's chat completions API, and how to use it.

    Args:
        url: Base URL of the API, such as http://localhost:8000/v1.
        model: Name of the model at the server.
        api_key_env: Name of the environment variable with the API key; only the default one may be unset, as a local
            server needs none. The key is written nowhere.
        concurrency: Maximum number of requests at a time.
        timeout: Seconds from a request to the end of its reply.
        retries: Maximum number of times to repeat a request that failed for a passing reason.
        price_in: Price of a million prompt tokens in USD.
        price_out: Price of a million completion tokens in USD.
        extra_body: Further fields of each request, such as {top_k: 20}; null removes a field.

    Raises:
        ValueError: A setting is invalid; names it.
    """

    url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    price_in: float | None = None
    price_out: float | None = None
    extra_body: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            fits = False
        if not fits:
            raise ValueError("endpoint.url must be the base URL of a server, such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "endpoint.url must have no user, password, query or fragment; put a key into the environment variable"
                " that endpoint.api_key_env names"
            )
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env, re.ASCII):  # may be the key, so it is not repeated
            raise ValueError("endpoint.api_key_env must be the name of an environment variable, not the key itself")
        for name in ("concurrency", "retries"):
            least = int(name == "concurrency")
            if getattr(self, name) < least:
                raise ValueError(f"endpoint.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"endpoint.timeout is {self.timeout}; it must be a positive number of seconds")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("endpoint.price_in and endpoint.price_out: set both or neither")
        for name in ("price_in", "price_out"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise ValueError(f"endpoint.{name} is {getattr(self, name)}; it must be a price in USD")
        if {"model", "messages", "stream", "n"} & {*(self.extra_body or {})}:
            raise ValueError("endpoint.extra_body must not set model, messages, stream or n")
        for name in LIMITS:
            value = (self.extra_body or {}).get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"endpoint.extra_body: {name} is {value!r:.40}; it must be a number of at least 1")

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, so that no proxy is needed."""
        return urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")

    def most_tokens(self, max_tokens: int) -> int | None:
        """The limit on the tokens of a completion, given that of a request; None if ``extra_body`` removes it."""
        fields = {"max_tokens": max_tokens, **(self.extra_body or {})}
        return max((fields[name] for name in LIMITS if fields.get(name) is not None), default=None)

    def api_key(self) -> str | None:
        """The key; None if the default environment variable is unset or empty.

        Raises:
            ValueError: Another variable is unset or empty, or the key cannot be sent; does not repeat it.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.api_key_env != type(self).api_key_env:  # may be the key, so it is not repeated
            raise ValueError(
                "the environment variable that endpoint.api_key_env names is not set, or empty; set it to the key, or"
                " omit endpoint.api_key_env if the server needs none"
            )
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError(f"the key in ${self.api_key_env} contains spaces or characters that are not ASCII")
        return key or None
