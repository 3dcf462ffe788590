"""Laws of the transforms: what they keep, what they change, and that they say how much."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_tables import pairs, singles, store, table

from halos_pl.data.table import COLUMNS, Table
from halos_pl.data.transforms import (
    Contradict,
    FlipLabels,
    KeepFraction,
    OnePerPrompt,
    Pair,
    ThresholdScores,
    Transform,
    Unpair,
    _pairs,
)

shares = st.floats(0, 1)
labels = st.lists(st.integers(0, 1), min_size=1, max_size=30)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def tables(draw: Any) -> Table:
    """Single rows and pairs, some of them scored, several to a prompt."""
    rows: list[tuple[int, int, float, int]] = []
    for paired in draw(st.lists(st.booleans(), min_size=1, max_size=12)):
        prompt, first = draw(st.integers(0, 5)), len(rows)
        score = draw(st.sampled_from([np.nan, 1.0, 2.0, 3.5]))
        if paired:
            rows += [(prompt, 1, score, first + 1), (prompt, 0, np.nan, first)]
        else:
            rows.append((prompt, draw(st.integers(0, 1)), score, -1))
    return table(rows)


def names(made: Table) -> list[str]:
    return [made.name(i) for i in range(len(made))]


def consistent(made: Table) -> None:
    """Paired completions name each other, are of the same prompt and of opposite labels."""
    own = (made.pair >= 0).nonzero()[0]
    assert np.array_equal(made.pair[made.pair[own]], own)
    assert np.array_equal(made.prompt[made.pair[own]], made.prompt[own])
    assert np.array_equal(made.label[made.pair[own]], 1 - made.label[own])


EVERY = [
    KeepFraction(desirable=0.5, undesirable=0.3),
    OnePerPrompt(),
    FlipLabels(share=0.4),
    Contradict(share=0.4),
    ThresholdScores(),
    ThresholdScores(at=2.0, relabel=False),
    Unpair(),
    Pair(),
    Pair(which="all"),
]


@pytest.mark.parametrize("transform", EVERY, ids=lambda t: type(t).__name__)
@given(given_table=tables(), seed=seeds)
def test_laws_of_every_transform(transform: Transform, given_table: Table, seed: int) -> None:
    before = {name: getattr(given_table, name).copy() for name in COLUMNS}
    made, counts = transform(given_table, Random(seed))
    again, _ = transform(given_table, Random(seed))
    for name in COLUMNS:  # the input is left alone, and the seed decides
        assert np.array_equal(getattr(given_table, name), before[name], equal_nan=name == "score")
        assert np.array_equal(getattr(made, name), getattr(again, name), equal_nan=name == "score")
    consistent(made)
    assert set(made.row) <= set(given_table.row)
    assert all(isinstance(number, int) and number >= 0 for number in counts.values())


@given(judged=labels, desirable=shares, undesirable=shares, seed=seeds)
def test_a_fraction_is_kept_of_each_class(judged: list[int], desirable: float, undesirable: float, seed: int) -> None:
    made, counts = KeepFraction(desirable=desirable, undesirable=undesirable)(singles(judged), Random(seed))
    had, has = Counter(judged), Counter(made.label.tolist())
    assert has[1] == round(desirable * had[1])
    assert has[0] == round(undesirable * had[0])
    assert counts == {"dropped_desirable": had[1] - has[1], "dropped_undesirable": had[0] - has[0]}
    assert made.row.tolist() == sorted(made.row.tolist())


def test_which_rows_are_kept_depends_on_the_seed() -> None:
    kept = {tuple(KeepFraction(desirable=0.5)(singles([1] * 20), Random(seed))[0].row) for seed in range(20)}
    assert len(kept) == 20


@given(prompts=st.lists(st.integers(0, 4), min_size=1, max_size=20), seed=seeds)
def test_one_row_of_each_prompt(prompts: list[int], seed: int) -> None:
    made, counts = OnePerPrompt()(singles([1] * len(prompts), prompts), Random(seed))
    assert len(set(made.prompt.tolist())) == len(made) == len(set(prompts))
    assert counts == {"dropped": len(prompts) - len(made)}


@given(judged=labels, share=shares, seed=seeds)
def test_labels_are_flipped_in_just_that_share(judged: list[int], share: float, seed: int) -> None:
    given_table = singles(judged)
    made, counts = FlipLabels(share=share)(given_table, Random(seed))
    assert counts["flipped"] == int((made.label != given_table.label).sum()) == round(share * len(judged))


@given(count=st.integers(1, 12), share=shares, seed=seeds)
def test_a_pair_is_flipped_as_one(count: int, share: float, seed: int) -> None:
    given_table = pairs(count)
    made, counts = FlipLabels(share=share)(given_table, Random(seed))
    changed = made.label != given_table.label
    assert np.array_equal(changed, changed[made.pair])
    assert counts["flipped"] == int(changed.sum()) // 2 == round(share * count)


@given(judged=labels, share=shares, seed=seeds)
def test_a_contradiction_is_the_same_row_with_the_other_label(judged: list[int], share: float, seed: int) -> None:
    given_table = singles(judged)
    made, counts = Contradict(share=share)(given_table, Random(seed))
    n = len(judged)
    assert counts["added"] == len(made) - n == round(share * n)
    assert np.array_equal(made.label[:n], given_table.label)
    for i in range(n, len(made)):
        assert made.label[i] == 1 - given_table.label[made.row[i]]
        assert made.name(i) == given_table.name(int(made.row[i])) + "#contradicted"


def test_a_contradiction_of_a_pair_is_a_pair() -> None:
    made, counts = Contradict(share=1.0)(pairs(3), Random(0))
    assert counts["added"] == 6
    consistent(made)
    assert (made.pair >= 0).all()


def test_scores_of_flipped_rows_are_mirrored_within_their_prompt() -> None:
    given_table = singles([1, 1, 0, 1], [0, 0, 0, 1], [5.0, 4.0, 1.0, 7.0])
    made, _ = FlipLabels(share=1.0)(given_table, Random(0))
    assert made.score.tolist() == [1.0, 2.0, 5.0, 7.0]


@given(scores=st.lists(st.floats(-5, 5), min_size=1, max_size=20), at=st.floats(-5, 5))
def test_a_fixed_threshold_counts_as_desirable(scores: list[float], at: float) -> None:
    made, counts = ThresholdScores(at=at)(singles([-1] * len(scores), scores=scores), Random(0))
    assert made.label.tolist() == [int(score >= at) for score in scores]
    assert counts["desirable"] + counts["undesirable"] == len(scores)


@pytest.mark.parametrize(("at", "middle"), [("prompt_mean", np.mean), ("prompt_median", np.median)])
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20))
def test_a_threshold_by_prompt(at: Any, middle: Any, rows: list[tuple[int, int]]) -> None:
    prompts, scores = [p for p, _ in rows], [float(s) for _, s in rows]
    made, counts = ThresholdScores(at=at)(singles([-1] * len(rows), prompts, scores), Random(0))
    bound = {p: middle([s for q, s in rows if q == p]) for p in set(prompts)}
    expected = [(i, int(s > bound[p])) for i, (p, s) in enumerate(rows) if s != bound[p]]
    assert list(zip(made.row.tolist(), made.label.tolist(), strict=True)) == expected
    assert counts["dropped_at_threshold"] == len(rows) - len(expected)


@pytest.mark.parametrize("at", ["prompt_mean", "prompt_median"])
@pytest.mark.parametrize("scores", [[0.1] * 3, [0.7] * 3, [1e-9] * 7])
def test_equal_scores_say_nothing(at: Any, scores: list[float]) -> None:
    """Their rounded mean lies above or below all of them."""
    made, counts = ThresholdScores(at=at)(singles([-1] * len(scores), [0] * len(scores), scores), Random(0))
    assert (len(made), counts["dropped_at_threshold"]) == (0, len(scores))
    made, _ = ThresholdScores(at="prompt_mean")(singles([-1] * 3, [0] * 3, [0.1, 0.2, 0.3]), Random(0))
    assert made.label.tolist() == [0, 1]
    kept, _ = ThresholdScores(at=at, drop_ties=False)(singles([-1] * len(scores), [0] * len(scores), scores), Random(0))
    assert kept.label.tolist() == [0] * len(scores)


def test_a_contradicted_score_is_mirrored_within_all_of_its_prompt() -> None:
    given_table = singles([1, 0], [0, 0], [9.0, 1.0])
    for seed in range(4):
        made, _ = Contradict(share=0.5)(given_table, Random(seed))
        assert made.score[2] == {0: 1.0, 1: 9.0}[int(made.row[2])]


def test_a_label_is_never_weighed_against_a_score() -> None:
    made, _ = Pair()(singles([1, 0], [0, 0], [np.nan, 7.0]), Random(0))
    assert made.row.tolist() == [0, 1]  # the desirable row is the chosen one, whatever the other's reward was


def test_labels_stay_unless_they_are_to_be_decided_anew() -> None:
    given_table = singles([0, -1], [0, 0], [9.0, 1.0])
    assert ThresholdScores(at=2.0)(given_table, Random(0))[0].label.tolist() == [0, 0]
    assert ThresholdScores(at=2.0, relabel=True)(given_table, Random(0))[0].label.tolist() == [1, 0]


def test_unpair_and_pair_are_inverse_where_a_prompt_has_one_pair() -> None:
    apart, counts = Unpair()(pairs(4), Random(0))
    assert counts == {"unpaired": 4}
    assert (apart.pair == -1).all()
    again, counts = Pair()(apart, Random(0))
    assert counts == {"pairs": 4, "dropped_without_partner": 0}
    for name in COLUMNS:
        assert np.array_equal(getattr(again, name), getattr(pairs(4), name), equal_nan=name == "score")


def test_pairs_of_very_many_equal_rows_are_looked_for_only_once() -> None:
    """By the count of comparisons, and not by the clock: of n equal rows there are n^2 / 2 pairs to no avail."""
    compared = 0

    class Text(list[int]):
        def __getitem__(self, place: Any) -> Any:
            nonlocal compared
            compared += 1
            return super().__getitem__(place)

    n = 20_000
    worth = dict.fromkeys(range(n), 1.0)
    assert list(_pairs(list(range(n)), worth, Text(range(n)), worst_first=True)) == []  # type: ignore[arg-type]
    assert compared == 0
    worth[n - 1] = 0.0
    found = _pairs(list(range(n)), worth, Text(range(n)), worst_first=True)  # type: ignore[arg-type]
    assert next(found) == (0, n - 1)
    assert compared == 2


@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=15))
def test_pairs_are_of_a_higher_and_a_lower_score(rows: list[tuple[int, int]]) -> None:
    given_table = singles([-1] * len(rows), [p for p, _ in rows], [float(s) for _, s in rows])
    everything, counts = Pair(which="all")(given_table, Random(0))
    expected = {(i, j) for i, (p, s) in enumerate(rows) for j, (q, t) in enumerate(rows) if p == q and s > t}
    chosen = everything.label == 1
    found = list(zip(everything.row[chosen].tolist(), everything.row[everything.pair[chosen]].tolist(), strict=True))
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert counts["dropped_without_partner"] == len(rows) - len({i for pair in expected for i in pair})
    best, _ = Pair()(given_table, Random(0))
    for i, j in zip(best.row[best.label == 1], best.row[best.label == 0], strict=True):
        own = [s for p, s in rows if p == rows[i][0]]
        assert (rows[i][1], rows[j][1]) == (max(own), min(own))


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepFraction(desirable=1.5),
        lambda: FlipLabels(share=-0.1),
        lambda: Contradict(share=2),
        lambda: ThresholdScores(at="mean"),  # type: ignore[arg-type]
        lambda: Pair(which="best"),  # type: ignore[arg-type]
    ],
)
def test_numbers_out_of_range_and_unknown_words_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^(KeepFraction|FlipLabels|Contradict|ThresholdScores|Pair): "):
        make()


# Tables


@given(given_table=tables(), data=st.data())
def test_a_selection_keeps_what_is_in_it(given_table: Table, data: Any) -> None:
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(given_table), max_size=len(given_table))))
    made = given_table.select(kept)
    consistent(made)
    assert made.row.tolist() == given_table.row[kept].tolist()
    both = {i for i in kept.nonzero()[0] if given_table.pair[i] >= 0 and kept[given_table.pair[i]]}
    assert int((made.pair >= 0).sum()) == len(both)


def test_equal_prompts_of_two_sources_are_one_prompt() -> None:
    both = Table.of([store([(7, 1, np.nan, -1), (3, 0, np.nan, -1)], "a"), store([(3, 1, np.nan, -1)], "b")])
    assert both.prompt.tolist() == [0, 1, 1]
    assert both.prompt_ids(1).tolist() == [1003]
    assert names(both) == ["a:1", "a:2", "b:1"]
    assert both.prompt_length.tolist() == [2, 1, 1]
    assert [both.completion_ids(i).tolist() for i in range(3)] == [[0], [1, 1], [0]]


def test_no_rows() -> None:
    assert len(Table.of([store([])])) == 0
