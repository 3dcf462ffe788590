"""Each rank hears at once of another's failure or death, and an orderly end is none."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from run_halos import free_port

from halos_pl.cli.errors import UsageError, described
from halos_pl.training import rank_failure, rank_links
from halos_pl.training.rank_failure import PeerFailed, RankWatch
from halos_pl.training.rank_links import Failure, Hub, Place, Spoke, links


def failure(rank: int, text: str) -> Failure:
    return Failure(rank, rank, 0, socket.gethostname(), text, printed=True)


class Run:
    """The ranks of a run, each with a thread that polls."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        self.places = [Place(rank, rank, 0, world_size, "127.0.0.1", port) for rank in range(world_size)]
        self.ends: list[Hub | Spoke] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.ends.append(end := links(self.places[rank]))
            self._threads.append(threading.Thread(target=self._poll, args=(end,), daemon=True))
            self._threads[-1].start()

    def _poll(self, end: Hub | Spoke) -> None:
        while not self._over.is_set():
            try:
                end.poll(0.02)
            except (OSError, ValueError, KeyError):  # closed by the test
                return

    def connected(self) -> None:
        spokes = [end for end in self.ends if isinstance(end, Spoke)]
        hub = next(end for end in self.ends if isinstance(end, Hub))
        wait = threading.Event()
        for _ in range(500):
            if sum(peer.joined for peer in hub._peers.values()) == len(spokes):
                return
            wait.wait(0.02)
        raise AssertionError("not connected")

    def heard(self, seconds: float = 10) -> list[str | None]:
        return [str(f.text) if (f := end.wait_for_failure(seconds)) else None for end in self.ends]

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def run_of(world_size: int) -> Iterator[Run]:
    run = Run(world_size)
    try:
        yield run
    finally:
        run.end()


@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_hear_the_first_failure(rank):
    with run_of(3) as run:
        run.start(0, 1, 2)
        run.connected()
        run.ends[rank].tell(failure(rank, "no such file"))
        assert run.heard() == ["no such file"] * 3
        run.ends[1].tell(failure(1, "a consequence"))
        assert run.heard() == ["no such file"] * 3
        assert run.ends[0].failure == failure(rank, "no such file")


def test_a_failure_before_rank_0_listens_is_not_lost():
    with run_of(2) as run:
        run.start(1)
        run.ends[0].tell(failure(1, "too early"))
        run.start(0)
        assert run.heard() == ["too early"] * 2


def test_a_rank_that_connects_after_the_failure_hears_of_it():
    with run_of(2) as run:
        run.start(0)
        run.ends[0].tell(failure(0, "early"))
        told = threading.Thread(target=run.ends[0].wait_told, args=(10,))
        told.start()
        run.start(1)
        assert run.heard() == ["early"] * 2
        told.join(5)
        assert not told.is_alive()


def drop(end: Hub | Spoke) -> None:
    """As the kernel does when a process dies."""
    connections = [end._connection] if isinstance(end, Spoke) else list(end._peers)
    if isinstance(end, Hub):
        end._selector.close()  # ends its thread
    for connection in connections:
        connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_named(rank):
    with run_of(3) as run:
        run.start(0, 1, 2)
        run.connected()
        drop(run.ends[rank])
        survivors = [end for number, end in enumerate(run.ends) if number != rank]
        failures = [end.wait_for_failure(10) for end in survivors]
        assert [(f.rank, f.printed) for f in failures if f] == [(rank, False)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_an_orderly_end_is_no_failure(rank):
    with run_of(2) as run:
        run.start(0, 1)
        run.connected()
        run.ends[rank].close()
        assert run.ends[1 - rank].wait_for_failure(0.3) is None


def test_a_stranger_is_ignored():
    with run_of(2) as run:
        run.start(0, 1)
        run.connected()
        hub = run.ends[0]
        assert isinstance(hub, Hub)
        for words in (b"GET / HTTP/1.0\r\n\r\n", json.dumps({"token": "wrong", "rank": 1}).encode() + b"\n"):
            with socket.create_connection(("127.0.0.1", hub._listener.getsockname()[1])) as stranger:
                stranger.sendall(words)
        assert run.heard(0.3) == [None, None]


def describe(error: BaseException) -> tuple[str, bool]:
    return str(error), True


class Collective(RuntimeError):
    """As gloo raises it."""

    def __init__(self) -> None:
        super().__init__("[pair.cc:553] Connection closed by peer [127.0.0.1]:34439")


def test_a_broken_connection_is_blamed_on_the_rank_that_failed():
    port = free_port()
    first, second = (RankWatch(Place(rank, rank, 0, 2, "127.0.0.1", port), describe) for rank in (0, 1))
    second.note(ValueError("row 7"))
    with pytest.raises(PeerFailed, match=r"rank 1 .*row 7"):
        first.end(Collective())
    second.end(ValueError("row 7"))


@pytest.mark.parametrize(
    ("failed", "printed", "printers"),
    [
        ((0, 0), True, [(0, 1)]),  # the failing rank prints on its own node
        ((1, 0), True, [(0, 1)]),
        ((1, 0), False, [(0, 0), (0, 1)]),
        ((0, 0), False, [(0, 1), (1, 0)]),  # the first rank of its node is dead
    ],
)
def test_each_node_prints_one_line(failed, printed, printers):
    """Ranks are named by local rank and node."""
    watch = RankWatch.__new__(RankWatch)
    found = []
    for local_rank, node in itertools.product((0, 1), (0, 1)):
        watch.place = Place(2 * node + local_rank, local_rank, node, 4, "", 0)
        if (local_rank, node) != failed and watch._prints(Failure(9, *failed, "host", "", printed)):
            found.append((local_rank, node))
    assert found == printers


def test_wrong_words_end_all_ranks_with_the_status_of_the_first(capsys):
    """Each rank finds the fault itself; one prints it."""
    port, ends = free_port(), []

    def end(rank: int) -> None:
        watch = RankWatch(Place(rank, rank, 0, 2, "127.0.0.1", port), described)
        try:
            rank_failure._watch = watch
            error = UsageError("halos fit: error: no widget")
            watch.end(error)
            ends.append(error)
        except PeerFailed as failed:
            ends.append(failed)

    threads = [threading.Thread(target=end, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    rank_failure._watch = None
    [own] = [each for each in ends if isinstance(each, UsageError)]
    [other] = [each for each in ends if isinstance(each, PeerFailed)]
    assert (own.code, other.failure.status, other.failure.text) == (2, 2, own.line)
    assert not other.prints
    assert capsys.readouterr().err == ""
    own.print()
    own.print()
    assert capsys.readouterr().err.splitlines() == [own.line]


def test_a_blocked_process_is_ended_with_one_line(monkeypatch, capsys):
    """Its main thread never returns from its collective."""
    ended = threading.Event()
    statuses = []

    def exit_now(status: int) -> None:
        statuses.append(status)
        first._closing.set()
        ended.set()

    monkeypatch.setattr(rank_failure.os, "_exit", exit_now)
    monkeypatch.setattr(rank_failure, "FORCE", 0.1)
    port = free_port()
    first = RankWatch(Place(0, 0, 0, 2, "127.0.0.1", port), describe)
    dying = Spoke(Place(1, 1, 0, 2, "127.0.0.1", port))
    while dying._connection is None:
        dying.poll(0.05)
    dying._connection.close()
    assert ended.wait(10)
    first._thread.join()
    lines = capsys.readouterr().err.splitlines()
    assert statuses == [1]
    assert len(lines) == 1
    assert "rank 1" in lines[0]
    first._links.close()


def test_a_rank_that_cannot_reach_rank_0_warns_once(monkeypatch, capsys):
    """As behind a firewall: the store answers, but not the port on which rank 0 listens."""
    monkeypatch.setattr(rank_links, "UNREACHED", 0.2)
    port = free_port()
    hub = Hub(Place(0, 0, 0, 2, "127.0.0.1", port))
    hub._publish()
    hub._listener.close()
    watch = RankWatch(Place(1, 1, 0, 2, "127.0.0.1", port), describe)
    wait = threading.Event()
    for _ in range(100):
        if watch._links.fault:
            break
        wait.wait(0.1)
    wait.wait(1.2)  # two more attempts
    watch._closing.set()
    watch._thread.join()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("halos: rank 1 ")
    assert "of rank 0" in lines[0]
    assert "refused" in lines[0]
