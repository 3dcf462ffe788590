"""Measures how a step's time and memory grow with rows, prompt length, completions per prompt and vocabulary.

    python benchmarks/scaling.py [--threads 2] [--out benchmarks/scaling] [--replot]

KTO with a live reference on a random Llama of 12 layers, width 256, in float32. Each point runs in a separate process:
two warm-up steps, then the median of three. Memory is the process's peak minus its use before the first step, so it
includes gradients but not weights, tokens and libraries. Writes a table (CSV) and a plot (PNG).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Point:
    """A step: number of rows, tokens per prompt and completion, rows per prompt, and size of the vocabulary."""

    rows: int = 8
    prompt: int = 128
    completion: int = 32
    shared: int = 1
    vocabulary: int = 8192


AXES: dict[str, list[Point]] = {
    "rows": [Point(rows=n) for n in (2, 4, 8, 16, 32)],
    "prompt": [Point(prompt=n) for n in (64, 128, 256, 512, 1024)],
    "shared": [Point(rows=16, shared=n, prompt=256) for n in (1, 2, 4, 8, 16)],
    "vocabulary": [Point(vocabulary=8192 * n) for n in (1, 2, 4, 8)],
}
LABELS = {
    "rows": "rows per step",
    "prompt": "prompt length (tokens)",
    "shared": "completions per prompt (16 rows)",
    "vocabulary": "vocabulary (tokens)",
}


def measure(point: Point, threads: int) -> None:
    """Prints time and memory of one point as JSON."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from vs_trl import Peak, resident

    from halos_pl.batch import TokenBatch
    from halos_pl.labels import Labels
    from halos_pl.objective.build import load_objective
    from halos_pl.policy.reference import FixedModel
    from halos_pl.policy.scorer import Scorer
    from halos_pl.training.engine import StepEngine

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=point.vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=12,
        num_attention_heads=4,
        tie_word_embeddings=True,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    policy = Scorer(LlamaForCausalLM(config), prefix_sharing="always")
    reference = FixedModel(LlamaForCausalLM(config).requires_grad_(False), policy)
    objective = load_objective(Path(__file__).resolve().parents[1] / "experiments/objectives/kto.yaml")
    n = point.rows

    def random_tokens(count: int) -> list[torch.Tensor]:
        return list(torch.randint(0, point.vocabulary, (n, count)))

    batch = TokenBatch(
        prompts=random_tokens(point.prompt)[: n // point.shared],
        completions=[*random_tokens(point.completion), *random_tokens(point.completion)],
        prompt=(torch.arange(n) // point.shared).repeat(2),
        labels=Labels(desirable=torch.arange(2 * n) % 2 == 0, mismatched=torch.arange(2 * n) >= n),
    )

    engine = StepEngine(objective, policy, reference)

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        engine.step(batch)

    before, seconds = resident(), []
    with Peak() as peak:
        for _ in range(5):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    embedding = point.vocabulary * config.hidden_size * 4
    print(
        json.dumps(
            {
                "seconds": statistics.median(seconds[2:]),
                "megabytes": (peak.most - before) / 1e6,
                "embedding_gradient_megabytes": embedding / 1e6,
            }
        )
    )


def plot(table: Path, picture: Path) -> None:
    """Draws time and memory against each axis from the CSV."""
    from matplotlib.figure import Figure

    with table.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    figure = Figure(figsize=(4 * len(AXES), 6), layout="constrained")
    grid = figure.subplots(2, len(AXES))
    for column, name in enumerate(AXES):
        points = [line for line in lines if line["axis"] == name]
        at = [int(point[name]) for point in points]
        for row, key, label in ((0, "seconds", "seconds per step"), (1, "megabytes", "MB beyond the weights")):
            values = [float(point[key]) for point in points]
            axes = grid[row][column]
            axes.plot(at, values, marker="o")
            axes.set(xlabel=LABELS[name], ylabel=label, ylim=(0, 1.08 * max(values)), xscale="log")
            axes.set_xticks(at, [str(n) for n in at], minor=False)
            axes.minorticks_off()
    figure.savefig(picture, dpi=80)


def main() -> None:
    """Measures, prints and plots; with --replot, only plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "scaling")
    parser.add_argument("--replot", action="store_true", help="draw the plot again from the CSV")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        measure(Point(**json.loads(args.point)), args.threads)
        return
    table = args.out.with_suffix(".csv")
    if not args.replot:
        lines = []
        for name, points in AXES.items():
            for point in points:
                words = [sys.executable, __file__, "--threads", str(args.threads), "--point", json.dumps(asdict(point))]
                out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                measured = {key: round(value, 3) for key, value in json.loads(out.splitlines()[-1]).items()}
                lines.append({"axis": name, **asdict(point), **measured})
                print(lines[-1], flush=True)
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    plot(table, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
