"""Compares a training step of this checkout with that of another one, such as an earlier commit.

    git worktree add ../before COMMIT
    .venv/bin/python benchmarks/before_after.py ../before [--workloads kto_live dpo_live] [--pairs 20]

Both sides load the same rows and must compute the same loss and gradient. Then they step in turn, in random order
within each pair. The table shows the median ratio of this checkout's time to the other's, with a 95% interval from
order statistics, which assumes nothing about the distribution. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binom
from vs_trl import WORKLOADS, _ask, write_rows

HERE = Path(__file__).resolve().parents[1]


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the order statistics that contain the true one in at least 95% of samples."""
    ordered, n = sorted(values), len(values)
    below = max(int(binom.ppf(0.025, n, 0.5)) - 1, 0)
    return statistics.median(ordered), ordered[below], ordered[n - 1 - below]


def side(checkout: Path, name: str, workload: str, folder: str, threads: int) -> Any:
    """Starts a process that runs a step for each line on its stdin."""
    words = [sys.executable, str(checkout / "benchmarks" / "vs_trl.py"), "--side", "ours", "--workloads", workload]
    place = Path(folder) / name
    place.mkdir()
    for file in Path(folder).glob("*.json"):
        (place / file.name).write_bytes(file.read_bytes())
    return subprocess.Popen(
        [*words, "--folder", str(place), "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout), "HALOS_CACHE": f"{place}/cache"},
    )


def compare(other: Path, workload: str, pairs: int, threads: int) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(WORKLOADS[workload], folder)
        sides = {n: side(c, n, workload, folder, threads) for n, c in (("now", HERE), ("before", other.resolve()))}
        for process in sides.values():
            _ask(process)
        now, before = (torch.load(Path(folder) / name / "ours.pt") for name in sides)
        size = max(float(g.abs().max()) for g in before["gradient"].values())
        apart = max(float((now["gradient"][k] - g).abs().max()) for k, g in before["gradient"].items()) / size
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks = dict.fromkeys(sides, 0)
        draw = random.Random(0)
        for _ in range(pairs):
            for name in draw.sample(list(sides), 2):
                sides[name].stdin.write("\n")
                sides[name].stdin.flush()
                answer: dict[str, Any] = _ask(sides[name])
                seconds[name].append(answer["seconds"])
                peaks[name] = max(peaks[name], answer["peak"])
        for process in sides.values():
            process.stdin.close()
            process.wait()
    median, low, high = median_interval([a / b for a, b in zip(seconds["now"], seconds["before"], strict=True)])
    times = [f"{statistics.median(values):.2f}" for values in seconds.values()]
    memory = [f"{peak / 1e9:.2f}" for peak in peaks.values()]
    cells = [workload, *times, f"{median:.3f} [{low:.3f}, {high:.3f}]", *memory, f"{apart:.0e}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures all workloads and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["kto_live", "dpo_live"])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    print("| step | now, s | before, s | now / before [95%] | now, GB | before, GB | gradient, apart |")
    print("|---|---|---|---|---|---|---|")
    for workload in args.workloads:
        print(compare(args.other, workload, args.pairs, args.threads), flush=True)


if __name__ == "__main__":
    main()
