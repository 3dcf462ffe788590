"""Calls a function on several ranks, each a process forked from one that has imported everything."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import run_halos
import torch
import torch.distributed as dist


def _rank(
    target: Callable[..., Any], rank: int, ranks: int, store: str, connection: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        if ranks:
            dist.init_process_group(
                "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
            )
        result = target(*args)
        if ranks:
            dist.destroy_process_group()
    except BaseException as error:
        traceback.print_exc()
        result = error if isinstance(error, Exception) else RuntimeError(str(error))
    buffer = io.BytesIO()  # tensors that are sent otherwise are lost when their process ends
    torch.save(result, buffer)
    connection.send_bytes(buffer.getvalue())


def alone(target: Callable[..., Any], folder: Path, *args: Any) -> Any:
    """What ``target(folder, *args)`` returns in a process of its own, which has no threads."""
    (result,) = on_ranks(folder, 0, target, folder, *args)
    if isinstance(result, BaseException):
        raise result
    return result


def on_ranks(folder: Path, ranks: int, target: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """What ``target(*args)`` returns on each rank; an exception that it raised there is returned.

    Args:
        folder: folder for the ranks' meeting point.
        ranks: number of ranks; 0 for a single process without torch.distributed.
        target: function of a module.
        args: its arguments.
        timeout: seconds after which ranks are ended that have not answered.
    """
    run_halos._start()
    context = run_halos._CONTEXT
    store = folder / f"store.{len(list(folder.glob('store.*')))}"
    processes, ends = [], []
    for rank in range(max(ranks, 1)):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(target, rank, ranks, str(store), theirs, args))
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    results = []
    try:
        for end in ends:
            assert end.poll(timeout), "a rank does not answer"
            results.append(torch.load(io.BytesIO(end.recv_bytes()), weights_only=False))
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return results
