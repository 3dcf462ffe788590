"""Bias, spread and cost of each estimator of z0 along one KTO run, compared with the KL divergence itself.

    .venv/bin/python experiments/ablations/z0_estimators.py [--steps 0 4 8 16] [--batches 24] [--out runs/z0]

A run of ``halos fit`` pauses at some steps, and every estimator computes z0 on the same batches of training rows. The
oracle is E[KL(pi_theta || pi_ref)] over answers to the prompts of these batches, sampled from the policy: exact at each
token, cut off after ``--max_new_tokens``. Bias is the mean over batches minus the oracle, spread the standard deviation
over batches, cost the time that an estimate takes in addition to the training rows' log-probs. Writes z0.csv, z0.md and
z0.png.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lightning import Callback
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import LogProbBatch, TokenBatch
from halos_pl.cli.main import main as halos
from halos_pl.objective.reference_points import (
    BatchMean,
    MismatchedKL,
    ReferencePoint,
    RunningMean,
    SampledKL,
    TokenKL,
    Zero,
)
from halos_pl.objective.rewards import LogRatio
from halos_pl.policy.kl import compared_logps
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.sampling import PolicySamples
from halos_pl.policy.scorer import Scorer
from halos_pl.training.scored_rows import scored_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ESTIMATORS: dict[str, ReferencePoint] = {
    "Zero": Zero(),
    "BatchMean": BatchMean(),
    "RunningMean": RunningMean(),
    "MismatchedKL": MismatchedKL(),
    "MismatchedKL, not clamped": MismatchedKL(clamp=False),
    "TokenKL": TokenKL(),
    "SampledKL": SampledKL(),
}


@dataclass
class Point:
    """One estimator at one step; nats and seconds."""

    step: int
    estimator: str
    batches: int
    mean: float
    bias: float
    standard_error: float
    spread: float
    seconds: float


@dataclass
class Clock:
    seconds: float = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def sampled_rows(
    policy: Scorer, tokenizer: PreTrainedTokenizerBase, batch: TokenBatch, max_new_tokens: int
) -> TokenBatch:
    """The batch's prompts with completions sampled from the policy, as mismatched rows."""
    rows = batch.select(batch.labels.train.nonzero().squeeze(1))
    both = PolicySamples(policy, tokenizer, max_new_tokens)(rows)
    return both.select(both.labels.mismatched.nonzero().squeeze(1))


class Along(Callback):
    """Measures the estimators at some steps of a run.

    Args:
        steps: optimizer steps after which to measure; 0 is before the first.
        batches: number of batches of training rows for each estimator.
        max_new_tokens: maximum length of a sample, in tokens.
        out: folder for z0.csv.
    """

    def __init__(self, steps: list[int], batches: int, max_new_tokens: int, out: str) -> None:
        self.steps, self.count, self.max_new_tokens, self.out = steps, batches, max_new_tokens, Path(out)
        self.points: list[Point] = []
        self.running = RunningMean()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draws the batches, and measures before the first step."""
        self.batches = list(islice(iter(trainer.datamodule.train_dataloader()), self.count))
        self._measure(pl_module, 0)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: TokenBatch, batch_idx: int) -> None:
        """Shows the running mean every step's rewards, as if it were the reference point."""
        rows = self._rows(pl_module, batch, batch.labels.train)
        self.running.train()(LogRatio()(rows), rows)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Measures after this step if it is one of the chosen steps."""
        self._measure(pl_module, trainer.global_step)

    @staticmethod
    def _rows(module: Any, batch: TokenBatch, chosen: torch.Tensor) -> LogProbBatch:
        return scored_rows(module.scorer, module.models.reference, batch.select(chosen.nonzero().squeeze(1)))

    @staticmethod
    def _compared(module: Any, batch: TokenBatch) -> LogProbBatch:
        """The mismatched rows with their KL divergence, in one pass of each model."""
        rows = batch.select(batch.labels.mismatched.nonzero().squeeze(1))
        ours, theirs, kl = compared_logps(module.scorer, module.models.reference, rows)
        return LogProbBatch(ours, theirs, completion_mask(rows), rows.labels, kl)

    @torch.no_grad()
    def _measure(self, module: Any, step: int) -> None:
        if step not in self.steps or any(point.step == step for point in self.points):
            return
        estimates: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
        clocks = {name: Clock() for name in ("rows", "mismatched", "kl", "samples")}
        oracle: list[float] = []
        with torch.random.fork_rng():
            torch.manual_seed(step)
            for batch in self.batches:
                rows = self._rows(module, batch, batch.labels.train)
                with clocks["mismatched"]():
                    mismatched = self._rows(module, batch, batch.labels.mismatched)
                with clocks["kl"]():
                    with_kl = self._compared(module, batch)
                with clocks["samples"]():
                    sampled = sampled_rows(module.scorer, module.tokenizer, batch, self.max_new_tokens)
                    samples = self._compared(module, sampled)
                assert samples.kl is not None
                oracle.append(float(samples.kl.sum(dim=1).mean()))
                estimators = ESTIMATORS | {"RunningMean": copy.deepcopy(self.running)}
                for name, estimator in estimators.items():
                    inputs = {"TokenKL": with_kl, "SampledKL": samples}.get(
                        name, mismatched if "Mismatched" in name else rows
                    )
                    estimates[name].append(float(estimator(LogRatio()(inputs), inputs).value.mean()))
        n = len(self.batches)
        truth = statistics.mean(oracle)
        cost = {"Mismatched": "mismatched", "TokenKL": "kl", "SampledKL": "samples"}
        for name, values in [*estimates.items(), ("KL of samples (oracle)", oracle)]:
            # Paired by batch: estimator and oracle see the same prompts.
            errors = [value - other for value, other in zip(values, oracle, strict=True)]
            spread = statistics.stdev(values)
            error_sd = statistics.stdev(errors) if values is not oracle else spread
            clock = next((clocks[key] for start, key in cost.items() if name.startswith(start)), Clock())
            seconds = (clock if values is not oracle else clocks["samples"]).seconds / n
            mean = statistics.mean(values)
            self.points.append(Point(step, name, n, mean, mean - truth, error_sd / n**0.5, spread, seconds))
        with (self.out / "z0.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(self.points[0])))
            writer.writeheader()
            writer.writerows(asdict(point) for point in self.points)


def draw(points: list[dict[str, str]], path: Path) -> None:
    """Plots the estimates along the run with their spread, and the oracle as a line."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = list(dict.fromkeys(point["estimator"] for point in points))
    for number, name in enumerate(names):
        series = [point for point in points if point["estimator"] == name]
        oracle = "oracle" in name
        axis.errorbar(
            [float(p["step"]) + (0 if oracle else 0.12 * (number - len(names) / 2)) for p in series],
            [float(p["mean"]) for p in series],
            yerr=None if oracle else [float(p["spread"]) for p in series],
            label=name,
            color="black" if oracle else f"C{number}",
            linewidth=2 if oracle else 1,
            marker="o",
            markersize=3,
            capsize=2,
        )
    axis.set(xlabel="optimizer step", ylabel="z0, nats (bars: one standard deviation over batches)")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 4, 8, 16])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("runs/z0"))
    parser.add_argument("fit_args", nargs="*", help="options for halos fit, after --")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(Path(__file__).parent))
    args.out.mkdir(parents=True, exist_ok=True)
    experiments = Path(__file__).resolve().parents[1]
    words = ["fit"]
    for config in ("base", "ablations/small", "objectives/kto"):
        words += ["--config", os.path.relpath(experiments / f"{config}.yaml")]
    words += ["--data.train", os.path.relpath(experiments / "quickstart" / "feedback.jsonl")]
    words += [f"--run_dir={args.out}/run", "--trainer.callbacks+=z0_estimators.Along"]
    words += [f"--trainer.callbacks.steps={args.steps}", f"--trainer.callbacks.batches={args.batches}"]
    words += [f"--trainer.callbacks.max_new_tokens={args.max_new_tokens}", f"--trainer.callbacks.out={args.out}"]
    halos([*words, f"--trainer.max_steps={max(args.steps)}", *args.fit_args])
    with (args.out / "z0.csv").open(newline="") as file:
        points = list(csv.DictReader(file))
    draw(points, args.out / "z0.png")
    lines = ["| step | estimator | mean, nats | bias | ± (95%) | spread over batches | cost, s |", f"|{'---|' * 7}"]
    for p in points:
        mean, bias, error, spread = (float(p[key]) for key in ("mean", "bias", "standard_error", "spread"))
        lines.append(
            f"| {p['step']} | {p['estimator']} | {mean:.3f} | {bias:+.3f} | {1.96 * error:.3f} | {spread:.3f}"
            f" | {float(p['seconds']):.2f} |"
        )
    (args.out / "z0.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
