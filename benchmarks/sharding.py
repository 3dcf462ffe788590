"""Compares a step of fsdp2 with one of DDP: time, and peak memory of each rank.

    .venv/bin/python benchmarks/sharding.py [--pairs 20] [--ranks 2] [--hidden 512] [--layers 8]

Both sides load the same random model, step on the same KTO rows with AdamW and a reference, and must compute the same
loss and gradient norm. Then they step in turn, in random order within each pair. Each rank has one thread. Run it on an
otherwise idle machine with as many cores as ranks.
"""

from __future__ import annotations

import argparse
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

#: Rows of each rank and step; with their mismatched rows, about 5,000 tokens.
ROWS, PROMPT, COMPLETION = 20, 96, 80


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
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def batch_of(rank: int) -> Any:
    """The rows of a rank: KTO rows, and a mismatched one for each."""
    from halos_pl.batch import Labels, TokenBatch

    draw = torch.Generator().manual_seed(rank)
    prompts = [torch.randint(8192, (PROMPT,), generator=draw) for _ in range(ROWS)]
    completions = [torch.randint(8192, (COMPLETION,), generator=draw) for _ in range(2 * ROWS)]
    mismatched = torch.arange(2 * ROWS) >= ROWS
    labels = Labels(desirable=torch.arange(2 * ROWS) % 2 == 0, mismatched=mismatched)
    return TokenBatch(prompts, completions, torch.arange(2 * ROWS) % ROWS, labels)


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


def measure_memory(rank: int, ranks: int, port: int, kind: str, folder: str, results: Any) -> None:
    """Puts the peaks while loading and in a step, above the memory before, in MB."""
    start(rank, ranks, port)
    import halos_pl.training.engine  # noqa: F401

    before = forget_peak()
    side, batch = Side(kind, folder, ranks), batch_of(rank)
    loaded = peak() - before
    side.step(batch)
    forget_peak()
    side.step(batch)
    results.put((rank, loaded, peak() - before))


def measure_time(rank: int, ranks: int, port: int, pairs: int, folder: str, results: Any) -> None:
    """Puts the times of the steps of both sides, in seconds, and how a step of fsdp2 spends its time."""
    start(rank, ranks, port)
    sides, batch = {kind: Side(kind, folder, ranks) for kind in ("ddp", "fsdp2")}, batch_of(rank)
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


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 20), ("ranks", 2), ("hidden", 512), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, options.hidden, options.layers)
        size = Path(folder, "model.safetensors").stat().st_size / 1e6
        batch = batch_of(0)
        tokens = sum(map(len, batch.prompts)) + sum(map(len, batch.completions))
        print(f"model of {size:.0f} MB in float32, {tokens} tokens a rank and step, {os.cpu_count()} cores\n")
        print("| strategy | ranks | peak while loading, MB | peak in a step, MB |\n|---|---|---|---|")
        for kind, ranks in (
            ("ddp", options.ranks),
            ("fsdp2", 1),
            ("fsdp2", options.ranks),
            ("fsdp2", 2 * options.ranks),
        ):
            found = in_ranks(measure_memory, ranks, kind, folder)
            print(f"| {kind} | {ranks} | {max(f[1] for f in found):.0f} | {max(f[2] for f in found):.0f} |", flush=True)
        found = in_ranks(measure_time, options.ranks, options.pairs, folder)
        _, times, spent = found[0]
        ratio = median_interval([b / a for a, b in zip(times["ddp"], times["fsdp2"], strict=True)])
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        print(f"\nstep: ddp {medians['ddp']:.2f} s, fsdp2 {medians['fsdp2']:.2f} s;", end=" ")
        print(f"ratio {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}], {options.pairs} pairs")
        print("of a step of fsdp2: " + ", ".join(f"{name} {value:.2f} s" for name, value in spent.items()))


if __name__ == "__main__":
    main()
