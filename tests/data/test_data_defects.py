"""Defects of other libraries' data paths, each as a law that ours keeps; numbered as in the list they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_modules import DPO, KTO, SFT, binary, pairs, set_up, text, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from run_halos import write_jsonl

from halos_pl.batch import TokenBatch
from halos_pl.data import DataError

law = settings(max_examples=25, deadline=None, derandomize=True)


def mismatched(batch: TokenBatch) -> list[tuple[str, str]]:
    """(prompt, completion) of the mismatched rows."""
    places = batch.labels.mismatched.nonzero().squeeze(1).tolist()
    return [(text(batch.prompts[int(batch.prompt[i])]), text(batch.completions[i])) for i in places]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("defects")


@given(
    size=st.integers(2, 23),
    batch_size=st.integers(1, 9),
    eval_batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    world_size=st.integers(1, 2),
    epoch=st.integers(0, 3),
)
@law
def test_defects_1_and_2_a_row_never_meets_its_own_completion(
    folder: Path, size: int, batch_size: int, eval_batch_size: int, shuffle: bool, world_size: int, epoch: int
) -> None:
    """For any batch size (1, odd, a tail of one row), another one in evaluation, shuffled, over ranks."""
    path = write_jsonl(folder / "a.jsonl", binary(size))
    batch_size, size = max(batch_size, world_size), max(size, world_size)
    options: dict[str, Any] = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
    for rank in range(world_size):
        data = set_up(KTO, train=path, validation=path, shuffle=shuffle, rank=rank, world_size=world_size, **options)
        train = data.train_dataloader()
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in [*train, *data.val_dataloader()]:
            found = mismatched(batch)
            assert len(found) == int((~batch.labels.mismatched).sum())
            for prompt, completion in found:  # row i is "p{i % 10}", "c{i}"
                assert int(completion[1:-10]) % 10 != int(prompt[1:])


@pytest.mark.parametrize("shuffle", [True, False])
def test_defect_3_pairs_that_go_their_own_ways_are_not_sorted_by_class(folder: Path, shuffle: bool) -> None:
    path = write_jsonl(folder / "b.jsonl", pairs(64))
    data = set_up(KTO, train=path, batch_size=16, shuffle=shuffle)
    for batch in data.train_dataloader():
        own = batch.labels.desirable[~batch.labels.mismatched]
        assert 0 < int(own.sum()) < len(own)
        for part in own.split(8):  # and neither is any part of a step
            assert 0 < int(part.sum()) < len(part)


def test_defect_10_the_boundary_is_the_same_whatever_follows(folder: Path) -> None:
    rows = [{"prompt": "The ans", "completion": end, "label": True} for end in ("wer", " wer", "4", "\n", "’")]
    rows = [row for row in rows if row["completion"].strip()]
    data = set_up(SFT, train=write_jsonl(folder / "c.jsonl", rows), shuffle=False)
    [batch] = data.train_dataloader()
    prompt = tokenizer()("The ans", add_special_tokens=False)["input_ids"]
    assert [p.tolist() for p in batch.prompts] == [prompt]  # one prompt, with the same tokens before any completion
    for row, completion in zip(rows, batch.completions, strict=True):
        assert text(completion) == row["completion"] + "<|im_end|>"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_defect_11_eos_stands_once_at_the_end(folder: Path, chat: bool, end: str) -> None:
    row: dict[str, Any] = {"prompt": "p", "completion": f"c{end}", "label": True}
    if chat:
        row["prompt"] = [{"role": "user", "content": "p"}]
        row["completion"] = [{"role": "assistant", "content": f"c{end}"}]
    data = set_up(SFT, train=write_jsonl(folder / "d.jsonl", [row]))
    [batch] = data.train_dataloader()
    ids = batch.completions[0].tolist()
    assert ids[-1] == tokenizer().eos_token_id
    assert ids.count(tokenizer().eos_token_id) == 1


@given(prompt=st.integers(1, 40), completion=st.integers(1, 40), max_length=st.integers(2, 30), cut=st.booleans())
@law
def test_defect_12_no_row_trains_on_nothing(
    folder: Path, prompt: int, completion: int, max_length: int, cut: bool
) -> None:
    rows = [{"prompt": "q" * prompt, "chosen": "z" * completion, "rejected": "z"}, *pairs(2)]
    path = write_jsonl(folder / "e.jsonl", rows)
    for needs in (KTO, DPO):
        try:
            data = set_up(needs, train=path, max_length=max_length, truncate_completions=cut)
        except DataError:  # too short for any row, or for the rows of more than one prompt
            continue
        counts = data.counts()["train"][path]
        assert counts["rows"] + counts["dropped_too_long"] == 6
        for batch in data.train_dataloader():
            for i, ids in enumerate(batch.completions):
                kept = len(batch.prompts[int(batch.prompt[i])])
                assert len(ids) >= 1
                assert 1 <= kept <= max_length - len(ids)
