"""Laws of the shares of ranks: each example on one rank, prompts together, about as many tokens each."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from halos_pl.data.shares import shares

law = settings(max_examples=200, deadline=None, derandomize=True)
#: Prompt number and tokens of completions of each example; prompt p has 10 p tokens.
steps = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), min_size=1, max_size=30)


def shared(step: list[tuple[int, int]], ranks: int) -> list[list[int]]:
    group, completions = [p for p, _ in step], [c for _, c in step]
    return shares(group, [{10 * p} for p in group], completions, ranks)


def tokens(step: list[tuple[int, int]], part: list[int]) -> int:
    """Tokens of a rank, which computes a prompt once."""
    return sum(10 * p for p in {step[i][0] for i in part}) + sum(step[i][1] for i in part)


@given(step=steps, ranks=st.integers(1, 8))
@law
def test_laws_of_shares(step: list[tuple[int, int]], ranks: int) -> None:
    parts = shared(step, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(step)))
    assert all(part == sorted(part) for part in parts)
    assert sum(map(bool, parts)) == min(ranks, len(step))
    assert shared(step, ranks) == parts
    # A prompt is on several ranks only if it is larger than an equal share, or for want of prompts.
    loads = [tokens(step, part) for part in parts]
    prompts = {p: tokens(step, [i for i, (q, _) in enumerate(step) if q == p]) for p, _ in step}
    equal = sum(prompts.values()) / ranks
    spread = {p for p in prompts if sum(any(step[i][0] == p for i in part) for part in parts) > 1}
    assert all(prompts[p] > equal for p in spread) or len(prompts) < ranks
    # List scheduling: the rank that got the last unit had the fewest tokens before.
    largest = max([size for p, size in prompts.items() if p not in spread], default=0)
    largest = max([largest, *(10 * p + c for p, c in step if p in spread)])
    repeated = sum(10 * p + c for p, c in step if p in spread) + sum(v for p, v in prompts.items() if p not in spread)
    assert max(loads) <= repeated / ranks + (1 - 1 / ranks) * largest


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=7), ranks=st.integers(1, 3))
@law
def test_distinct_prompts_are_within_a_third_of_the_best(sizes: list[int], ranks: int) -> None:
    """The bound of Graham (1969) for the longest-processing-time rule: 4/3 - 1/(3 ranks)."""
    parts = shares(list(range(len(sizes))), [set()] * len(sizes), sizes, ranks)
    best = min(
        max(sum(size for size, at in zip(sizes, ranks_of, strict=True) if at == rank) for rank in range(ranks))
        for ranks_of in product(range(ranks), repeat=len(sizes))
    )
    assert max(sum(sizes[i] for i in part) for part in parts) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_one_prompt_is_spread_over_all_ranks() -> None:
    assert shares([0] * 4, [{100}] * 4, [10, 20, 30, 40], 2) == [[0, 3], [1, 2]]


def test_an_example_is_never_split() -> None:
    """Also where the others together have fewer tokens."""
    assert shares([0, 1, 2], [{5}] * 3, [1000, 1, 1], 2) == [[0], [1, 2]]
    assert shares([0], [{5}], [10], 3) == [[0], [], []]


def test_a_prompt_that_is_cut_differently_is_computed_once_for_each_length() -> None:
    """The first two examples have 20 tokens, or 29 and so come first."""
    assert shares([0, 0, 1, 2], [{10}, {10}, {21}, {24}], [5, 5, 1, 1], 2) == [[3], [0, 1, 2]]
    assert shares([0, 0, 1, 2], [{10}, {9, 10}, {21}, {24}], [5, 5, 1, 1], 2) == [[0, 1], [2, 3]]
