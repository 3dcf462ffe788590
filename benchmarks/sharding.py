"""Compares fsdp2 with DDP: the peak memory of each rank, beside the plan's, and the time of a step.

    python benchmarks/sharding.py                                          # 20 pairs of steps, and memory
    python benchmarks/sharding.py --pairs 0 --hidden 1024 --rows 2         # memory only
    python benchmarks/sharding.py --memory --hidden 256 --layers 6         # time only

A rank is a process with one thread. Its memory is resident memory beyond that before the model is loaded, after a tiny
model has been loaded and trained, so that nothing is left to import. glibc returns freed blocks of 64 kB and more at
once, so resident memory is memory in use. While loading, it includes the pages of the model's file that are mapped.

For the times, both sides load the same random model, step on the same KTO rows with AdamW and a reference, and must
compute the same loss and gradient norm. Then they step in turn, in random order within each pair. Run that on an
otherwise idle machine with as many cores as ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import re
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from before_after import median_interval

#: Size of the vocabulary, and tokens of each row's prompt and completion.
VOCABULARY, PROMPT, COMPLETION = 8192, 96, 80
_MMAP_THRESHOLD = -3  # from malloc.h


def peak() -> float:
    """The process's largest resident memory since :func:`forget_peak`, in MB."""
    line = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert line is not None
    return int(line[1]) / 1024


def forget_peak() -> float:
    """Starts to measure again; the present memory, in MB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak()


def make_model(folder: str, hidden: int, layers: int) -> None:
    """Saves a random Llama in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def batch_of(rows: int, rank: int = 0) -> Any:
    """The rows of a rank: KTO rows, and a mismatched one for each."""
    from halos_pl.batch import TokenBatch
    from halos_pl.labels import Labels

    draw = torch.Generator().manual_seed(rank)
    prompts = [torch.randint(VOCABULARY, (PROMPT,), generator=draw) for _ in range(rows)]
    completions = [torch.randint(VOCABULARY, (COMPLETION,), generator=draw) for _ in range(2 * rows)]
    mismatched = torch.arange(2 * rows) >= rows
    labels = Labels(desirable=torch.arange(2 * rows) % 2 == 0, mismatched=mismatched)
    return TokenBatch(prompts, completions, torch.arange(2 * rows) % rows, labels)


def planned(folder: str, kind: str, ranks: int, rows: int) -> Any:
    """The memory that ``halos plan`` computes for a rank.

    Args:
        folder: folder of the model.
        kind: ``ddp`` or ``fsdp2``.
        ranks: number of ranks.
        rows: rows of each rank and step.
    """
    from transformers import AutoConfig

    from halos_pl.batch import Needs
    from halos_pl.plan.memory import Layout, Planner
    from halos_pl.plan.rows import Rows
    from halos_pl.plan.run import Settings
    from halos_pl.plan.shapes import Shape
    from halos_pl.policy.reference import FrozenCopy

    run = Settings(
        policy=Shape(AutoConfig.from_pretrained(folder), "this benchmark"),
        dtype="float32",
        precision="32-true",
        lora=None,
        gradient_checkpointing=False,
        reference_model=FrozenCopy(),
        other=None,
        other_dtype="float32",
        stored=False,
        needs=Needs(reference=True, mismatched=True, undesirable=True),
        shares_prefixes=True,
        micro_batch_rows=None,
        batch_size=ranks * rows,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
        master_weights=True,
    )
    return Planner(run).memory(
        Layout(ranks, sharded=kind == "fsdp2", cuda=False),
        Rows("this benchmark", [], None, batch_of, alike=False),
        gradient_checkpointing=False,
        micro_batch_rows=None,
    )


class Side:
    """A policy, its reference and its optimizer."""

    def __init__(self, kind: str, folder: str, ranks: int) -> None:
        from halos_pl import FrozenCopy, ModelSpec, Scorer, StepEngine, load_model, load_objective
        from halos_pl.policy.sharding import Sharding

        spec, sharding = ModelSpec(folder), Sharding(ranks) if kind == "fsdp2" else None
        self.scorer = Scorer(load_model(spec, sharding).train(), sharding=sharding)
        reference = FrozenCopy()
        reference.bind(self.scorer, spec)
        wrapped: Any = torch.nn.parallel.DistributedDataParallel(self.scorer) if kind == "ddp" else self.scorer
        self.engine = StepEngine(load_objective("kto"), wrapped, reference)
        self.optimizer = torch.optim.AdamW(self.scorer.parameters(), lr=1e-5, fused=True)

    def gradients(self, batch: Any) -> tuple[float, float]:
        """Loss of the step and norm of its gradient."""
        from halos_pl.policy.sharding import total_norm

        loss = torch.stack([part.result.loss for part in self.engine.step(batch)]).sum()
        dist.all_reduce(loss)
        return float(loss), float(total_norm([p.grad for p in self.scorer.parameters() if p.grad is not None]))

    def step(self, batch: Any) -> None:
        self.engine.step(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()


def start(rank: int, ranks: int, port: int) -> None:
    """Joins the group of ranks."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), HF_HUB_OFFLINE="1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))


def measure_memory(rank: int, ranks: int, port: int, kind: str, folder: str, rows: int, results: Any) -> None:
    """Puts the peaks while loading and in a step, above the memory before, in MB.

    Args:
        rank, ranks, port: place of this process.
        kind: ``ddp`` or ``fsdp2``.
        folder: folder of the model, with a small one in its folder ``small``.
        rows: rows of each rank and step.
        results: queue of (rank, peak while loading, peak in a step).
    """
    start(rank, ranks, port)
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
    batch = batch_of(rows, rank)
    Side(kind, f"{folder}/small", ranks).step(batch)  # imports everything
    gc.collect()
    dist.barrier()
    before = forget_peak()
    side = Side(kind, folder, ranks)
    loaded = peak() - before
    side.step(batch)
    forget_peak()
    side.step(batch)
    results.put((rank, loaded, peak() - before))


def measure_time(rank: int, ranks: int, port: int, pairs: int, folder: str, rows: int, results: Any) -> None:
    """Puts the times of the steps of both sides, in seconds, and how a step of fsdp2 spends its time."""
    start(rank, ranks, port)
    sides, batch = {kind: Side(kind, folder, ranks) for kind in ("ddp", "fsdp2")}, batch_of(rows, rank)
    figures = [side.gradients(batch) for side in sides.values()]
    for one, other in zip(*figures, strict=True):
        assert abs(one - other) <= 1e-4 * abs(one), f"the sides differ: {figures}"
    draw, times = random.Random(0), defaultdict(list)
    for side in sides.values():
        side.optimizer.zero_grad()
        side.step(batch)
    for _ in range(pairs):
        for kind in draw.sample(list(sides), 2):
            dist.barrier()
            began = time.perf_counter()
            sides[kind].step(batch)
            dist.barrier()
            times[kind].append(time.perf_counter() - began)
    with torch.profiler.profile() as profile:
        sides["fsdp2"].step(batch)
    parts = {"gather": "FSDP::all_gather", "reduce": "FSDP::post_backward_reduce"}
    events = profile.key_averages()
    spent = {name: sum(e.cpu_time_total for e in events if e.key.startswith(key)) / 1e6 for name, key in parts.items()}
    results.put((rank, dict(times), spent))


def in_ranks(function: Any, ranks: int, *arguments: Any) -> list[Any]:
    """The results of a function that runs in several processes at once, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: Any = mp.get_context("spawn").SimpleQueue()
    mp.spawn(function, (ranks, port, *arguments, results), nprocs=ranks)
    return sorted(results.get() for _ in range(ranks))


def make_models(folder: str, hidden: int, layers: int) -> None:
    """Saves the model, and a small one beside it."""
    make_model(folder, hidden, layers)
    make_model(f"{folder}/small", 64, 1)


def print_memory(folder: str, kind: str, ranks: int, rows: int, size: float) -> None:
    """Prints a row of the table of memory, beside the plan and the rank's share of a model's states.

    These are weights, gradients, AdamW's two moments and the reference, each of ``size`` MiB; DDP holds all of them
    and a buffer of the gradients' size.
    """
    measured = in_ranks(measure_memory, ranks, kind, folder, rows)
    plan = planned(folder, kind, ranks, rows).total / 2**20
    states = 6 * size if kind == "ddp" else 5 * size / ranks
    loading, step = (max(rank[i] for rank in measured) for i in (1, 2))
    print(f"| {kind} | {ranks} | {loading:.0f} | {step:.0f} | {plan:.0f} | {states:.0f} |", flush=True)


def print_times(folder: str, ranks: int, rows: int, pairs: int) -> None:
    """Prints the times of a step."""
    _, times, spent = in_ranks(measure_time, ranks, pairs, folder, rows)[0]
    ratio = median_interval([b / a for a, b in zip(times["ddp"], times["fsdp2"], strict=True)])
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"\nstep on {ranks} ranks: ddp {medians['ddp']:.2f} s, fsdp2 {medians['fsdp2']:.2f} s;", end=" ")
    print(f"ratio {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}], {pairs} pairs")
    print("of a step of fsdp2: " + ", ".join(f"{name} {value:.2f} s" for name, value in spent.items()))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of steps to time; 0 for none")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the timed steps, and of ddp")
    parser.add_argument("--memory", type=int, nargs="*", default=[1, 2, 4], help="ranks of fsdp2 to measure memory on")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=8, help="depth of the model")
    parser.add_argument("--rows", type=int, default=20, help="rows of each rank and step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_models(folder, options.hidden, options.layers)
        size = Path(folder, "model.safetensors").stat().st_size / 2**20
        batch = batch_of(options.rows)
        tokens = sum(map(len, batch.prompts)) + sum(map(len, batch.completions))
        print(f"model of {size:.0f} MiB in float32, {tokens} tokens a rank and step, {os.cpu_count()} cores\n")
        if options.memory:
            print("| strategy | ranks | loading, MiB | step, MiB | planned step, MiB | states, MiB |")
            print("|---|---|---|---|---|---|")
            print_memory(folder, "ddp", options.ranks, options.rows, size)
        for ranks in options.memory:
            print_memory(folder, "fsdp2", ranks, options.rows, size)
        if options.pairs:
            print_times(folder, options.ranks, options.rows, options.pairs)


if __name__ == "__main__":
    main()
