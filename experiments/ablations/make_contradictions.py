"""Extracts the preferences in PandaLM's test set on which its three annotators contradict each other.

    .venv/bin/python experiments/ablations/make_contradictions.py testset-v1.jsonl --out runs/pandalm

The file comes from github.com/WeOpenML/PandaLM (Apache-2.0), one row per line, gzipped or not. If the annotators of a
row vote for both responses and none votes for a tie, each vote becomes a pair in votes.jsonl, and the majority's choice
a pair in majority.jsonl, which the study measures against.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any


def pair(row: dict[str, Any], better: int) -> dict[str, str]:
    """One preference, in TRL's columns."""
    prompt = "\n".join(part for part in (row["instruction"], row.get("input") or "") if part.strip())
    return {"prompt": prompt, "chosen": str(row[f"response{better}"]), "rejected": str(row[f"response{3 - better}"])}


def main() -> None:
    """Reads the rows and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/pandalm"))
    args = parser.parse_args()
    read = gzip.decompress(args.file.read_bytes()) if args.file.suffix == ".gz" else args.file.read_bytes()
    rows = [json.loads(line) for line in read.splitlines()]
    votes, majority, skipped = [], [], 0
    for row in rows:
        cast = [row[f"annotator{i}"] for i in (1, 2, 3) if row[f"annotator{i}"] in (1, 2)]
        if len(set(cast)) < 2:
            continue
        responses = (row["response1"], row["response2"])
        if len(cast) < 3 or not all(isinstance(r, str) and r.strip() for r in responses):
            skipped += 1
            continue
        votes += [pair(row, better) for better in cast]
        majority.append(pair(row, max(set(cast), key=cast.count)))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("votes", votes), ("majority", majority)):
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs))
        print(f"{path}: {len(pairs)} pairs")
    print(f"skipped {skipped} of {len(majority) + skipped} contradictory rows, with a tie or an empty response")


if __name__ == "__main__":
    main()
