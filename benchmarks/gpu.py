"""Checks training on a GPU, then measures it beside TRL's. One command, at most 10 minutes, nothing downloaded.

    python benchmarks/gpu.py [--minutes 10] [--variants plain compiled liger] [--json FILE]
    python benchmarks/gpu.py --device cpu --tiny          # tries the script itself, on a machine without a GPU

All models have random weights: one of the shape of SmolLM2-135M, and the largest of a few well-known shapes whose
float32 weights, gradients, AdamW states and reference leave 40% of the card to activations. Both sides train the same
random tokens in bfloat16 (autocast) with fused AdamW. Each side runs in its own process and has the card to itself.

First it checks, and stops at a difference, that
  - rows that share prompts get the log-probs and gradients of rows that are computed separately, on this device, in
    float32 and in bfloat16;
  - both sides compute the same loss and gradient, in float32 on a few rows and in bfloat16 on all.

TRL runs without gradient checkpointing, in bfloat16, with its fused head, FlashAttention and Liger's layer kernels if
they are installed; its padding_free is "temporarily unavailable" in the version that is compared here. Tokens are those
that a step has to process: each distinct prompt once, and every completion. The share of the peak divides the least
FLOP that a step needs (``halos_pl.training.throughput.step_flops``), on both sides, by the data sheet's bfloat16 peak
and by the speed of a large matrix product. Memory is the peak of a process's tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_profile import PLACES, where
from gpu_sides import KINDS, SHAPES, SMALL, Shape, batch_of, filling, model_of, our_side, rows_of, their_side
from vs_trl import CardPeak, Peak, wait

#: Largest relative differences allowed between the two sides, and between shared and separate rows, in float32.
APART = {"float32": 1e-4, "bfloat16": 0.1}

# -- shared and separate rows -------------------------------------------------------------------------------


def check_sharing(device: str) -> dict[str, float]:
    """Compares rows that share prompts with rows that are computed separately, on ``device``.

    Returns:
        Relative differences of log-probs and gradients. In bfloat16, these are the errors of shared rows relative to
        those of separate ones, both against float32.

    Raises:
        SystemExit: at a difference beyond rounding.
    """
    from halos_pl.batch import TokenBatch
    from halos_pl.labels import Labels
    from halos_pl.policy.scorer import Scorer

    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(3, 512, (count,), generator=draw)

    prompts, branches = [70, 5, 33], [3, 1, 2]
    prompt = torch.repeat_interleave(torch.arange(3), torch.tensor(branches)).repeat(2)
    n = len(prompt)
    batch = TokenBatch(
        prompts=[ids(length) for length in prompts],
        completions=[ids(1 + 11 * i % 37) for i in range(n)],
        prompt=prompt,
        labels=Labels(desirable=torch.arange(n) % 2 == 0, mismatched=torch.arange(n) >= n // 2),
    ).to(device)
    model = model_of(Shape(128, 256, 2, 4, 2, 512), device)
    scorers = {name: Scorer(model, prefix_sharing=name) for name in ("never", "always")}

    def measured(name: Any, half: bool) -> list[torch.Tensor]:
        scorer = scorers[name]
        model.set_attn_implementation(scorer.attention if name == "always" else "sdpa")
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logps = scorer(batch)
        logps[: n // 2].sum().backward()
        return [logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]

    def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[float]:
        return [float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True)]

    exact = measured("never", False)
    single = apart(measured("always", False), exact)
    halves = [apart(measured(name, True), exact) for name in ("always", "never")]
    ratios = [shared / separate for shared, separate in zip(*halves, strict=True)]
    names = ("log-probs", "gradients")
    figures = {f"float32, {name}": value for name, value in zip(names, single, strict=True)}
    figures |= {f"bfloat16, error of {name}, ratio": value for name, value in zip(names, ratios, strict=True)}
    if not (max(single) <= 1e-4 and max(ratios) <= 3):
        raise SystemExit(f"rows that share prompts do not get the numbers of separate ones on {device}: {figures}")
    return figures


# -- one side of the comparison ----------------------------------------------------------------------------


def gradient_of(model: Any) -> dict[str, torch.Tensor]:
    """The gradient by parameter, on the CPU; it is reset."""
    gradient = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradient


def side(name: str, shape: Shape, device: str, variant: str, count: int, folder: str) -> dict[str, Any]:
    """All figures of one side: losses and gradients before the first step, then time, memory and a profile.

    Args:
        name: ``ours`` or ``trl``.
        shape: model and rows.
        device: cpu or cuda.
        variant: plain, compiled or liger; TRL takes Liger's kernels wherever they are installed.
        count: completions in a step.
        folder: where the gradients are written, for a model of at most 200 million parameters.
    """
    model, step = (our_side if name == "ours" else their_side)(shape, device, variant, folder)
    result: dict[str, Any] = {"first": {}}
    for kind in KINDS:
        for dtype, rows in (("float32", rows_of(kind, shape, 4)), ("bfloat16", rows_of(kind, shape, count))):
            loss = float(step(kind, rows, dtype == "bfloat16"))
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            result["first"][f"{kind} {dtype}"] = {"loss": loss, "norm": norm}
            if shape.parameters <= 2e8:
                torch.save(gradient_of(model), Path(folder) / f"{name} {kind} {dtype}.pt")
            model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.0, fused=True)
    for kind in KINDS:
        rows = rows_of(kind, shape, count)

        def whole(kind: str = kind, rows: list[dict[str, Any]] = rows) -> float:
            wait(device)
            start = time.perf_counter()
            step(kind, rows, True)
            optimizer.step()
            optimizer.zero_grad()
            wait(device)
            return time.perf_counter() - start

        for _ in range(3):
            whole()
        seconds: list[float] = []
        with CardPeak() if device == "cuda" else Peak() as peak:
            while len(seconds) < 3 or (sum(seconds) < 10 and len(seconds) < 20):
                seconds.append(whole())
        result[kind] = {"seconds": statistics.median(seconds), "steps": len(seconds), "peak": peak.most}
        if name == "ours":
            result[kind]["time"] = where(whole, device)
    return result


# -- the command --------------------------------------------------------------------------------------------


class Bench:
    """Runs the sides as processes within a limit of time.

    Args:
        device: cpu or cuda.
        minutes: limit.
    """

    def __init__(self, device: str, minutes: float) -> None:
        self.device, self._ends, self._longest = device, time.monotonic() + 60 * minutes, 0.0

    def run(self, *words: str) -> dict[str, Any]:
        """The result of a process of this script; ``error`` names the reason if there is none."""
        left = self._ends - time.monotonic()
        if left < max(20.0, self._longest):
            return {"error": "out of time"}
        start = time.monotonic()
        command = [sys.executable, __file__, "--device", self.device, *words]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return {"error": "out of time"}
        self._longest = max(self._longest, time.monotonic() - start)
        answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(answers[-1]) if answers else {"error": "failed; see its messages above"}


def compare(name: str, results: dict[str, dict[str, Any]], folder: str) -> dict[str, float]:
    """Largest relative differences between the first losses and gradients of the two sides.

    Raises:
        SystemExit: at a difference beyond rounding.
    """
    apart: dict[str, float] = {}
    for key, ours in results["ours"]["first"].items():
        theirs = results["trl"]["first"][key]
        apart[f"{key}, loss"] = abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"])
        files = [Path(folder) / f"{side} {key}.pt" for side in ("ours", "trl")]
        if all(file.is_file() for file in files):
            a, b = map(torch.load, files)
            size = max(float(g.abs().max()) for g in b.values())
            apart[f"{key}, gradient"] = max(float((a[k] - g).abs().max()) for k, g in b.items()) / size
        else:
            apart[f"{key}, gradient norm"] = abs(ours["norm"] - theirs["norm"]) / theirs["norm"]
    wrong = {k: v for k, v in apart.items() if not v <= APART["bfloat16" if "bfloat16" in k else "float32"]}
    if wrong:
        raise SystemExit(f"{name}: both sides must compute the same, but they differ: {wrong}")
    return apart


def measure(bench: Bench, name: str, variants: list[str], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of the table for one model; halves the step while a side runs out of memory."""
    from halos_pl.training.throughput import cost, step_flops, step_tokens

    shape, count = SHAPES[name], SHAPES[name].rows
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(4):
            words = ["--model", name, "--rows", str(count), "--folder", folder]
            results = {"ours": bench.run(*words, "--side", "ours", "--variant", variants[0])}
            if find_spec("trl"):
                results["trl"] = bench.run(*words, "--side", "trl")
            if not any(result.get("error") == "out of memory" for result in results.values()):
                break
            count //= 2
        if "trl" not in results:
            print("trl is not installed: no comparison", flush=True)
        elif not any("error" in result for result in results.values()):
            apart = compare(name, results, folder)
            print(f"{name}: largest difference between the sides at first: {max(apart.values()):.0e}", flush=True)
        for variant in variants[1:]:
            results[f"ours, {variant}"] = bench.run(*words, "--side", "ours", "--variant", variant)
    model = cost(model_of(shape, "meta"))
    rows = []
    for side, result in results.items():
        if "error" in result:
            print(f"{name}, {side}: {result['error']}", flush=True)
            continue
        for kind in KINDS:
            batch, figures = batch_of(kind, rows_of(kind, shape, count)), result[kind]
            speed = step_flops(model, batch) / figures["seconds"]
            row = {"model": name, "rows": count, "loss": kind, "side": side, **figures}
            row["tokens_per_second"] = step_tokens(batch) / figures["seconds"]
            row |= {f"of_{peak}": speed / most for peak, most in peaks.items()}
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], peaks: dict[str, float]) -> Iterator[str]:
    """The lines of both tables: speed and memory, then where our time goes."""
    columns = ["model", "completions", "loss", "side", "s/step", "tokens/s", *(f"of {p}" for p in peaks), "GB"]
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for row in rows:
        cells = [row["model"], str(row["rows"]), row["loss"].upper(), row["side"], f"{row['seconds']:.3f}"]
        cells += [f"{row['tokens_per_second']:,.0f}", *(f"{row[f'of_{p}']:.1%}" for p in peaks)]
        cells.append(f"{row['peak'] / 1e9:.1f}")
        yield f"| {' | '.join(cells)} |"
    places = [*PLACES, "other", "idle"]
    yield f"\n| where our time goes | {' | '.join(places)} |\n|{'---|' * (1 + len(places))}"
    for row in (row for row in rows if "time" in row):
        shares = " | ".join(f"{row['time'][place]:.0%}" for place in places)
        yield f"| {row['model']}, {row['loss'].upper()}, {row['side']} | {shares} |"


def peaks_of(device: str) -> dict[str, float]:
    """FLOP/s in bfloat16: the data sheet's, if Lightning knows the card, and a large matrix product's."""
    from lightning.fabric.utilities.throughput import get_available_flops

    from halos_pl.training.throughput import matmul_speed

    sheet = get_available_flops(torch.device(device), torch.bfloat16) if device == "cuda" else None
    measured = matmul_speed(torch.device(device), torch.bfloat16, size=2048 if device == "cuda" else 256)
    return ({"data sheet": float(sheet)} if sheet else {}) | {"matmul": measured}


def child(args: argparse.Namespace) -> dict[str, Any]:
    """The work of a process for one side."""
    if args.side == "check":
        return check_sharing(args.device)
    if args.side == "peaks":
        return peaks_of(args.device)
    try:
        return side(args.side, SHAPES[args.model], args.device, args.variant, args.rows, args.folder)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}


def main(words: list[str] | None = None) -> None:
    """Checks, measures, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two tiny models instead, to try the script")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--variants", nargs="+", choices=["plain", "compiled", "liger"], default=["plain", "compiled"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["check", "peaks", "ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="plain", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu --tiny tries the script itself")
    if args.side:
        print("\n" + json.dumps(child(args)), flush=True)
        return
    bench = Bench(args.device, args.minutes)
    free = torch.cuda.mem_get_info()[0] if args.device == "cuda" else 0
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU: this only tries the script"
    print(f"{card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", flush=True)
    figures = bench.run("--side", "check")
    if "error" in figures:
        raise SystemExit(f"shared and separate rows could not be compared: {figures['error']}")
    print("shared against separate rows: " + ", ".join(f"{k} {v:.1g}" for k, v in figures.items()), flush=True)
    peaks = bench.run("--side", "peaks")
    if "error" in peaks:
        raise SystemExit(f"the speed of a matrix product could not be measured: {peaks['error']}")
    rows: list[dict[str, Any]] = []
    names = ["tiny", "tiny, untied"] if args.tiny else list(dict.fromkeys([SMALL, filling(free)]))
    for name in names:
        rows += measure(bench, name, args.variants, peaks)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("\n".join(["", *table(rows, peaks)]))
    if not rows or not all(math.isfinite(row["seconds"]) for row in rows):
        raise SystemExit("nothing was measured")


if __name__ == "__main__":
    main()
