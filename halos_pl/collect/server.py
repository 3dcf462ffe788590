"""The address of the page, and the server behind it."""

from __future__ import annotations

import errno
import ipaddress
import socket
from pathlib import Path

from halos_pl.collect.access import Access
from halos_pl.collect.conversations import Conversations
from halos_pl.collect.gallery import Gallery
from halos_pl.data.example import DataError


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address. It refuses connections until the server listens.

    Raises:
        DataError: the address does not exist, or is in use.
    """
    if not 0 <= port < 65536:
        raise DataError(f"--port is {port}; it must be from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise DataError(f"--host {host} is no address of this machine ({error.strerror})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise DataError(f"--host {host} is no address of this machine") from error
        raise DataError(
            f"--port {port} of {host}: {(error.strerror or str(error)).lower()}; choose another port, or 0 for a free"
            " one"
        ) from error
    return listener


def address_of(listener: socket.socket) -> tuple[str, bool]:
    """The URL of a socket, and whether only this machine can reach it."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}", ipaddress.ip_address(host.partition("%")[0]).is_loopback


def access_to(listener: socket.socket, host: str, password: str | None) -> Access:
    """Who may use the page at a socket.

    Raises:
        DataError: other machines can reach it, and there is no password.
    """
    address, port = listener.getsockname()[:2]
    if password is not None:
        hosts = None  # only a person with the password has a session, under any name of this machine
    elif address_of(listener)[1]:
        hosts = frozenset(("localhost", "127.0.0.1", "::1", str(address)))
    else:
        raise DataError(
            f"--host {host} can be reached from other machines; set --password env:NAME or file:PATH, or use an SSH"
            " tunnel to 127.0.0.1"
        )
    return Access(password, hosts, f"halos_{port}")


def serve(
    listener: socket.socket,
    access: Access,
    path: Path,
    title: str,
    greeting: str,
    conversations: Conversations | None = None,
) -> None:
    """Serves the page until a signal ends it.

    Args:
        listener: socket with its address.
        access: who may use the page.
        path: file with the rows.
        title: name of the model, or of the file in a gallery.
        greeting: what the page is for; printed with its address.
        conversations: conversations with a model; None for a gallery.
    """
    from uvicorn import Config, Server

    from halos_pl.collect.app import Site, make_app

    # No log of requests; streams that are open when the server stops are cut.
    config = Config(
        make_app(Site(access, conversations, Gallery(path), title)),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        lifespan="off",
    )
    listener.listen(128)  # from here on a browser waits, instead of being refused
    print(f"halos: {greeting} on {address_of(listener)[0]}; Ctrl-C ends", flush=True)
    Server(config).run(sockets=[listener])
