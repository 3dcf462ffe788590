"""Connections between the ranks of a run, over which each learns within a second that another has failed or died.

Rank 0 listens, and each other rank keeps one connection to it. A rank that fails sends a line, which rank 0 passes on.
The kernel closes the connection of a process that dies in any way, also while all its threads are blocked; a machine
that is lost stops answering keep-alive probes within half a minute. The torch.distributed store of the launch is used
only to tell the ranks where rank 0 listens: its client cannot tell that another one is gone.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore

#: Seconds after which a machine that no longer answers counts as lost: idle time, then three probes.
IDLE, PROBE, PROBES = 15, 5, 3
#: Seconds of attempts to connect to rank 0, once it listens, after which a rank reports that it cannot.
UNREACHED = 10.0
_DIED = "died without a message (killed, out of memory, or its machine is lost)"


@dataclass(frozen=True)
class Place:
    """One rank's place in a run.

    Attributes:
        rank: Number of the rank in the run.
        local_rank: Number of the rank on its node.
        node: Number of the node.
        world_size: Number of ranks.
        address: Address of the launch's store, as in ``MASTER_ADDR``.
        port: Port of the store.
        agent: Whether the launcher hosts the store; otherwise rank 0 does.
    """

    rank: int
    local_rank: int
    node: int
    world_size: int
    address: str
    port: int
    agent: bool = False


@dataclass(frozen=True)
class Failure:
    """The first failure of a run.

    Attributes:
        rank: Rank that failed.
        local_rank: Number of that rank on its node.
        node: Number of its node.
        host: Name of its machine.
        text: One line on the failure.
        printed: Whether that rank prints the line itself.
        status: Exit status of all ranks.
    """

    rank: int
    local_rank: int
    node: int
    host: str
    text: str
    printed: bool
    status: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.text}"


_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A data loader's forked process must not keep its parent's connections open."""
    for each in list(_sockets):
        with suppress(OSError):
            each.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _kept(connection: socket.socket) -> socket.socket:
    """The connection, with a limit on each operation and probes that notice a lost machine."""
    connection.settimeout(5)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", PROBE), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _sockets.add(connection)
    return connection


def _store(place: Place, serve: bool) -> Any:
    """A client of the launch's store; with ``serve``, this process also hosts it, as init_process_group will."""
    store = TCPStore(
        place.address,
        place.port,
        is_master=serve,
        wait_for_workers=False,
        timeout=timedelta(seconds=10),
        multi_tenant=True,
    )
    return PrefixStore(f"halos/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _send(connection: socket.socket, message: dict[str, Any]) -> bool:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return False
    return True


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int = -1
    local_rank: int = 0
    node: int = 0
    host: str = ""
    pending: bytes = b""
    joined: bool = False
    done: bool = False

    def death(self) -> Failure:
        """The failure of a rank whose connection has ended without a word."""
        return Failure(self.rank, self.local_rank, self.node, self.host, _DIED, printed=False)

    def lines(self, received: bytes) -> list[dict[str, Any]]:
        """The messages that are complete."""
        *whole, self.pending = (self.pending + received).split(b"\n")
        messages = []
        for line in whole:
            with suppress(ValueError):  # from another program
                messages.append(json.loads(line))
        return [each for each in messages if isinstance(each, dict)]


@dataclass
class Links:
    """What both ends share.

    Attributes:
        place: This rank's place.
        failure: The first failure of the run, once this rank has heard of it.
        fault: A clause on why this rank is not connected, once it has tried for some time; otherwise empty.
    """

    place: Place
    failure: Failure | None = None
    fault: str = ""
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def _heard(self, failure: Failure) -> Failure:
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()
            return self.failure

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """The first failure of the run; None if none is known within ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, seconds)
        return self.failure


class Hub(Links):
    """Rank 0's end: listens, and passes on the first failure to all."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=dual)
        _sockets.add(self._listener)
        self._token = secrets.token_hex(8)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, _Peer] = {}
        self._over: set[int] = set()  # ranks that know the failure or have ended
        self._store: Any = None

    def _publish(self) -> None:
        """Tells the other ranks where to connect."""
        place, hosts = self.place, [socket.gethostname(), self.place.address]
        if place.agent:
            with suppress(OSError), socket.create_connection((place.address, place.port), 5) as probe:
                hosts.insert(0, probe.getsockname()[0])
        self._store = _store(place, serve=not place.agent)
        where = {"hosts": hosts, "port": self._listener.getsockname()[1], "token": self._token}
        self._store.set("watch", json.dumps(where))

    def poll(self, seconds: float) -> None:
        """Handles messages for up to ``seconds``."""
        if self._store is None:
            self._publish()
        for key, _ in self._selector.select(seconds):
            connection: Any = key.fileobj
            if connection is self._listener:
                with suppress(OSError):
                    new = _kept(self._listener.accept()[0])
                    self._peers[new] = _Peer()
                    self._selector.register(new, selectors.EVENT_READ)
            else:
                self._read(connection, self._peers[connection])

    def _read(self, connection: socket.socket, peer: _Peer) -> None:
        try:
            received = connection.recv(1 << 16)
        except TimeoutError:
            return
        except OSError:
            received = b""
        for message in peer.lines(received):
            if peer.rank < 0:
                if message.get("token") != self._token:
                    received = b""
                    break
                peer.rank, peer.local_rank = message["rank"], message["local_rank"]
                peer.node, peer.host = message["node"], message["host"]
                _send(connection, {"welcome": socket.gethostname()})
                if self.failure is not None:
                    self._pass_on(connection, peer, self.failure)
            elif "failure" in message:
                self.tell(Failure(**message["failure"]))
            peer.joined |= "joined" in message
            peer.done |= "done" in message
        if not received:
            self._selector.unregister(connection)
            connection.close()
            with self._changed:
                del self._peers[connection]
                if peer.joined:
                    self._over.add(peer.rank)
                    self._changed.notify_all()
            if peer.joined and not peer.done:
                self.tell(peer.death())

    def _pass_on(self, connection: socket.socket, peer: _Peer, failure: Failure) -> None:
        _send(connection, {"failure": asdict(failure)})
        with self._changed:
            self._over.add(peer.rank)
            self._changed.notify_all()

    def tell(self, failure: Failure) -> None:
        """Makes a failure known to all ranks, unless there was one before."""
        if self.failure is None:
            first = self._heard(failure)
            with self._changed:
                peers = [(connection, peer) for connection, peer in self._peers.items() if peer.rank >= 0]
            for connection, peer in peers:
                self._pass_on(connection, peer, first)

    def wait_told(self, seconds: float) -> None:
        """Waits until all other ranks know the failure, or have ended."""
        everyone = set(range(1, self.place.world_size))
        with self._changed:
            self._changed.wait_for(lambda: everyone <= self._over, seconds)

    def close(self) -> None:
        """Ends the connections in an orderly way."""
        for connection in list(self._peers):
            _send(connection, {"done": True})
            connection.close()
        self._listener.close()
        self._selector.close()
        self._store = None


class Spoke(Links):
    """Another rank's end: connects to rank 0 as soon as it listens."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._connection: socket.socket | None = None
        self._hub = _Peer(rank=0, host=place.address)
        self._unsent: Failure | None = None
        self._tried_since = 0.0

    def _connect(self) -> None:
        """Connects if rank 0 listens by now."""
        place = self.place
        with socket.create_connection((place.address, place.port), 1):
            pass  # the store answers, so that its client does not log a warning
        store = _store(place, serve=False)
        if not store.check(["watch"]):
            return
        where = json.loads(store.get("watch"))
        hello = {"token": where["token"], "rank": place.rank, "local_rank": place.local_rank, "node": place.node}
        reasons = []
        for host in where["hosts"]:
            try:
                connection = _kept(socket.create_connection((host, where["port"]), 2))
                _send(connection, {**hello, "host": socket.gethostname()})
                if received := connection.recv(1 << 16):  # only the right program answers
                    with self._changed:
                        self._connection = connection
                        _send(connection, {"joined": True})
                        if self._unsent is not None:
                            _send(connection, {"failure": asdict(self._unsent)})
                    self._handle(received)
                    return
                connection.close()
            except OSError as error:
                reasons.append(f"{host}: {error.strerror or error}")
        now = time.monotonic()
        self._tried_since = self._tried_since or now
        if now - self._tried_since >= UNREACHED:
            self.fault = (
                f"cannot connect to port {where['port']} of rank 0 ({', '.join(reasons) or 'no answer'}), so if another"
                " rank fails, this one may wait until the timeout of torch.distributed, and vice versa; let the"
                " firewall allow connections between the nodes on all ports"
            )

    def poll(self, seconds: float) -> None:
        """Handles messages for up to ``seconds``."""
        connection = self._connection
        if connection is None:
            with suppress(OSError, DistError):
                self._connect()
            if self._connection is None:
                time.sleep(seconds)
            return
        connection.settimeout(seconds)
        try:
            received = connection.recv(1 << 16)
        except TimeoutError:
            return
        except OSError:
            received = b""
        self._handle(received)
        if not received:
            if not self._hub.done:
                self._heard(self._unsent or self._hub.death())
            time.sleep(seconds)

    def _handle(self, received: bytes) -> None:
        for message in self._hub.lines(received):
            if "failure" in message:
                self._heard(Failure(**message["failure"]))
            self._hub.host = message.get("welcome", self._hub.host)
            self._hub.done |= "done" in message

    def tell(self, failure: Failure) -> None:
        """Makes a failure known to all ranks, unless there was one before."""
        with self._changed:
            if self._unsent is None:
                self._unsent = failure
                if self._connection is not None:
                    _send(self._connection, {"failure": asdict(failure)})

    def wait_told(self, seconds: float) -> None:
        """Waits until rank 0 has passed on the failure."""
        if self.wait_for_failure(seconds) is None and self._unsent is not None:
            self._heard(self._unsent)

    def close(self) -> None:
        """Ends the connection in an orderly way."""
        if self._connection is not None:
            _send(self._connection, {"done": True})
            self._connection.close()


def links(place: Place) -> Hub | Spoke:
    """This rank's end."""
    return Spoke(place) if place.rank else Hub(place)
