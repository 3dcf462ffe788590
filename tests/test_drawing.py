"""Drawing completions of a batch: equal prompts are processed once, and each completion has its own random numbers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from model_families import MODELS
from run_halos import ROOT

from halos_pl.policy.drawing import Decoding, Drawn, SeededChoice, draw, plan_batches

sys.path.insert(0, str(ROOT / "benchmarks"))

import sampling as benchmark

A, B = [5, 9, 11, 7, 8, 31, 2, 40], [3, 4, 9]


def made(name: str = "llama") -> Any:
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    for parameter in model.parameters():  # far from uniform
        parameter.data.mul_(4)
    return model.eval()


def drawn(model: Any, prompts: list[list[int]], seeds: list[int] | None, **how: Any) -> list[Drawn]:
    return draw(model, prompts, [str(i) for i in range(len(prompts))], Decoding((), 0, **how), seeds)


def looped(model: Any, prompt: list[int], new: int) -> list[int]:
    """The likeliest token, again and again: no cache, no padding, one prompt."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_equal_prompts_give_the_answers_of_single_ones(name: str) -> None:
    """Windows of 4 tokens are shorter than the prompt; rows of a batch are repeated unequally often."""
    model = made(name)
    model.generation_config.eos_token_id = None
    rows = drawn(model, [A, B, A, A], [0, 1, 2, 3], max_new_tokens=6, temperature=0.0)
    expected = {8: looped(model, A, 6), 3: looped(model, B, 6)}
    assert [row.ids for row in rows] == [expected[n] for n in (8, 3, 8, 8)]


@pytest.mark.parametrize("seeds", [None, list(range(8))])
def test_equal_prompts_go_through_the_model_once(seeds: list[int] | None) -> None:
    model = made()
    counted: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].numel()))
    drawn(model, [A] * 8, seeds, max_new_tokens=3)
    assert counted[0] == len(A) - 1
    assert sum(counted) <= len(A) - 1 + 8 * 3


def test_a_prompt_of_one_token_has_no_prefix() -> None:
    model = made()
    rows = drawn(model, [[5], A, [5]], [0, 1, 2], max_new_tokens=3, temperature=0.0)
    assert rows[0].ids == rows[2].ids == looped(model, [5], 3)


def test_a_seed_gives_the_same_completion_in_any_batch() -> None:
    model = made()
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.3}
    alone = [drawn(model, [A], [seed], **how)[0].ids for seed in range(6)]
    torch.rand(3)
    together = drawn(model, [B, *[A] * 6], [99, *range(6)], **how)
    assert [row.ids for row in together[1:]] == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_logprobs_are_the_models_at_temperature_1() -> None:
    model = made()
    for temperature in (0.0, 2.0):
        rows = drawn(model, [A, A, B], [1, 2, 3], max_new_tokens=5, temperature=temperature, top_p=0.8)
        for prompt, row in zip((A, A, B), rows, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + row.ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
            assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_end_cuts_tokens_and_logprobs_alike() -> None:
    model = made()
    model.generation_config.eos_token_id = None
    (row,) = drawn(model, [A], [0], max_new_tokens=6, temperature=0.0)
    stop = row.ids[2]
    (cut,) = draw(model, [A], ["a"], Decoding((stop,), 0, 6, 0.0), [0])
    assert cut.ids == row.ids[: row.ids.index(stop) + 1]
    assert cut.logprobs == pytest.approx(row.logprobs[: len(cut.ids)])  # type: ignore[index]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_choices_follow_the_distribution(top_p: float) -> None:
    n = 4000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    choice = SeededChoice(range(n), Decoding((), 0, 1, 0.7, top_p))
    chosen = choice(torch.zeros(n, 1, dtype=torch.long), logits.expand(n, -1)).argmax(-1)
    expected = (logits / 0.7).softmax(-1)
    if top_p < 1:
        expected = torch.where(expected == expected.max(), 1.0, 0.0)  # the first alone has more than 0.6
    share = torch.bincount(chosen, minlength=5) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() <= 4 * error).all()


def test_batches_hold_prompts_of_similar_length() -> None:
    model = made()
    batches = plan_batches(model, [A, B, A, B, A], 4, 2)
    assert [batch.rows for batch in batches] == [[1, 3], [0, 2], [4]]


def test_the_benchmark_compares_equal_answers() -> None:
    model = made()
    model.generation_config.eos_token_id = None
    speeds = benchmark.measure(model, [A, list(reversed(A))], 3, 4, 1)
    assert [len(values) for values in speeds.values()] == [1, 1]
