"""A limit on the time of a whole exchange with a server: those of an HTTP client start anew with each piece of data."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from functools import cache
from typing import Any

_starting = threading.Lock()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all clients, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def within(seconds: float, work: Awaitable[Any]) -> Any:
    """The result of work of an asynchronous client, which is waited for. Threads may share the client.

    Raises:
        TimeoutError: The work took longer, and was ended.
    """

    async def limited() -> Any:
        async with asyncio.timeout(seconds):
            return await work

    with _starting:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(limited(), loop).result()
