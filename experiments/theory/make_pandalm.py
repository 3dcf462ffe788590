"""Writes PandaLM's human votes as preferences for the sweeps of this folder.

    python experiments/theory/make_pandalm.py testset-v1.jsonl --out runs/pandalm_candidates

The file comes from github.com/WeOpenML/PandaLM (Apache-2.0), one row per line, gzipped or not; three annotators vote
for a response or a tie. Each row with more votes for one response than for the other becomes a preference of the
majority: in train.jsonl for every other prompt, in held_out.jsonl for the rest, so that they share no prompt. Rows with
two votes against one become three preferences in votes.jsonl and one in majority.jsonl; of these, only the first row of
a prompt is kept, as a prompt's rows are not independent.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any


def pair(row: dict[str, Any], better: int) -> dict[str, str]:
    """One preference, in TRL's columns."""
    prompt = "\n".join(part for part in (row["instruction"], row.get("input") or "") if part.strip())
    return {"prompt": prompt, "chosen": str(row[f"response{better}"]), "rejected": str(row[f"response{3 - better}"])}


def main() -> None:
    """Reads the rows and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/pandalm_candidates"))
    args = parser.parse_args()
    read = gzip.decompress(args.file.read_bytes()) if args.file.suffix == ".gz" else args.file.read_bytes()
    files: dict[str, list[dict[str, str]]] = {name: [] for name in ("train", "held_out", "votes", "majority")}
    numbers: dict[str, int] = {}
    contradicted: set[str] = set()
    skipped = repeated = 0
    for row in map(json.loads, read.splitlines()):
        responses = row["response1"], row["response2"]
        votes = Counter(row[f"annotator{i}"] for i in (1, 2, 3))
        usable = responses[0] != responses[1] and all(isinstance(each, str) and each.strip() for each in responses)
        if not usable or votes[1] == votes[2]:
            skipped += 1
            continue
        better = 1 if votes[1] > votes[2] else 2
        majority = pair(row, better)
        prompt = majority["prompt"]
        files["held_out" if numbers.setdefault(prompt, len(numbers)) % 2 else "train"].append(majority)
        if votes[better] == 2 and votes[3 - better] == 1:
            if prompt in contradicted:
                repeated += 1
                continue
            contradicted.add(prompt)
            files["majority"].append(majority)
            files["votes"] += [majority, majority, pair(row, 3 - better)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, pairs in files.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in pairs), encoding="utf-8")
        print(f"{path}: {len(pairs)} preferences about {len({each['prompt'] for each in pairs})} prompts")
    print(f"skipped {skipped} rows without a majority or two responses, and {repeated} more contradictions of a prompt")


if __name__ == "__main__":
    main()
