"""Measures what the checks against silent faults cost in a run, and in writing a checkpoint.

    python benchmarks/guards.py [--baseline cbdf31b] [--steps 50] [--pairs 1] [--saves 5]

Three tables:

1. One run of the quickstart (SmolLM2-135M, LoRA, 8 rows per step) with a timer around each check; shares are of the
   whole process.
2. The same run with this checkout and with an earlier commit, ``--baseline``, in turn; both must log the same losses. A
   run's time varies by a tenth, so this only shows that the timers missed nothing large.
3. A checkpoint of SmolLM2-135M and its AdamW state, 1.6 GB, written in turn by Lightning's writer (then fsync and
   rename) and by ``LastCheckpoint``.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIT = ("base.yaml", "objectives/kto.yaml", "quickstart/quickstart.yaml")
#: Each check with its function.
GUARDS = {
    "the run's folder is locked and writable": "halos_pl.training.run_lock:RunLock.take",
    "config files are read for faults": "halos_pl.cli.configs:check_files",
    "monitored metrics exist": "halos_pl.cli.lightning_cli:check_monitors",
    "the cached tokens are intact (SHA-256)": "halos_pl.data.store:checksums",
    "the converted model is intact (SHA-256)": "halos_pl.policy.source:_intact",
    "all weights were in the files": "halos_pl.policy.loading:check_loaded",
    "the tokenizer's ids have embeddings": "halos_pl.training.models:check_vocabulary",
    "callbacks' states can be loaded": "halos_pl.training.checkpoint:check_callbacks",
    "a signal is checked for after each step": "halos_pl.training.stop_at_step:AgreedSignals.received_sigterm",
    "settings are saved in checkpoints": "halos_pl.training.resume:Record.state",
    "weights are finite before a save": "halos_pl.training.checkpoint_contents:check_finite",
}


def words(run: Path, *more: str) -> list[str]:
    """The command line of a quickstart run."""
    configs = [word for name in FIT for word in ("--config", f"experiments/{name}")]
    return ["fit", *configs, f"--run_dir={run}", "--trainer.enable_progress_bar=false", *more]


def timed(arguments: list[str]) -> None:
    """Runs a command of ``halos`` with a timer around each check; prints the seconds as JSON on the last line."""
    from halos_pl.cli.lightning_cli import HalosCLI

    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)

    def watch(name: str, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start
                calls[name] += 1

        return watched

    for name, place in GUARDS.items():
        module, _, path = place.partition(":")
        *owners, attribute = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        check = vars(owner)[attribute]
        is_property = isinstance(check, property)
        setattr(owner, attribute, property(watch(name, check.fget)) if is_property else watch(name, check))
    HalosCLI(arguments)
    print(json.dumps({name: (seconds[name], calls[name]) for name in GUARDS}))


def fit(code: Path, run: Path, steps: int, *, watched: bool = False) -> tuple[float, float, str]:
    """Runs a fit with the checkout ``code``; returns its wall-clock and CPU time in seconds, and its output."""
    program = [str(Path(__file__).resolve()), "--timed"] if watched else ["-m", "halos_pl"]
    env = {**os.environ, "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1"}
    start, before = time.monotonic(), os.times()
    out = subprocess.run(
        [sys.executable, *program, *words(run, f"--trainer.max_steps={steps}")],
        cwd=code,
        env=env,
        capture_output=True,
        text=True,
    )
    if out.returncode:
        sys.exit(f"the fit with {code} failed:\n{out.stderr[-3000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - start, cpu, out.stdout


def losses(run: Path) -> list[str]:
    """The logged loss of each step."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def guards(steps: int, folder: Path) -> None:
    """Prints table 1."""
    fit(ROOT, folder / "warm", 1)  # fills the caches, which are cold only for the first run
    wall, _, output = fit(ROOT, folder / "watched", steps, watched=True)
    timings = json.loads(output.strip().splitlines()[-1])
    print(f"| check | calls | ms | share of {wall:.0f} s |\n|---|---|---|---|")
    for name, (seconds, calls) in timings.items():
        print(f"| {name} | {calls} | {1000 * seconds:.1f} | {seconds / wall:.3%} |")
    whole = sum(seconds for seconds, _ in timings.values())
    print(f"| together | | {1000 * whole:.0f} | {whole / wall:.2%} |\n", flush=True)


def paired(baseline: str, steps: int, pairs: int, folder: Path) -> None:
    """Prints table 2."""
    code = folder / "baseline"
    add = ["git", "worktree", "add", "--detach", str(code), baseline]
    subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
    try:
        fit(code, folder / "warm_baseline", 1)
        print(f"| pair | {baseline}, s | now, s | ratio | {baseline}, CPU s | now, CPU s | ratio |\n{'|---' * 7}|")
        for pair in range(pairs):
            sides = [("before", code), ("now", ROOT)]
            times = {name: fit(where, folder / f"{name}{pair}", steps) for name, where in sides[:: 1 - 2 * (pair % 2)]}
            if losses(folder / f"before{pair}") != losses(folder / f"now{pair}"):
                sys.exit("the two checkouts logged different losses")
            (a, cpu_a, _), (b, cpu_b, _) = times["before"], times["now"]
            row = [f"{a:.1f}", f"{b:.1f}", f"{b / a:.3f}", f"{cpu_a:.1f}", f"{cpu_b:.1f}", f"{cpu_b / cpu_a:.3f}"]
            print(f"| {pair + 1} | {' | '.join(row)} |", flush=True)
        print()
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(code)], cwd=ROOT, check=True)


def saves(count: int, folder: Path) -> None:
    """Prints table 3."""
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch.callbacks import Callback

    from halos_pl.cli.lightning_cli import HalosCLI
    from halos_pl.training.checkpoint import LastCheckpoint

    times: dict[str, list[float]] = {"before": [], "now": []}

    class Save(Callback):
        """Writes both kinds of checkpoint in turn at the end of training."""

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            checkpoint = next(c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint))
            checkpoint.save(trainer)  # so that both sides replace an existing file
            target = folder / "before.ckpt"

            def before() -> None:
                beside = target.with_name("before.ckpt.part")
                TorchCheckpointIO().save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(False), beside)
                with beside.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(beside, target)

            def now() -> None:
                checkpoint._saved_step = -1  # as if it were another step
                checkpoint.save(trainer)

            for _ in range(count + 1):
                for name, save in (("before", before), ("now", now)):
                    start = time.perf_counter()
                    save()
                    times[name].append(time.perf_counter() - start)

    import_as = sys.modules[__name__]
    import_as.Save = Save  # type: ignore[attr-defined]
    sys.modules.setdefault("guards", import_as)
    words_of_fit = words(folder / "save", "--trainer.max_steps=1", "--trainer.callbacks+=guards.Save")
    os.chdir(ROOT)
    HalosCLI([*words_of_fit, "--model.policy.lora=null", "--model.reference_model=null"])
    size = (folder / "save" / "checkpoints" / "last.ckpt").stat().st_size / 1e9
    before, now = (statistics.median(times[name][1:]) for name in ("before", "now"))
    spread = {name: f"{min(t[1:]):.2f} to {max(t[1:]):.2f}" for name, t in times.items()}
    print(f"| {size:.2f} GB | Lightning | halos_pl | ratio |\n|---|---|---|---|")
    print(f"| seconds, median of {count} | {before:.2f} | {now:.2f} | {now / before:.2f} |")
    print(f"| seconds, range | {spread['before']} | {spread['now']} | |", flush=True)


def main() -> None:
    """Prints the three tables."""
    if sys.argv[1:2] == ["--timed"]:
        timed(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="cbdf31b")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        guards(args.steps, Path(folder))
        if args.pairs:
            paired(args.baseline, args.steps, args.pairs, Path(folder))
        saves(args.saves, Path(folder))


if __name__ == "__main__":
    main()
