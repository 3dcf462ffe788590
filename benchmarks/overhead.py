"""Measures the objective's share of a step's time: reward, z0, value, feedback and the gradient of the loss.

    python benchmarks/overhead.py [--threads 2]

The step is that of ``vs_trl.py``'s kto_live and dpo_live (SmolLM2-135M, 8 rows, live reference). The objective is timed
separately on the log-probs of that step, forward and backward, 50 times; its median is compared with the median of
three whole steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from vs_trl import ROOT, WORKLOADS, ours, write_rows


def seconds(call: object, count: int) -> float:
    """Median time of ``count`` calls after a first one, in seconds."""
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class Watched(torch.nn.Module):
    """An objective that records the rows passed to ``prepare``."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective, self.seen = objective, []  # type: ignore[var-annotated]
        self.needs, self.compute_loss = objective.needs, objective.compute_loss

    def prepare(self, rows: Any) -> Any:
        """Calls the objective's ``prepare``."""
        self.seen.append(rows)
        return self.objective.prepare(rows)


def main() -> None:
    """Measures both losses and prints a table."""
    from halos_pl.objective.build import load_objective

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads or 1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print("| step | whole, s | objective, ms | share |\n|---|---|---|---|")
    for name in ("kto_live", "dpo_live"):
        workload = WORKLOADS[name]
        objective = load_objective(ROOT / f"experiments/objectives/{workload.kind}.yaml")
        with tempfile.TemporaryDirectory() as folder:
            write_rows(workload, folder)
            watched = Watched(objective)
            step = ours(workload, folder, watched)[1]
            whole = seconds(step, 3)
        scored = watched.seen[-1]

        def alone() -> None:
            leaf = replace(scored, policy_logps=scored.policy_logps.clone().requires_grad_())  # noqa: B023
            objective(leaf).loss.backward()  # noqa: B023

        part = seconds(alone, 50)
        print(f"| {workload.what} | {whole:.2f} | {1000 * part:.2f} | {part / whole:.3%} |", flush=True)


if __name__ == "__main__":
    main()
