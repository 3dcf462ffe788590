"""Data for objectives that compare the completions of a prompt: rows with nothing to compare, and scores."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
from data_modules import set_up
from hypothesis import given
from hypothesis import strategies as st
from make_tables import singles

from halos_pl.batch import Needs
from halos_pl.data.example import DataError
from halos_pl.data.split import Split

GROUPS = Needs(groups=True, undesirable=True)


@given(prompts=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_rows_alone_with_their_prompt_are_counted_and_refused_if_all_are(prompts: list[int]) -> None:
    split = Split(singles([1] * len(prompts), prompts), GROUPS, max_length=10)
    [counts] = split.counts.values()
    assert counts.alone == list(Counter(prompts).values()).count(1)
    with nullcontext() if len({*prompts}) < len(prompts) else pytest.raises(DataError, match=r"^f\.jsonl:1: "):
        split.check_groups()


def test_only_training_data_need_something_to_compare() -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i > 0} for i in range(3)]
    with pytest.raises(DataError, match="only one"):
        set_up(GROUPS, train=rows)
    set_up(GROUPS, train=[*rows, {**rows[0], "completion": "other"}], validation=rows)
    set_up(Needs(undesirable=True), train=rows)


@pytest.mark.parametrize("needs", [Needs(scores=True, undesirable=True), Needs(scores=True, groups=True)])
def test_rows_without_scores_are_not_told_to_be_pairs(needs: Needs) -> None:
    with pytest.raises(DataError, match=r"^f\.jsonl:2: .*score") as said:
        Split(singles([1, 0], [0, 0], [0.5, float("nan")]), needs, max_length=10)
    assert "chosen" not in str(said.value)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_score_that_does_not_fit_is_named_and_not_another_of_its_prompt(place: int) -> None:
    scores = [0.5] * 3
    scores[place] = 1e300
    with pytest.raises(DataError, match=rf"^f\.jsonl:{place + 1}: "):
        Split(singles([1] * 3, [0] * 3, scores), GROUPS, max_length=10)
