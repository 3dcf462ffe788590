"""Who may use the page: names, a password, and protection against other web sites."""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from halos_pl.data.example import DataError

#: Seconds after a wrong password, in which no other attempt is checked.
PAUSE = 1.0
#: Sessions kept; the oldest must enter their name again.
MOST = 10_000
LONGEST_NAME = 80
LEAST_PASSWORD = 8

#: The page loads nothing from elsewhere, and no other page can frame it.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def password_of(source: str) -> str:
    """The password in ``env:NAME`` or ``file:PATH``; errors never repeat it.

    Raises:
        DataError: the source is malformed or empty, or the password is too short.
        OSError: the file cannot be read.
    """
    kind, mark, place = source.partition(":")
    if not mark or kind not in ("env", "file") or not place:  # perhaps the password itself
        raise DataError(
            "--password must be env:NAME (an environment variable) or file:PATH, not the password itself, which other"
            " users of this machine could see"
        )
    if kind == "env":
        if not re.fullmatch(r"[A-Za-z_]\w*", place, re.ASCII):
            raise DataError("--password env: must be followed by the name of an environment variable")
        password = os.environ.get(place, "")
    else:
        try:
            password = Path(place).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"--password {source}: the file is not UTF-8 text") from error
    password = password.strip("\r\n")
    if len(password) < LEAST_PASSWORD:
        what = "is unset or empty" if not password else f"has fewer than {LEAST_PASSWORD} characters"
        raise DataError(f"--password {source}: the password {what}")
    return password


class Access:
    """The people who have entered.

    Args:
        password: the password; None lets everyone in.
        hosts: names of this machine that a request may use; None accepts all. Without this check, a web site could
            reach a local page by a name that it lets point to 127.0.0.1.
        cookie: name of the cookie; differs between ports, which browsers do not tell apart.
    """

    def __init__(self, password: str | None, hosts: frozenset[str] | None, cookie: str) -> None:
        self._password, self.hosts, self.cookie = password, hosts, cookie
        self._names: dict[str, str] = {}
        self._checking = asyncio.Lock()

    @property
    def has_password(self) -> bool:
        """Whether people must know a password."""
        return self._password is not None

    async def enter(self, name: str, password: str) -> str:
        """The new session of a person.

        Args:
            name: the name that the person gives.
            password: the password that the person gives.

        Raises:
            DataError: the password is wrong, or the name is empty or too long; a sentence for the person.
        """
        if self._password is not None:
            async with self._checking:  # one attempt a second, however many connections there are
                if not hmac.compare_digest(password.encode(), self._password.encode()):
                    await asyncio.sleep(PAUSE)
                    raise DataError("This password is wrong.")
        name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
        if not name:
            raise DataError("Please enter a name.")
        if len(name) > LONGEST_NAME:
            raise DataError(f"Please enter a name of at most {LONGEST_NAME} characters.")
        session = secrets.token_urlsafe(24)
        self._names[session] = name
        while len(self._names) > MOST:
            self._names.pop(next(iter(self._names)))
        return session

    def leave(self, session: str) -> None:
        """Ends a session."""
        self._names.pop(session, None)

    def name(self, session: str | None) -> str | None:
        """The name of the person; None for an unknown session."""
        return self._names.get(session) if session else None

    def expects(self, host: str) -> bool:
        """Whether a request may have this ``Host`` header."""
        try:
            return self.hosts is None or urlsplit(f"//{host}").hostname in self.hosts
        except ValueError:
            return False


class Shield:
    """Refuses requests with an unexpected host, and adds :data:`HEADERS` to every response (ASGI middleware).

    Args:
        app: the application.
        access: decides on hosts.
    """

    def __init__(self, app: Any, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        if not self._access.expects(host):
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": b"This page must be opened by the name localhost."})
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await self._app(scope, receive, with_headers)
