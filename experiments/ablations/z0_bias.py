"""KTO's estimate of z0 and the divergence that it stands for, at checkpoints of a study's runs.

    python experiments/ablations/z0_bias.py STUDY/ARM/seed-N ... [--steps 0 16 64] [--blocks 32] [--samples 32]
        [--max_new_tokens 48] [--out runs/z0_bias.csv]

For each run and step, KTO's estimate is computed on blocks of 4 rows: batches of 4 that ``halos fit`` would draw from
the run's own data with its seed, each row with a completion of another prompt. ``z0_summary.py`` composes larger
batches of these blocks, so all batch sizes share the passes. The divergence KL(policy || reference) is that of answers
sampled from the policy to prompts of the same data: exact at each token, cut off after ``--max_new_tokens``. The
reference is the policy before training; its log-probs of the blocks come from the reference store, so that the runs
share them.

Step 0 is before training. For the others, ``checkpoints`` in the run's folder has a file that ends in ``step=N.ckpt``;
the study ``ablations/z0`` keeps them.

The CSV has a line for each block and each batch of answers, with the mean before any clamp, and is written line by
line: the same command resumes it, and more blocks, samples, steps or runs add to it. Seconds are of the CPU, all
threads together, so other processes do not count: for a block, of the policy's pass; for answers, of generation and
comparison.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from z0_estimators import sampled_rows

from halos_pl.batch import Needs, TokenBatch
from halos_pl.common.yaml_files import read_yaml
from halos_pl.data import FeedbackDataModule
from halos_pl.evaluation.arguments import digest_of
from halos_pl.evaluation.held_out import Evaluation, prepared
from halos_pl.objective.reference_points import MismatchedKL
from halos_pl.objective.rewards import LogRatio
from halos_pl.policy.kl import completion_kl
from halos_pl.run_dir import CONFIG
from halos_pl.training.named_model import NamedModel, named_model
from halos_pl.training.scored_rows import scored_rows

MISMATCHED, SAMPLES = "mismatched", "samples"
#: Rows of a block, the smallest batch.
BLOCK = 4
#: Prompts that are answered at a time for the KL divergence.
ANSWERED = 16
#: Settings of the data that do not decide its rows, or are set or hashed here.
ELSEWHERE = {"train", "validation", "test", "predict", "batch_size", "eval_batch_size", "num_workers", "cache_dir"}


@dataclass(frozen=True)
class Group:
    """What is measured on batches of one kind.

    Attributes:
        data: The files of the run's training data.
        arm: The run's arm: the folder above it.
        seed: The run's seed.
        step: Optimizer steps before the checkpoint.
        estimator: ``mismatched``, KTO's estimate, or ``samples``, the KL divergence of sampled answers.
        settings: Hash of the weights, the data and all other settings that the values depend on.
    """

    data: str
    arm: str
    seed: int
    step: int
    estimator: str
    settings: str


@dataclass(frozen=True)
class Line(Group):
    """A line of the CSV.

    Attributes:
        batch: Number of the block or of the batch of answers, from 0.
        nats: Its mean, before any clamp.
        seconds: CPU time that it took, beyond making the batch.
    """

    batch: int
    nats: float
    seconds: float

    @property
    def group(self) -> Group:
        return Group(**{field.name: getattr(self, field.name) for field in fields(Group)})


def lines_of(text: str) -> list[Line]:
    """The lines of a CSV.

    Raises:
        ValueError: if it is another kind of file, or a batch has two lines.
    """
    rows = list(csv.DictReader(text.splitlines()))
    if text.partition("\n")[0] != HEADER:
        raise ValueError(f"is not a table of z0_bias.py: its first line is not {HEADER}")
    kinds: dict[str, Any] = {"seed": int, "step": int, "batch": int, "nats": float, "seconds": float}
    lines = [Line(**{name: kinds.get(name, str)(value) for name, value in row.items()}) for row in rows]
    if len({(line.group, line.batch) for line in lines}) < len(lines):
        raise ValueError("has batches that were measured twice, as by two processes at a time")
    return lines


HEADER = ",".join(field.name for field in fields(Line))


class Table:
    """The CSV that is written.

    Raises:
        ValueError: if the file is another kind of file, or has a batch twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed process may leave a part of a line
        if not whole and HEADER.startswith(text):
            whole = f"{HEADER}\n"
        try:
            self.lines = lines_of(whole or text)
        except ValueError as error:
            raise ValueError(f"{path} {error}; name another --out") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def missing(self, group: Group, batches: int) -> list[int]:
        """The batches of a group that are not in the file.

        Raises:
            ValueError: if the file has lines of this group with other settings.
        """
        mine = [
            line for line in self.lines if {**asdict(line.group), "settings": ""} == {**asdict(group), "settings": ""}
        ]
        if any(line.settings != group.settings for line in mine):
            raise ValueError(
                f"{self.path}: {group.data}, {group.arm}, seed {group.seed}, step {group.step}: measured before with"
                " other weights, data or settings; name another --out"
            )
        done = {line.batch for line in mine}
        return [batch for batch in range(batches) if batch not in done]

    def add(self, line: Line) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(asdict(line).values())
        self.lines.append(line)


class Checkpoint:
    """A run after some steps.

    Args:
        run: the run's folder.
        step: optimizer steps; 0 for before training.

    Raises:
        ValueError: if it is no run, or has no checkpoint of that step, or several.
    """

    def __init__(self, run: str, step: int) -> None:
        self.run, self.step = run, step
        found = [str(path) for path in Path(run, "checkpoints").glob(f"*step={step}.ckpt")] if step else []
        self.named: NamedModel = named_model(run, found[0] if found else None)
        if self.named.ckpt_path is None:
            raise ValueError(f"{run} is a model, not the folder of a run; name a run")
        if step and len(found) != 1:
            raise ValueError(f"{run}/checkpoints has {len(found)} files *step={step}.ckpt; it must have one")
        config = read_yaml(Path(run) / CONFIG)[0]
        self.seed: int = config["seed_everything"]
        self.settings: dict[str, Any] = config["data"]

    @cached_property
    def digest(self) -> str:
        """A hash of the weights and of what they were trained from."""
        of_start = hashlib.sha256(repr(self.named.spec).encode()).hexdigest()
        return digest_of(self.named.ckpt_path) if self.step and self.named.ckpt_path else of_start

    @cached_property
    def model(self) -> Evaluation:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return prepared(self.named, trained=self.step > 0, stored=True).to(device).eval()

    def data(self, size: int) -> FeedbackDataModule:
        """The run's data as single rows, ready to draw batches of this size."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(FeedbackDataModule, "data")
        seed = self.seed if self.settings["seed"] is None else self.settings["seed"]
        settings = {**deepcopy(self.settings), "batch_size": size, "drop_last": True, "seed": seed}
        data: FeedbackDataModule = parser.instantiate_classes(parser.parse_object({"data": settings})).data
        data.connect(tokenizer=self.named.tokenizer, needs=Needs(mismatched=True, reference=True, undesirable=True))
        data.setup("fit")
        return data


def batches(data: FeedbackDataModule, wanted: Sequence[int]) -> Iterator[tuple[int, TokenBatch]]:
    """The training batches with these numbers, in ascending order, over as many epochs as it takes."""
    left, number = set(wanted), 0
    for epoch in count():
        data.resume_at(epoch, 0)
        for batch in data.train_dataloader():
            if not left:
                return
            if number in left:
                left.remove(number)
                yield number, batch
            number += 1


def estimate(model: Evaluation, batch: TokenBatch) -> tuple[float, float]:
    """KTO's estimate of a batch before its clamp, nats, and the CPU seconds of the policy's pass."""
    assert model.reference is not None
    rows = batch.select(batch.labels.mismatched_index)
    reference_logps = model.reference.logps(rows)  # type: ignore[attr-defined]
    start = time.process_time()
    scored = scored_rows(model.scorer, None, rows, reference_logps=reference_logps)
    nats = float(MismatchedKL(clamp=False)(LogRatio()(scored), scored).value)
    return nats, time.process_time() - start


def divergence(model: Evaluation, batch: TokenBatch, max_new_tokens: int) -> tuple[float, float]:
    """Mean KL(policy || reference) of answers sampled to a batch's prompts, nats, and its CPU seconds."""
    assert model.reference is not None
    start = time.process_time()
    sampled = sampled_rows(model.scorer, model.tokenizer, batch, max_new_tokens)
    nats = float(completion_kl(model.scorer, model.reference, sampled).sum(dim=1).mean())
    return nats, time.process_time() - start


@torch.no_grad()
def measure(table: Table, checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Adds what is missing of a checkpoint."""
    kinds = ((SAMPLES, ANSWERED, math.ceil(args.samples / ANSWERED)), (MISMATCHED, BLOCK, args.blocks))
    for estimator, size, number in kinds:
        data = checkpoint.data(size)
        deciding = {name: value for name, value in checkpoint.settings.items() if name not in ELSEWHERE}
        settings = [checkpoint.digest, list(data.digests("train").values()), deciding, size]
        settings += [args.max_new_tokens if estimator == SAMPLES else None]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        files = ", ".join(Path(source.path).name for source in data.sources["train"])
        arm = Path(checkpoint.run).resolve().parent.name
        group = Group(files, arm, checkpoint.seed, checkpoint.step, estimator, digest)
        missing = table.missing(group, number)
        if not missing:
            continue
        print(f"{checkpoint.run}, step {group.step}: {len(missing)} batches of {size}, {estimator}", flush=True)
        model = checkpoint.model
        for place, cpu_batch in batches(data, missing):
            batch = cpu_batch.to(model.device)
            with torch.random.fork_rng():
                torch.manual_seed(checkpoint.seed * 1_000_003 + place)
                sampled = args.max_new_tokens if estimator == SAMPLES else None
                nats, seconds = estimate(model, batch) if sampled is None else divergence(model, batch, sampled)
            if not math.isfinite(nats):
                path = checkpoint.named.ckpt_path
                raise ValueError(f"{path}: batch {place} has {nats} nats; the policy has diverged")
            table.add(Line(**asdict(group), batch=place, nats=nats, seconds=seconds))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    made.add_argument("--steps", type=int, nargs="+", default=[0, 16, 64])
    made.add_argument("--blocks", type=int, default=32, help="blocks of 4 rows")
    made.add_argument("--samples", type=int, default=32, help="sampled answers, in batches of 16")
    made.add_argument("--max_new_tokens", type=int, default=48)
    made.add_argument("--out", type=Path, default=Path("runs/z0_bias.csv"))
    return made


def main(words: Sequence[str] | None = None) -> None:
    args: Any = parser().parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        table = Table(args.out)
        for run in args.runs:
            for step in args.steps:
                measure(table, Checkpoint(run, step), args)
    except (OSError, ValueError) as error:
        sys.exit(f"z0_bias: {error}")


if __name__ == "__main__":
    main()
