"""Ranks of torch.distributed as threads of one process, for clauses on several ranks."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Done:
    """The handle of a finished collective operation."""

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        return True

    is_completed = is_success = wait


def namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """The globals that the code of a plug-in and of its parts uses."""
    spaces: dict[int, dict[str, Any]] = {}
    for part in module.modules():
        functions = [value for value in vars(part).values() if inspect.isfunction(value)]
        homes = [vars(sys.modules[c.__module__]) for c in type(part).__mro__ if c.__module__ in sys.modules]
        for names in (*homes, *(f.__globals__ for f in functions)):
            if str(names.get("__name__")).partition(".")[0] not in ("torch", "builtins"):
                spaces[id(names)] = names
    return list(spaces.values())


class _Environment(MutableMapping[str, str]):
    """The environment, with variables that the thread of a rank sees otherwise."""

    def __init__(self, everyone: MutableMapping[str, str], of_rank: Callable[[], dict[str, str]]) -> None:
        self.everyone, self.of_rank = everyone, of_rank

    def __getitem__(self, name: str) -> str:
        own = self.of_rank()
        return own[name] if name in own else self.everyone[name]

    def __setitem__(self, name: str, value: str) -> None:
        self.everyone[name] = value

    def __delitem__(self, name: str) -> None:
        del self.everyone[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.everyone, **self.of_rank()})

    def __len__(self) -> int:
        return len({**self.everyone, **self.of_rank()})

    def copy(self) -> dict[str, str]:
        return dict(self)


class Ranks:
    """Ranks as threads of this process, which meet at each collective operation.

    They replace torch.distributed itself while they run, so that it does not matter whether a plug-in calls it
    directly or through ``halos_pl.distributed``. A real process group would take seconds to start. In ``os.environ``, a
    rank finds what torchrun and SLURM tell it.
    """

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.barrier = threading.Barrier(count)
        self.slots: list[Any] = [None] * count
        self.local = threading.local()
        self.done = False

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order.

        Raises:
            threading.BrokenBarrierError: another rank makes no further call.
        """
        if self.done:
            raise threading.BrokenBarrierError
        self.slots[self.local.rank] = value
        self.barrier.wait(timeout=5)
        everything = list(self.slots)
        self.barrier.wait(timeout=5)
        return everything

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        kinds: dict[str, Any] = {"SUM": torch.sum, "MAX": torch.amax, "MIN": torch.amin, "PRODUCT": torch.prod}
        stacked = torch.stack(self.exchange(tensor.detach().clone()))
        name = next((name for name in kinds if name in str(op).upper()), "SUM")
        reduced: Tensor = kinds[name](stacked, dim=0)
        return reduced / self.count if "AVG" in str(op).upper() else reduced

    def all_reduce(self, tensor: Tensor, op: Any = None, *args: Any, **kwargs: Any) -> _Done:
        tensor.data.copy_(self._reduced(tensor, op))
        return _Done()

    def reduce(self, tensor: Tensor, dst: int | None = None, op: Any = None, *args: Any, **kwargs: Any) -> _Done:
        reduced = self._reduced(tensor, op)
        if self.local.rank == (kwargs.get("group_dst") if dst is None else dst):
            tensor.data.copy_(reduced)
        return _Done()

    def broadcast(self, tensor: Tensor, src: int | None = None, *args: Any, **kwargs: Any) -> _Done:
        source = kwargs.get("group_src") if src is None else src
        tensor.data.copy_(self.exchange(tensor.detach().clone())[source or 0])
        return _Done()

    def all_gather(self, out: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> _Done:
        for place, value in zip(out, self.exchange(tensor.detach().clone()), strict=True):
            place.copy_(value)
        return _Done()

    def all_gather_into_tensor(self, out: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> _Done:
        out.data.copy_(torch.stack(self.exchange(tensor.detach().clone())).view(out.shape))
        return _Done()

    def all_gather_object(self, out: list[Any], value: Any, *args: Any, **kwargs: Any) -> None:
        out[:] = self.exchange(value)

    def gather_with_gradient(self, tensor: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(self.exchange(tensor))

    def variables(self) -> dict[str, str]:
        """The variables of this thread's rank by which launchers tell it about the others; none for other threads."""
        rank = getattr(self.local, "rank", None)
        if rank is None:
            return {}
        sizes = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
        numbers = ("RANK", "LOCAL_RANK", "ROLE_RANK", "SLURM_PROCID", "SLURM_LOCALID")
        of_node = {"GROUP_RANK": "0", "NODE_RANK": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}
        return dict.fromkeys(sizes, str(self.count)) | dict.fromkeys(numbers, str(rank)) | of_node | address

    @contextmanager
    def in_place_of_torch(self, namespaces: Sequence[dict[str, Any]] = ()) -> Iterator[None]:
        """Replaces torch.distributed and os.environ by those of these ranks, also under names in ``namespaces``."""
        stand_ins: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "get_world_size": lambda *a, **k: self.count,
            "get_rank": lambda *a, **k: self.local.rank,
            "all_reduce": self.all_reduce,
            "reduce": self.reduce,
            "broadcast": self.broadcast,
            "all_gather": self.all_gather,
            "all_gather_into_tensor": self.all_gather_into_tensor,
            "all_gather_single": self.all_gather_into_tensor,
            "all_gather_object": self.all_gather_object,
            "barrier": lambda *a, **k: self.exchange(None),
            "nn.functional.all_gather": self.gather_with_gradient,
        }
        stand_ins = {f"torch.distributed.{path}": stand_in for path, stand_in in stand_ins.items()}
        stand_ins["os.environ"] = _Environment(os.environ, self.variables)
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for path, stand_in in stand_ins.items():
                home, _, name = path.rpartition(".")
                names = vars(importlib.import_module(home))
                if name not in names:  # absent from this version of torch
                    continue
                original = names[name]
                imported = [(ns, key) for ns in namespaces for key, value in ns.items() if value is original]
                for namespace, key in [(names, name), *imported]:
                    replaced.append((namespace, key, original))
                    namespace[key] = stand_in
            yield
        finally:
            for namespace, key, original in replaced:
                namespace[key] = original

    def run(self, jobs: list[Callable[[], Any]], namespaces: Sequence[dict[str, Any]] = ()) -> list[Any]:
        """Runs one job on each rank and returns the results; for ``namespaces`` see :meth:`in_place_of_torch`.

        Raises:
            RuntimeError: the ranks did not make the same calls of torch.distributed.
            Exception: whatever a job raised.
        """
        results: list[Any] = [None] * self.count
        errors: list[BaseException] = []
        self.done = False

        def work(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = jobs[rank]()
            except (Exception, SystemExit) as error:
                errors.append(error)
                self.barrier.abort()
            self.done = True  # who calls from now on, or waits already, would wait for ever
            if self.barrier.n_waiting:
                self.barrier.abort()

        with self.in_place_of_torch(namespaces):
            threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            errors.sort(key=lambda e: isinstance(e, threading.BrokenBarrierError))
            if isinstance(errors[0], threading.BrokenBarrierError):
                raise RuntimeError("the ranks do not make the same calls of torch.distributed")
            raise errors[0]
        return results
