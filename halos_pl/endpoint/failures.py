"""Failed attempts: their text without secrets, and whether another attempt may succeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from halos_pl.endpoint.exchange import error_text
from halos_pl.endpoint.pace import LONGEST_PAUSE, retry_after
from halos_pl.endpoint.settings import EndpointSettings

#: Shorter keys, such as EMPTY for a local server, are no secrets; removing them would damage other text.
LEAST_SECRET = 8


def redactor(key: str | None) -> Callable[[str], str]:
    """A function that removes the key from a text, also as JSON spells it."""
    spellings = {key, json.dumps(key)[1:-1]} if key and len(key) >= LEAST_SECRET else set()

    def redact(text: str) -> str:
        for spelling in spellings:
            text = text.replace(spelling, "[API key]")
        return text

    return redact


@dataclass(frozen=True)
class Failure:
    """A failed attempt.

    Attributes:
        text: The reason, in one line.
        kind: ``again`` if another attempt may succeed, ``request`` if this request always fails, ``fatal`` if all do.
        wait: Seconds that the server asks to wait.
        unreachable: Whether no connection could be made.
    """

    text: str
    kind: Literal["again", "request", "fatal"] = "again"
    wait: float | None = None
    unreachable: bool = False


def status_failure(status: int, headers: Any, body: Any, settings: EndpointSettings) -> Failure:
    """The failure behind an HTTP status other than success.

    Args:
        status: HTTP status.
        headers: Headers of the response.
        body: Its decoded body, or text.
        settings: Settings of the endpoint.
    """
    inner = body.get("error", body) if isinstance(body, dict) else body
    reason = f"status {status}: {error_text(inner)}" if inner else f"status {status}"
    codes = {str(inner.get(name)) for name in ("code", "type")} if isinstance(inner, dict) else set()
    if status in (401, 403):
        key = f"the key in ${settings.api_key_env}" if settings.api_key() else "the request without a key"
        return Failure(f"the server refuses {key} (endpoint.api_key_env); {reason}", "fatal")
    if status == 404:
        return Failure(
            f"no model {settings.model!r}, or no API at this URL (usually it ends in /v1); {reason}", "fatal"
        )
    if "insufficient_quota" in codes or status == 402:
        return Failure(f"the account has no credit left; {reason}", "fatal")
    if status in (408, 409, 425, 429) or (status >= 500 and status != 501):
        wait = retry_after(headers)
        if wait is not None and wait > LONGEST_PAUSE:
            return Failure(f"the server asks to wait {wait:.0f} s; run the command again later; {reason}", "fatal")
        return Failure(reason, wait=wait)
    if 300 <= status < 400 and (place := " ".join(str(headers.get("location") or "").split())):
        text = f"status {status}: the server redirects to {place:.300}; set endpoint.url to the API there"
        return Failure(text, "fatal")
    if status < 400 or status in (405, 410, 501):
        return Failure(f"the server does not offer chat completions; {reason}", "fatal")
    return Failure(reason, "request")


def connection_failure(error: BaseException) -> Failure:
    """The failure behind an exception of the connection, from its class and those of its causes."""
    names = [type(error).__name__]
    cause = error.__cause__ or error.__context__
    while cause is not None and len(names) < 10:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    unreachable = bool({"ConnectError", "ConnectTimeout", "ConnectionRefusedError"} & {*names})
    if unreachable:
        return Failure("no connection to the server", unreachable=True)
    if {"APITimeoutError", "TimeoutError"} & {*names}:
        return Failure("no answer within the timeout (endpoint.timeout)")
    return Failure("the connection broke off before the end of the response")
