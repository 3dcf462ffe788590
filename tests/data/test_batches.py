"""Laws of steps and mismatches: what a batch holds depends on seed, epoch and step, and on nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from halos_pl.batch import TokenBatch
from halos_pl.data.batches import StepDataset, TokenizedRow
from halos_pl.data.mismatches import mismatches
from halos_pl.data.order import LENGTH_WINDOW, Order, Step, StepSampler

law = settings(max_examples=60, deadline=None, derandomize=True)
groups = st.lists(st.integers(0, 4), max_size=7)
seeds = st.integers(0, 2**31)


def dataset(
    prompt_of: list[int],
    *,
    pairs: bool = False,
    max_length: int = 16,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> StepDataset:
    """Row i has the prompt [p, p, p] and the completion [100 + i]; pairs are rows 2i and 2i + 1."""
    prompts = sorted(set(prompt_of))
    n = len(prompt_of)
    rows = [
        TokenizedRow(prompts.index(p), 3, (100 + i,), i % 2 == 0, f"f:{i}", i ^ 1 if pairs else -1)
        for i, p in enumerate(prompt_of)
    ]
    examples = [(i, i + 1) for i in range(0, n, 2)] if pairs else [(i,) for i in range(n)]
    return StepDataset(
        [[p] * 3 for p in prompts],
        rows,
        examples,
        max_length=max_length,
        mismatched=True,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def table(batch: TokenBatch) -> list[tuple[tuple[int, ...], tuple[int, ...], bool, bool, str]]:
    """(prompt, completion, desirable, mismatched row, name) of each row."""
    return [
        (
            tuple(batch.prompts[p].tolist()),
            tuple(batch.completions[i].tolist()),
            bool(batch.labels.desirable[i]),
            bool(batch.labels.mismatched[i]),
            batch.row_ids[i],
        )
        for i, p in enumerate(batch.prompt.tolist())
    ]


# Mismatches


@given(prompts=groups, seed=seeds)
@law
def test_mismatches_are_a_permutation_exactly_when_there_is_one(prompts: list[int], seed: int) -> None:
    n = len(prompts)
    partner = mismatches(prompts, Random(seed))
    exists = any(all(prompts[i] != prompts[j] for i, j in enumerate(p)) for p in permutations(range(n)))
    assert (sorted(j for j in partner if j is not None) == list(range(n))) == exists
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partner) if j is not None)


@given(prompts=st.lists(st.integers(0, 5), max_size=40), seed=seeds)
@law
def test_mismatches_are_as_many_as_can_be(prompts: list[int], seed: int) -> None:
    used = [j for j in mismatches(prompts, Random(seed)) if j is not None]
    most = max(Counter(prompts).values(), default=0)
    assert len(used) == len(set(used)) == min(len(prompts), 2 * (len(prompts) - most))


def test_mismatches_are_uniform_over_partners() -> None:
    for prompts in ([0, 1, 2, 3, 4], [0, 0, 1, 1]):
        draws = [mismatches(prompts, Random(seed))[0] for seed in range(4000)]
        others = [j for j, p in enumerate(prompts) if p != prompts[0]]
        counts = Counter(draws)
        assert set(counts) == set(others)
        for j in others:  # four standard deviations
            share = 1 / len(others)
            assert abs(counts[j] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


# Batches


@given(
    prompt_of=st.lists(st.integers(0, 6), min_size=6, max_size=24).filter(lambda p: len(set(p)) > 1),
    batch_size=st.integers(3, 9),
    world_size=st.integers(1, 3),
    pairs=st.booleans(),
    seed=seeds,
)
@law
def test_laws_of_a_step(prompt_of: list[int], batch_size: int, world_size: int, pairs: bool, seed: int) -> None:
    if pairs:
        prompt_of = [p for p in prompt_of for _ in range(2)]
    whole = dataset(prompt_of, pairs=pairs, seed=seed)
    parts = [dataset(prompt_of, pairs=pairs, rank=rank, world_size=world_size, seed=seed) for rank in range(world_size)]
    sampler = StepSampler(Order(len(whole), seed=seed), batch_size=batch_size, world_size=world_size)
    draw = Random(seed)  # and steps of any other sampler, with the same example several times
    others = [Step(0, k, tuple(draw.choices(range(len(whole)), k=draw.randint(world_size, 9)))) for k in range(3)]
    for step in [*sampler, *others]:
        batch = whole[step]
        rows, mismatched = [r for r in table(batch) if not r[3]], [r for r in table(batch) if r[3]]
        # The step's rows, each with one mismatched row that has its prompt and a completion of another.
        assert len(rows) == len(mismatched) == sum(len(whole.examples[e]) for e in step.examples)
        assert Counter(x for x, *_ in rows) == Counter(x for x, *_ in mismatched)
        assert all(prompt_of[y[0] - 100] != x[0] for x, y, *_ in mismatched)
        if 2 * max(Counter(x for x, *_ in rows).values()) <= len(rows):
            assert Counter(y for _, y, *_ in rows) == Counter(y for _, y, *_ in mismatched)
        # Names, labels, paired completions, shared prompts.
        assert all(name == f"f:{y[0] - 100}" and d == (y[0] % 2 == 0) for _, y, d, _, name in rows)
        assert all(name.endswith(f" with f:{y[0] - 100}") and not d for _, y, d, _, name in mismatched)
        assert len(batch.prompts) == len({tuple(p.tolist()) for p in batch.prompts})
        pair_of = batch.labels.pair.tolist()
        for i, pair in enumerate(pair_of):
            assert (pair == -1) == (not pairs or bool(batch.labels.mismatched[i]))
            if pair != -1:
                assert pair_of[pair] == i
                assert abs(int(batch.completions[pair]) - int(batch.completions[i])) == 1
                assert batch.prompt[pair] == batch.prompt[i]
        # Ranks share the step among them and nobody is left without a row.
        shares = [table(part[step]) for part in parts]
        assert all(shares)
        assert Counter(row for share in shares for row in share) == Counter(table(batch))


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=12),
    mismatched=st.booleans(),
    gold=st.booleans(),
    world_size=st.integers(2, 4),
    seed=seeds,
)
@law
def test_no_rank_has_more_than_an_equal_share_and_one_example(
    lengths: list[tuple[int, int]], mismatched: bool, gold: bool, world_size: int, seed: int
) -> None:
    """Counted in the tokens of the batches themselves: distinct prompts as cut, and all completions."""
    prompts = [[i] * length for i, (length, _) in enumerate(lengths)]
    rows = [TokenizedRow(i, p, (9,) * c, True, f"f:{i}") for i, (p, c) in enumerate(lengths)]
    if gold:
        rows = [replace(x, gold=replace(x, completion=(8,) * (1 + i % 5))) if i % 3 else x for i, x in enumerate(rows)]
    options: Any = {"max_length": 12, "mismatched": mismatched, "seed": seed}
    examples = [(i,) for i in range(len(rows))]
    step = Step(0, 0, tuple(range(len(rows))))

    def tokens(batch: TokenBatch) -> int:
        return sum(map(len, batch.prompts)) + sum(map(len, batch.completions))

    every = [StepDataset(prompts, rows, examples, rank=r, world_size=world_size, **options) for r in range(world_size)]
    alone = [StepDataset(prompts, rows, examples, rank=r, world_size=len(rows), **options) for r in range(len(rows))]
    loads = [tokens(dataset[step]) for dataset in every]
    assert max(loads) <= sum(loads) / world_size + max(tokens(dataset[step]) for dataset in alone)


@given(prompts=st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda p: len(set(p)) > 1), seed=seeds)
@law
def test_steps_of_one_row_take_their_mismatched_row_from_the_data_set(prompts: list[int], seed: int) -> None:
    data = dataset(prompts, seed=seed)
    for step in StepSampler(Order(len(prompts), seed=seed), batch_size=1):
        (x, *_), (mismatched_x, mismatched_y, *_) = table(data[step])
        assert x == mismatched_x
        assert prompts[mismatched_y[0] - 100] != x[0]


def test_missing_partners_come_from_outside_the_step_and_are_distinct_where_possible() -> None:
    data = dataset([0] * 6 + [1] * 5)
    for index in range(20):
        mismatched = [r for r in table(data[Step(0, index, (0, 1, 2, 3, 4, 6))]) if r[3]]
        # Row 6 lends its completion once, the rows outside the step once each.
        assert {y[0] - 100 for x, y, *_ in mismatched if x[0] == 0} == {6, 7, 8, 9, 10}


def test_one_prompt_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all 3 rows have the same prompt.*at least two distinct prompts"):
        dataset([1, 1, 1])


def test_a_mismatched_row_fits_the_length() -> None:
    rows = [TokenizedRow(0, 5, (9,), True, "a:1"), TokenizedRow(1, 2, (9, 8, 7, 6), True, "a:2")]
    data = StepDataset([[1, 2, 3, 4, 5], [1, 2]], rows, [(0,), (1,)], max_length=6, mismatched=True)
    by_mismatched: dict[bool, set[object]] = {False: set(), True: set()}
    for x, y, _, mismatched, _ in table(data[Step(0, 0, (0, 1))]):
        by_mismatched[mismatched].add((x, y))
    assert by_mismatched[True] == {((4, 5), (9, 8, 7, 6)), ((1, 2), (9,))}
    assert by_mismatched[False] == {((1, 2, 3, 4, 5), (9,)), ((1, 2), (9, 8, 7, 6))}


def test_mismatches_differ_between_epochs_steps_and_seeds() -> None:
    data, examples = dataset(list(range(20))), tuple(range(20))
    first = table(data[Step(0, 0, examples)])
    assert first == table(data[Step(0, 0, examples)])
    assert first != table(data[Step(1, 0, examples)])
    assert first != table(data[Step(0, 1, examples)])
    assert first != table(dataset(list(range(20)), seed=1)[Step(0, 0, examples)])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_the_same_batches(workers: int) -> None:
    data, sampler = dataset([i // 2 for i in range(22)]), StepSampler(Order(22, seed=3), batch_size=4)
    expected = [data[step] for step in sampler]
    loaded = list(DataLoader(data, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=identity))
    assert [table(batch) for batch in loaded] == [table(batch) for batch in expected]
    for one, two in zip(loaded, expected, strict=True):
        assert [t.dtype for t in one.prompts] == [t.dtype for t in two.prompts]
        assert torch.equal(one.prompt, two.prompt)
        for name, column in vars(one.labels).items():
            other = getattr(two.labels, name)
            assert torch.equal(column, other)
            assert column.dtype == other.dtype


def test_a_large_step_from_a_worker_needs_few_open_files() -> None:
    data = dataset(list(range(3000)))
    loader = DataLoader(
        data, batch_size=None, sampler=StepSampler(Order(3000), batch_size=1500), num_workers=1, collate_fn=identity
    )
    assert [len(batch) for batch in loader] == [3000, 3000]


def identity(batch: TokenBatch) -> TokenBatch:
    return batch


# Steps


@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    world_size=st.integers(1, 4),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=seeds,
)
@law
def test_laws_of_steps(size: int, batch_size: int, world_size: int, shuffle: bool, drop_last: bool, seed: int) -> None:
    def make(seed: int = seed) -> StepSampler:
        order = Order(size, seed=seed, shuffle=shuffle)
        return StepSampler(order, batch_size=batch_size, world_size=world_size, drop_last=drop_last)

    if batch_size < world_size or size < world_size or (drop_last and size < batch_size):
        with pytest.raises(ValueError, match=r"batch_size|too few"):
            make()
        return
    sampler = make()
    steps = list(sampler)
    order = [example for step in steps for example in step.examples]
    assert len(steps) == len(sampler)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert len(set(order)) == len(order) == (size - size % batch_size if drop_last else size)
    assert shuffle or order == sorted(order)
    assert all(len(step.examples) == batch_size for step in steps[:-1]) or size % batch_size < world_size
    assert all(world_size <= len(step.examples) < batch_size + world_size for step in steps)
    # The same again, whatever happened before; another epoch and another seed are other orders.
    assert list(sampler) == steps == list(make())
    sampler.set_epoch(1)
    again = list(sampler)
    assert {step.epoch for step in again} == {1}
    if shuffle and size > 20 and not drop_last:
        assert [e for step in again for e in step.examples] != order
        assert [e for step in make(seed + 1) for e in step.examples] != order
    # A resumed epoch is the rest of the whole one, once.
    sampler.set_epoch(0)
    for start in range(len(steps) + 1):
        sampler.start = start
        assert list(sampler) == steps[start:]
        assert sampler.start == 0
        assert len(sampler) == len(steps)
    assert list(sampler) == steps


def test_seed_and_epoch_are_not_added() -> None:
    one, two = (StepSampler(Order(40, seed=seed), batch_size=40) for seed in (1, 0))
    two.set_epoch(1)
    assert next(iter(one)).examples != next(iter(two)).examples


def test_a_small_tail_joins_the_step_before() -> None:
    for world_size, sizes, merged in ((3, [4, 6], 2), (2, [4, 4, 2], 0)):
        sampler = StepSampler(Order(10), batch_size=4, world_size=world_size)
        assert [len(step.examples) for step in sampler] == sizes
        assert sampler.merged == merged


def test_evaluation_is_the_same_every_epoch() -> None:
    sampler = StepSampler(Order(5, shuffle=False), batch_size=2, same_every_epoch=True)
    before = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == before


def test_an_iterator_keeps_the_epoch_it_was_made_in() -> None:
    sampler = StepSampler(Order(6), batch_size=2)
    steps, waiting = list(sampler), iter(sampler)
    sampler.set_epoch(1)
    assert list(waiting) == steps


# Orders


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), min_size=4, max_size=4),
    seed=seeds,
    epoch=st.integers(0, 3),
    options=st.sets(st.sampled_from(["shuffle", "classes", "lengths"])),
)
@law
def test_an_epoch_has_each_source_as_often_as_its_weight_says(
    sizes: list[int], weights: list[float], seed: int, epoch: int, options: set[str]
) -> None:
    source = np.repeat(np.arange(len(sizes)), sizes)
    n = len(source)
    weights = [w if round(w * size) else 1.0 for size, w in zip(sizes, weights, strict=False)]
    order = Order(
        n,
        seed=seed,
        shuffle="shuffle" in options,
        source=source,
        weights=weights[: len(sizes)],
        classes=np.arange(n) % 2 if "classes" in options else None,
        lengths=np.arange(n) * 7 % 5 if "lengths" in options else None,
        batch_size=3,
    )
    epochs = order(epoch)
    assert epochs == order(epoch)
    assert len(epochs) == len(order)
    count = Counter(epochs)
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=False)):
        each = [count[int(i)] for i in (source == number).nonzero()[0]]
        assert sum(each) == round(weight * size)
        assert max(each) - min(each) <= 1


def test_a_weight_that_leaves_nothing_of_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight 0.05 leaves none of the 8 examples"):
        Order(8, weights=[0.05])


def test_a_half_of_a_source_is_another_half_each_epoch() -> None:
    order = Order(40, weights=[0.5])
    halves = {frozenset(order(epoch)) for epoch in range(6)}
    assert len(halves) == 6
    assert all(len(half) == 20 for half in halves)


@given(classes=st.lists(st.integers(0, 2), min_size=1, max_size=60), batch_size=st.integers(1, 9), seed=seeds)
@law
def test_balanced_steps_have_the_classes_in_the_proportion_of_the_whole(
    classes: list[int], batch_size: int, seed: int
) -> None:
    order = Order(len(classes), seed=seed, classes=np.array(classes))(0)
    assert sorted(order) == list(range(len(classes)))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        step = Counter(classes[i] for i in order[start : start + batch_size])
        for number, count in Counter(classes).items():
            assert abs(step[number] - batch_size * count / len(classes)) < 2


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=80), batch_size=st.integers(1, 9), seed=seeds)
@law
def test_steps_grouped_by_length_are_runs_of_the_sorted_lengths(lengths: list[int], batch_size: int, seed: int) -> None:
    order = Order(len(lengths), seed=seed, lengths=np.array(lengths), batch_size=batch_size)(0)
    assert sorted(order) == list(range(len(lengths)))
    steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if len(lengths) <= LENGTH_WINDOW * batch_size:
        ranges = sorted((min(lengths[i] for i in step), max(lengths[i] for i in step)) for step in steps)
        assert all(low >= high for (_, high), (low, _) in pairwise(ranges))


def test_grouping_by_length_lowers_padding() -> None:
    draw = Random(0)
    lengths = np.array([int(draw.lognormvariate(5, 1)) + 1 for _ in range(2000)])

    def padding(order: list[int]) -> float:
        steps = np.array([lengths[order[i : i + 8]] for i in range(0, 2000, 8)])
        return float(1 - steps.sum() / (steps.max(axis=1) * 8).sum())

    plain, grouped = (padding(Order(2000, lengths=given, batch_size=8)(0)) for given in (None, lengths))
    assert grouped < plain / 4


@pytest.mark.parametrize("lengths", [None, np.arange(10)])
def test_copies_of_an_example_are_not_compared_with_each_other(lengths: Any) -> None:
    """A weight of 2 brings each prompt's rows twice; in one step they are two groups, and rarely in one step."""
    order = Order(10, weights=[2.0], lengths=lengths, batch_size=5)(0)
    steps = [order[i : i + 5] for i in range(0, 20, 5)]
    assert lengths is None or all(len(set(step)) == 5 for step in steps)
    data = StepDataset(
        [[1], [2]], [TokenizedRow(i // 2, 1, (9,), True, f"a:{i}") for i in range(4)], [(0, 1), (2, 3)], max_length=6
    )
    batch = data[Step(0, 0, (0, 1, 0))]
    one, two, three = batch.labels.group.view(3, 2)
    assert [int(pair.unique().numel()) for pair in (one, two, three)] == [1, 1, 1]
    assert len(set(batch.labels.group.tolist())) == 3
    assert batch.prompt.view(3, 2)[0].tolist() == batch.prompt.view(3, 2)[2].tolist()


def test_classes_are_balanced_over_the_whole_epoch_with_lengths_too() -> None:
    """Also where the file has one class after the other."""
    classes, lengths = np.arange(2000) // 1000, np.arange(2000) * 7 % 31
    order = Order(2000, shuffle=False, classes=classes, lengths=lengths, batch_size=8)(0)
    shares = [classes[order[i : i + 8]].sum() for i in range(0, 2000, 8)]
    assert set(shares) == {4}
