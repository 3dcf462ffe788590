"""A limit on the time of a whole reply: those of the HTTP client start anew with each piece of data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any


def limit_time(response: Any) -> None:
    """Hook of the HTTP client: a body takes no longer than the request may wait for data.

    Reading it raises ``TimeoutError`` then.

    Args:
        response: The client's response, before its body is read.
    """
    body, seconds = response.stream, response.request.extensions["timeout"]["read"]
    until = time.monotonic() + seconds

    class Limited(type(body)):  # type: ignore[misc]  # the client checks the type
        def __init__(self) -> None:
            pass

        def __iter__(self) -> Iterator[bytes]:
            for data in body:
                if time.monotonic() > until:
                    raise TimeoutError
                yield data

        def close(self) -> None:
            body.close()

    response.stream = Limited()
