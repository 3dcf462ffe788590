"""A failure of one rank ends all ranks of a run within a minute, and one line names the rank.

Without this, the other ranks would wait in a collective for up to half an hour. A thread in each rank listens (see
:mod:`halos_pl.training.rank_links`). Once some rank has failed, the main thread usually gets an error from its
collective, or is interrupted; if it stays blocked, the thread ends the process, which leaves the same files as SIGKILL.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from halos_pl.common import stopping
from halos_pl.common.messages import plain
from halos_pl.training.rank_links import Failure, Hub, Place, Spoke, links

#: Seconds after another rank's failure: until the main thread is interrupted, and until the process is ended; and until
#: the process is ended if the main thread has begun to end by itself.
INTERRUPT, FORCE, FORCE_ENDING = 3.0, 10.0, 30.0
#: Seconds that a failing rank waits for the others to hear of it, some of which may still be starting.
TOLD = 45.0
#: Seconds within which the reason of a broken connection becomes known.
REASON = 10.0

# Errors of collectives that follow from the failure of another rank.
_SYMPTOM = re.compile(r"Connection (closed|reset) by peer|third_party/gloo|NCCL|Timed out waiting \d+ms", re.IGNORECASE)


class PeerFailed(BaseException):
    """Another rank has failed; not an ``Exception``, so that no error handler swallows it.

    Args:
        failure: The first failure of the run.
        prints: Whether this rank prints it.
    """

    def __init__(self, failure: Failure, prints: bool) -> None:
        super().__init__(f"{failure}; this rank ends too")
        self.failure, self.prints = failure, prints


def _is_symptom(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_SYMPTOM.search(str(error)))


def _ends_in_order(error: BaseException) -> bool:
    """Whether all ranks end with it together: without a status, or after a signal on which they have agreed."""
    return isinstance(error, SIGTERMException) or (isinstance(error, SystemExit) and not error.code)


class RankWatch:
    """Watches the other ranks of a run, and tells them of a failure of this one.

    Args:
        place: This rank's place in the run.
        describe: Returns one line on an error, and whether a user can fix it; otherwise its traceback is shown.
        launched: Returns whether the other ranks have been started.
    """

    def __init__(
        self,
        place: Place,
        describe: Callable[[BaseException], tuple[str, bool]],
        launched: Callable[[], bool] = lambda: True,
    ) -> None:
        self.place, self.launcher = place, None
        self._describe, self._launched = describe, launched
        self._links: Hub | Spoke = links(place)
        self._error: BaseException | None = None
        self._ends_since = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    # The thread.

    def _run(self) -> None:
        failed_at, interrupted, warned = 0.0, False, False
        while not self._closing.is_set():
            try:
                self._links.poll(0.5)
            except (OSError, RuntimeError, ValueError) as error:  # such as a port in use, which ends the run anyway
                if not self._closing.is_set():
                    self._print(f"rank {self.place.rank} cannot watch the other ranks: {error}")
                return
            self._replace_observer()
            if self._links.fault and not warned:
                warned = True
                self._print(f"rank {self.place.rank} {self._links.fault}")
            failure = self._links.failure
            if failure is None and self._error is None:
                continue
            now = time.monotonic()
            failed_at = failed_at or now
            if now - (self._ends_since or failed_at) > (FORCE_ENDING if self._ends_since else FORCE):
                self._force(failure)
            if failure is None or interrupted or self._ends_since or stopping.received() is not None:
                continue
            if now - failed_at > INTERRUPT:
                interrupted = True
                stopping.interrupt(PeerFailed(failure, self._prints(failure)))

    def _replace_observer(self) -> None:
        """Empties the list of Lightning's observer, which would kill this process before it can report a failure."""
        launcher: Any = self.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
            observed, launcher.procs = launcher.procs, list(launcher.procs)
            observed.clear()
            self.launcher = None

    def _force(self, failure: Failure | None) -> None:
        """Ends the process, whose main thread is blocked."""
        error = self._error
        if failure is not None and failure.rank != self.place.rank:
            if self._prints(failure):
                self._print(str(PeerFailed(failure, prints=True)))
        elif error is not None:
            text, fixable = self._describe(error)
            if not fixable:
                traceback.print_exception(error)
            self._print(f"rank {self.place.rank}: {text}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    # The main thread.

    def note(self, error: BaseException) -> None:
        """Tells the other ranks of an error of this one, before its callbacks are torn down; does not wait."""
        self._error = self._error or error
        self._ends_since = self._ends_since or time.monotonic()
        if not isinstance(error, PeerFailed) and not _ends_in_order(error) and not _is_symptom(error):
            self._links.tell(self._failure(error))

    def end(self, error: BaseException | None = None) -> None:
        """Ends the watch, with the error that ends this rank, if any.

        Raises:
            PeerFailed: if another rank had failed before.
        """
        failure = None
        if error is not None and not _ends_in_order(error):
            self.note(error)
            if _is_symptom(error) and self._links.wait_for_failure(REASON) is None:
                self._links.tell(self._failure(error))
            if self._launched():
                self._links.wait_told(TOLD)
            failure = self._links.failure
        self._closing.set()
        self._thread.join(3)
        self._links.close()
        if failure is not None and failure.rank != self.place.rank and not isinstance(error, stopping.Stopped):
            raise PeerFailed(failure, self._prints(failure)) from error

    def _failure(self, error: BaseException) -> Failure:
        place, printed = self.place, True
        if isinstance(error, stopping.Stopped):
            text, printed = f"stopped by {error}", place.local_rank == 0
        else:
            text = self._describe(error)[0]
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        return Failure(place.rank, place.local_rank, place.node, socket.gethostname(), text, printed, status)

    def _prints(self, failure: Failure) -> bool:
        """Whether this rank prints another one's failure: the first on each node where that rank does not."""
        here = failure.node == self.place.node
        if here and failure.printed:
            return False
        return self.place.local_rank == int(here and failure.local_rank == 0)

    @staticmethod
    def _print(text: str) -> None:
        print(f"halos: {plain(text)}", file=sys.stderr, flush=True)


class NoteFailure(Callback):
    """Tells the other ranks of an error at once; first among the callbacks, as others may wait for those ranks."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if _watch is not None:
            _watch.note(exception)


_watch: RankWatch | None = None
_rank: int | None = None  # of a run with several ranks


def watched() -> bool:
    """Whether the ranks of this run agree on which of them reports an error."""
    return _watch is not None


def prefix() -> str:
    """``rank 1: `` in a run with several ranks, otherwise empty."""
    return "" if _rank is None else f"rank {_rank}: "


def _start(environment: ClusterEnvironment, rank: int, world_size: int, describe: Any) -> None:
    global _watch, _rank
    if world_size > 1 and _watch is None and environment.main_port > 0:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        place = Place(
            rank=rank,
            local_rank=environment.local_rank(),
            node=environment.node_rank(),
            world_size=world_size,
            address=environment.main_address,
            port=environment.main_port,
            agent=agent,
        )
        _watch, _rank = RankWatch(place, describe, lambda: environment.creates_processes_externally), rank


def watch_trainer(trainer: Trainer, describe: Callable[[BaseException], tuple[str, bool]]) -> None:
    """Watches the other ranks of a Trainer's run, unless a launcher had named them before."""
    environment: Any = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:
        _start(environment, trainer.global_rank, trainer.world_size, describe)
    if _watch is not None:
        _watch.launcher = trainer.strategy.launcher  # type: ignore[assignment]


@contextmanager
def watching(describe: Callable[[BaseException], tuple[str, bool]]) -> Iterator[None]:
    """Inside this context, the ranks of a run that torchrun or srun has started, or a Trainer, end together.

    Args:
        describe: Returns one line on an error, and whether a user can fix it.

    Raises:
        PeerFailed: if another rank has failed.
    """
    global _watch, _rank
    _watch = _rank = None
    if TorchElasticEnvironment.detect():
        torchrun = TorchElasticEnvironment()
        _start(torchrun, torchrun.global_rank(), torchrun.world_size(), describe)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and SLURMEnvironment.detect():
        try:
            slurm = SLURMEnvironment()
            _start(slurm, slurm.global_rank(), slurm.world_size(), describe)
        except (RuntimeError, KeyError, ValueError):  # Lightning will explain
            pass
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    finally:
        watch, _watch = _watch, None
    if watch is not None:
        watch.end(error)
    if error is not None:
        raise error
