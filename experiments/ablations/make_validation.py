"""Creates the validation split on which the studies tune: the quickstart's feedback from line 701 on.

    .venv/bin/python experiments/ablations/make_validation.py

Studies train on the first 700 lines (``rows: 700``). Of each later prompt, ``validation.jsonl`` has the first answer
that satisfies the rule and the first that does not; ``validation_prompts.txt`` has these prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRAINED = 700


def main() -> None:
    lines = (HERE.parent / "quickstart" / "feedback.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    trained = {json.dumps(row["prompt"]) for row in rows[:TRAINED]}
    first: dict[str, dict[bool, Any]] = {}
    for row in rows[TRAINED:]:
        key = json.dumps(row["prompt"])
        if key not in trained:
            first.setdefault(key, {}).setdefault(row["label"], row["completion"])
    pairs = [
        {"prompt": json.loads(key), "chosen": sides[True], "rejected": sides[False]}
        for key, sides in first.items()
        if len(sides) == 2
    ]
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (HERE / "validation.jsonl").write_text(text, encoding="utf-8")
    prompts = [pair["prompt"][-1]["content"] for pair in pairs]
    (HERE / "validation_prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    print(f"{len(pairs)} pairs")


if __name__ == "__main__":
    main()
