"""Bias, spread, clamp rate and cost of KTO's estimate of z0 by batch size, at checkpoints of runs.

    python experiments/ablations/z0_bias.py RUN ... --data FILE ... [--checkpoints start last] [--sizes 4 8 16 32 64]
        [--batches 32] [--samples 128] [--out runs/z0_bias.csv]

For each run, checkpoint and data set, KTO's estimate is computed on batches of each size, those that ``halos fit``
would draw from the data: shuffled, each row with a completion of another prompt, over as many epochs as it takes. It is
compared with KL(policy || reference) of answers sampled from the policy to prompts of the same data: exact at each
token, cut off after ``--max_new_tokens``. The reference is the policy before training.

``--checkpoints`` names ``start`` (before training), ``last``, or files in the run's folder ``checkpoints``. To keep
some, train with ``--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint
--trainer.callbacks.every_n_train_steps=16 --trainer.callbacks.save_top_k=-1``.

The CSV has a line for each batch, with the estimate before the clamp, and is written line by line: the same command
resumes it, and larger numbers of batches or samples add to it. The summary of all its lines is printed; without RUN,
nothing else is done.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
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
from halos_pl.training.checkpoint_reading import step_of
from halos_pl.training.named_model import NamedModel, named_model
from halos_pl.training.scored_rows import scored_rows

MISMATCHED, SAMPLES = "mismatched", "samples"
#: Prompts that are answered at a time for the KL divergence.
ANSWERED = 8


@dataclass(frozen=True)
class Group:
    """What is measured on batches of one kind.

    Attributes:
        run: The run's folder.
        step: Optimizer steps before the checkpoint.
        data: The data's file.
        estimator: ``mismatched``, KTO's estimate, or ``samples``, the KL divergence of sampled answers.
        size: Rows of a batch.
        settings: Hash of the weights, the data and all other settings that the values depend on.
    """

    run: str
    step: int
    data: str
    estimator: str
    size: int
    settings: str


@dataclass(frozen=True)
class Line(Group):
    """A line of the CSV.

    Attributes:
        batch: Number of the batch, from 0.
        nats: The estimate, before any clamp.
        seconds: What it took, beyond making the batch.
    """

    batch: int
    nats: float
    seconds: float

    @property
    def group(self) -> Group:
        return Group(**{field.name: getattr(self, field.name) for field in fields(Group)})


class Table:
    """The CSV.

    Raises:
        ValueError: if the file is another kind of file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        names = [field.name for field in fields(Line)]
        header = ",".join(names)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        first = text.partition("\n")[0]
        if first != header and not (first == text and header.startswith(text)):
            raise ValueError(
                f"{path} is not a table of this script: its first line is not {header}; name another --out"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = text[: text.rfind("\n") + 1] or f"{header}\n"  # a killed process may leave a part of a line
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        reader = csv.DictReader(whole.splitlines())
        kinds = {"step": int, "size": int, "batch": int, "nats": float, "seconds": float}
        for row in reader:
            values: dict[str, Any] = {name: kinds.get(name, str)(value) for name, value in row.items()}
            self.lines.append(Line(**values))
        once = {(line.group, line.batch) for line in self.lines}
        if len(once) < len(self.lines):
            raise ValueError(f"{path}: batches were measured twice, as by two processes at a time; name another --out")

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
                f"{self.path}: {group.run}, step {group.step}, {group.data}: measured before with other weights, data"
                " or settings; name another --out"
            )
        done = {line.batch for line in mine}
        return [batch for batch in range(batches) if batch not in done]

    def add(self, line: Line) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(asdict(line).values())
        self.lines.append(line)


class Checkpoint:
    """A run at one of its checkpoints.

    Args:
        run: the run's folder.
        name: ``start``, ``last``, or a file in its folder ``checkpoints``.
    """

    def __init__(self, run: str, name: str) -> None:
        self.run, self.trained = run, name != "start"
        path = None if name in ("start", "last") else str(Path(run) / "checkpoints" / name)
        self.named: NamedModel = named_model(run, path)
        if self.named.ckpt_path is None:
            raise ValueError(f"{run} is a model, not the folder of a run; name a run")
        self.path = self.named.ckpt_path
        self.step = step_of(Path(self.path)) if self.trained else 0
        self.max_length: int = read_yaml(Path(run) / CONFIG)[0]["data"]["max_length"]

    @cached_property
    def digest(self) -> str:
        """A hash of the weights and of what they were trained from."""
        return digest_of(self.path) if self.trained else hashlib.sha256(repr(self.named.spec).encode()).hexdigest()

    @cached_property
    def model(self) -> Evaluation:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return prepared(self.named, trained=self.trained).to(device).eval()


class Batches:
    """Batches of one size of a data set, the same in every process.

    Args:
        checkpoint: the run, for its tokenizer and its treatment of text.
        source: the data's file.
        size: rows of a batch.
        seed: seed of the order and of the mismatches.
    """

    def __init__(self, checkpoint: Checkpoint, source: str, size: int, seed: int) -> None:
        self.data = FeedbackDataModule(
            train=source,
            batch_size=size,
            max_length=checkpoint.max_length,
            drop_last=True,
            seed=seed,
            **checkpoint.named.text,
        )
        self.data.connect(
            tokenizer=checkpoint.named.tokenizer, needs=Needs(mismatched=True, reference=True, undesirable=True)
        )
        self.data.setup("fit")

    def __call__(self, wanted: Sequence[int]) -> Iterator[tuple[int, TokenBatch]]:
        """The batches with these numbers, in ascending order."""
        left, number = set(wanted), 0
        for epoch in count():
            self.data.resume_at(epoch, 0)
            for batch in self.data.train_dataloader():
                if not left:
                    return
                if number in left:
                    left.remove(number)
                    yield number, batch
                number += 1


def estimate(model: Evaluation, batch: TokenBatch) -> float:
    """KTO's estimate of a batch before its clamp, nats."""
    rows = scored_rows(model.scorer, model.reference, batch.select(batch.labels.mismatched_index))  # type: ignore[arg-type]
    return float(MismatchedKL(clamp=False)(LogRatio()(rows), rows).value)


def divergence(model: Evaluation, batch: TokenBatch, max_new_tokens: int) -> float:
    """Mean KL(policy || reference) of answers sampled to a batch's prompts, nats."""
    assert model.reference is not None
    sampled = sampled_rows(model.scorer, model.tokenizer, batch, max_new_tokens)
    return float(completion_kl(model.scorer, model.reference, sampled).sum(dim=1).mean())


@torch.no_grad()
def measure(table: Table, checkpoint: Checkpoint, source: str, args: argparse.Namespace) -> None:
    """Adds what is missing of a checkpoint and a data set."""
    kinds = [(SAMPLES, ANSWERED, math.ceil(args.samples / ANSWERED))]
    kinds += [(MISMATCHED, size, args.batches) for size in args.sizes]
    for estimator, size, number in kinds:
        batches = Batches(checkpoint, source, size, args.seed)
        settings = [checkpoint.digest, *batches.data.digests("train").values(), checkpoint.max_length, args.seed]
        settings += [checkpoint.named.text, args.max_new_tokens if estimator == SAMPLES else None]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        group = Group(checkpoint.run, checkpoint.step, source, estimator, size, digest)
        missing = table.missing(group, number)
        if not missing:
            continue
        print(f"{group.run}, step {group.step}, {source}: {len(missing)} batches of {size}, {estimator}", flush=True)
        model = checkpoint.model
        for place, cpu_batch in batches(missing):
            batch = cpu_batch.to(model.device)
            with torch.random.fork_rng():
                torch.manual_seed(args.seed * 1_000_003 + place)
                start = time.perf_counter()
                sampled = args.max_new_tokens if estimator == SAMPLES else None
                nats = estimate(model, batch) if sampled is None else divergence(model, batch, sampled)
                seconds = time.perf_counter() - start
            if not math.isfinite(nats):
                raise ValueError(f"{checkpoint.path}: {source}, batch {place}: {nats} nats; the policy has diverged")
            table.add(Line(**asdict(group), batch=place, nats=nats, seconds=seconds))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """A mean and its standard error, NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


@dataclass(frozen=True)
class Summary:
    """KTO's estimate on batches of one size; nats and seconds.

    Attributes:
        mean, error: Mean over batches before the clamp, an estimate of E_q[r], and its standard error.
        spread: Standard deviation over batches, before the clamp.
        clamped: Share of batches with a negative estimate.
        used: Mean of max(0, estimate), which training uses.
        surplus: ``used`` - max(0, ``mean``): the upward bias that the clamp adds to batches.
        divergence: KL(policy || reference) of sampled answers; NaN if there are none.
        bias, bias_error: ``used`` - ``divergence``, and its standard error.
        seconds: Median cost.
    """

    batches: int
    mean: float
    error: float
    spread: float
    clamped: float
    used: float
    surplus: float
    divergence: float
    bias: float
    bias_error: float
    seconds: float

    @classmethod
    def of(cls, lines: Sequence[Line], sampled: Sequence[Line]) -> Summary:
        nats = [line.nats for line in lines]
        mean, error = mean_and_error(nats)
        used, of_used = mean_and_error([max(0.0, each) for each in nats])
        truth, of_truth = mean_and_error([line.nats for line in sampled]) if sampled else (math.nan, math.nan)
        return cls(
            batches=len(lines),
            mean=mean,
            error=error,
            spread=error * math.sqrt(len(nats)),
            clamped=sum(each < 0 for each in nats) / len(nats),
            used=used,
            surplus=used - max(0.0, mean),
            divergence=truth,
            bias=used - truth,
            bias_error=math.hypot(of_used, of_truth),
            seconds=statistics.median(line.seconds for line in lines),
        )


def summaries(lines: Iterable[Line]) -> dict[Group, Summary]:
    """The summary of each group of KTO's estimates, in the order of the file."""
    groups: dict[Group, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.group].append(line)
    found = {}
    for group, mine in groups.items():
        if group.estimator == MISMATCHED:
            place = (group.run, group.step, group.data)
            sampled = [g for g in groups if g.estimator == SAMPLES and (g.run, g.step, g.data) == place]
            found[group] = Summary.of(mine, [line for g in sampled for line in groups[g]])
    return found


def markdown(lines: Iterable[Line]) -> Iterator[str]:
    heads = "run | step | data | rows | batches | mean before the clamp | SD | clamped | mean used | surplus | KL"
    yield f"| {heads} | bias (95%) | cost, s |"
    yield f"|{'---|' * (heads.count('|') + 3)}"
    for group, s in summaries(lines).items():
        yield (
            f"| {group.run} | {group.step} | {group.data} | {group.size} | {s.batches}"
            f" | {s.mean:.3f} ± {1.96 * s.error:.3f} | {s.spread:.3f} | {s.clamped:.2f} | {s.used:.3f}"
            f" | {s.surplus:.3f} | {s.divergence:.3f} | {s.bias:+.3f} ± {1.96 * s.bias_error:.3f} | {s.seconds:.2f} |"
        )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs")
    made.add_argument("--data", nargs="+", default=[], help="files with feedback")
    made.add_argument("--checkpoints", nargs="+", default=["start", "last"])
    made.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="rows of a batch")
    made.add_argument("--batches", type=int, default=32, help="batches of each size")
    made.add_argument("--samples", type=int, default=128, help="sampled answers, in batches of 8")
    made.add_argument("--max_new_tokens", type=int, default=48)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("runs/z0_bias.csv"))
    return made


def main(words: Sequence[str] | None = None) -> None:
    args: Any = parser().parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if args.runs and not args.data:
            raise ValueError("no data: name files with feedback with --data")
        table = Table(args.out)
        for run in args.runs:
            for name in args.checkpoints:
                checkpoint = Checkpoint(run, name)
                for source in args.data:
                    measure(table, checkpoint, source, args)
    except (OSError, ValueError) as error:
        sys.exit(f"z0_bias: {error}")
    print("\n".join(markdown(table.lines)))


if __name__ == "__main__":
    main()
