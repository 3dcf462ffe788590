"""Steps of a sharded policy, on ranks that are forked from the tests, compared with those of one process."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from run_halos import free_port, in_ranks


@dataclass(frozen=True)
class Case:
    """A step to compare.

    Attributes:
        model: folder of the model.
        data: file or files of the rows.
        objective: name of the objective.
        policy: further settings of the policy.
        reference: name and arguments of the reference's class; None for the default.
        micro: number of rows in a pass; None for all.
        half: whether weights are gathered in bfloat16, instead of autocast.
        whole_reference: as in ``Sharding``.
        prefix_sharing: as for ``Scorer``.
    """

    model: str
    data: str | list[str]
    objective: str
    policy: Mapping[str, Any] = field(default_factory=dict)
    micro: int | None = None
    half: bool = False
    whole_reference: bool = False
    prefix_sharing: str = "auto"


@dataclass(frozen=True)
class Step:
    """The result of a step: its loss, and the gradients by name."""

    loss: float
    gradients: dict[str, torch.Tensor]
    first_rewards: float
    shares: bool


def _step(case: Case, sharding: Any) -> Step:
    from halos_pl import (
        AdapterOff,
        FeedbackDataModule,
        FrozenCopy,
        ModelSpec,
        Scorer,
        StepEngine,
        load_model,
        load_objective,
    )
    from halos_pl.policy.loading import LoRASpec, load_tokenizer
    from halos_pl.policy.scalar_head import freeze_language_head
    from halos_pl.policy.sharding import average_plain_gradients, whole

    torch.manual_seed(0)
    options = dict(case.policy)
    if lora := options.pop("lora", None):
        options["lora"] = LoRASpec(**lora)
    spec, objective = ModelSpec(case.model, **options), load_objective(case.objective)
    model, needs = load_model(spec, sharding).train(), objective.needs
    if not needs.policy_logps:
        freeze_language_head(model)
    sharing: Any = case.prefix_sharing
    scorer = Scorer(model, prefix_sharing=sharing, sharding=sharding, scalar_head=needs.scalar)
    reference: Any = AdapterOff() if lora else FrozenCopy()
    reference.bind(scorer, spec)
    data = FeedbackDataModule(train=case.data, batch_size=5)
    data.connect(tokenizer=load_tokenizer(spec), needs=objective.needs)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    autocast = torch.autocast("cpu", torch.bfloat16) if case.half and sharding is None else nullcontext()
    with autocast, torch.no_grad():
        apart = (scorer(batch) - reference.logps(batch)).abs().max()
    with torch.no_grad():  # away from the reference, by the same steps in each process
        for name, p in scorer.named_parameters():
            if p.requires_grad:
                draw = torch.Generator().manual_seed(sum(name.encode()))
                step = 0.05 * torch.randn(p.shape, generator=draw)
                if isinstance(p, torch.distributed.tensor.DTensor):
                    step = torch.distributed.tensor.distribute_tensor(step, p.device_mesh, p.placements)
                p.add_(step)
    with autocast:
        parts = StepEngine(objective, scorer, reference if needs.policy_logps else None, case.micro).step(batch)
    trained = {name: p for name, p in scorer.named_parameters() if p.requires_grad}
    if sharding is not None:
        average_plain_gradients(trained.values())
    gradients = {name: whole(p.grad).clone() for name, p in trained.items() if p.grad is not None}
    loss = torch.stack([part.result.loss for part in parts]).sum()
    if sharding is not None:
        dist.all_reduce(loss)
    return Step(float(loss), gradients, float(apart), scorer.shares_prefixes)


def _rank(rank: int, ranks: int, replicas: int, port: int, folder: str, cases: dict[str, Case]) -> None:
    from halos_pl.policy.sharding import Sharding

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    try:
        alone = {name: _step(case, None) for name, case in cases.items()}
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank)
        )
        dist.init_process_group("gloo", timeout=timedelta(seconds=40))
        for name, case in cases.items():
            sharding = Sharding(ranks // replicas, replicas, half=case.half, whole_reference=case.whole_reference)
            step = _step(case, sharding)
            one, many = alone[name].gradients, step.gradients
            results[name] = {
                "same_names": one.keys() == many.keys(),
                "gradient": max(float((one[n] - many[n]).abs().max()) for n in one),
                "size": max(float(g.abs().max()) for g in one.values()),
                "loss": abs(alone[name].loss - step.loss),
                "first_rewards": step.first_rewards,
                "shares": step.shares == alone[name].shares,
            }
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results["error"] = traceback.format_exc()
    Path(folder, f"steps.{rank}.json").write_text(json.dumps(results), encoding="utf-8")


def _memory() -> int:
    """The resident memory of this process, in bytes, with the pages of files that it has read."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Gives a list that contains, at the end, how much memory was taken at most, in bytes."""
    before, most, stop = _memory(), [0], Event()

    def watch() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], _memory() - before)

    watcher = Thread(target=watch)
    watcher.start()
    yield most
    stop.set()
    watcher.join()


def _load(rank: int, ranks: int, port: int, folder: str, model: str) -> None:
    from halos_pl import ModelSpec, load_model
    from halos_pl.policy.sharding import Sharding

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank)
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    warm = load_model(ModelSpec(f"{model}-small"), Sharding(ranks))  # imports everything
    with _peak() as most:
        loaded = load_model(ModelSpec(model), Sharding(ranks))
    Path(folder, f"peak.{rank}").write_text(str(most[0]), encoding="utf-8")
    del warm, loaded
    dist.barrier()


def loading_peaks(model: str, folder: Path, ranks: int) -> list[int]:
    """The memory that each rank takes at most to load its shard of a model, in bytes.

    Args:
        model: folder of the model; a small model of the same kind is in the folder of that name with ``-small``.
        folder: for files.
        ranks: number of ranks.
    """
    in_ranks(_load, ranks, ranks, free_port(), str(folder), model)
    return [int((folder / f"peak.{rank}").read_text(encoding="utf-8")) for rank in range(ranks)]


def compare(cases: Mapping[str, Case], folder: Path, *, ranks: int = 2, replicas: int = 1) -> dict[str, dict[str, Any]]:
    """How far each step of a sharded policy is from that of one process.

    Returns:
        By case, the largest difference of a ``gradient`` and the ``size`` of the largest one, the difference of the
        ``loss``, the largest reward before any step (``first_rewards``), and whether gradients have the same names.
    """
    in_ranks(_rank, ranks, ranks, replicas, free_port(), str(folder), dict(cases))
    results: list[dict[str, Any]] = []
    for rank in range(ranks):
        results.append(json.loads((folder / f"steps.{rank}.json").read_text(encoding="utf-8")))
        assert "error" not in results[-1], results[-1]["error"]
    return results[0]
