"""A command whose output is no longer read, as in ``halos objectives | head``, ends without a message."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from halos_pl.common.messages import chain

#: 128 + SIGPIPE: the exit status that a shell reports for Unix tools.
STATUS = 141
# Copies of stdout and stderr, by file descriptor: a library may redirect these when a pipe breaks.
_copies: dict[int, int] = {}


@contextmanager
def ending_quietly() -> Iterator[None]:
    """Inside this context, a command ends without a message once stdout or stderr has no reader.

    Raises:
        SystemExit: with ``STATUS``.
    """
    for fd in (1, 2):
        with suppress(OSError):  # closed
            _copies[fd] = os.dup(fd)
    try:
        try:
            yield
        finally:
            _flush()
    except BaseException as error:
        if not is_unread(error):
            raise
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in filter(_unread, [*_copies]):  # Python flushes both again when it exits
            os.dup2(null, fd)
        os.close(null)
        raise SystemExit(STATUS) from None
    finally:
        while _copies:
            os.close(_copies.popitem()[1])


def is_unread(error: BaseException) -> bool:
    """Whether an error means that stdout or stderr has no reader; a broken pipe elsewhere, as to a server, does not."""
    return any(isinstance(each, BrokenPipeError) for each in chain(error)) and any(map(_unread, _copies))


def _unread(fd: int) -> bool:
    if not hasattr(select, "poll"):  # on Windows
        return False
    poll = select.poll()
    poll.register(_copies[fd], 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None if closed
                stream.flush()
        except BrokenPipeError:
            raise
        except (OSError, ValueError):  # such as a full disk, which Python reports when it exits
            pass
