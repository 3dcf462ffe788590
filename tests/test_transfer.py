"""Batches on their way to a device: one buffer, and labels that the host still knows."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halos_pl.batch import TokenBatch
from halos_pl.common.transfer import packed, unpacked
from halos_pl.labels import Labels

TYPES = [torch.int64, torch.float32, torch.bool, torch.int32]


@given(st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 9)), min_size=1, max_size=8))
def test_one_buffer_holds_tensors_of_all_types(kinds: list[tuple[torch.dtype, int]]) -> None:
    tensors = [torch.randint(0, 2, (length,)).to(dtype) for dtype, length in kinds]
    buffer = packed(tensors)
    assert buffer.numel() == sum(t.nbytes for t in tensors)
    for before, after in zip(tensors, unpacked(buffer, tensors), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


def batch() -> TokenBatch:
    return TokenBatch(
        prompts=[torch.arange(3), torch.arange(5), torch.arange(4)],
        completions=[torch.arange(1 + i) for i in range(6)],
        prompt=torch.tensor([0, 0, 2, 2, 1, 0]),
        labels=Labels(
            desirable=torch.tensor([True, False, True, False, True, False]),
            pair=torch.tensor([1, 0, 3, 2, -1, -1]),
            mismatched=torch.arange(6) == 5,
        ),
        row_ids=[f"row {i}" for i in range(6)],
        loss=[None, torch.tensor([True, False]), None, torch.tensor([False, True, True, False]), None, None],
    )


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [3, 2, 4], [5], [0, 3, 5]])
@pytest.mark.parametrize("known", [False, True], ids=["index", "numbers"])
@pytest.mark.parametrize("is_moved", [False, True], ids=["made", "moved"])
def test_the_host_knows_the_rows_that_are_on_the_device(rows: list[int], known: bool, is_moved: bool) -> None:
    """Whatever is kept on the host equals what the tensors say."""
    whole = batch().to("cpu") if is_moved else batch()
    part = whole.select(torch.tensor(rows), rows if known else None)
    expected = [whole.prompts[int(whole.prompt[i])].tolist() for i in rows]
    assert [part.prompts[p].tolist() for p in part.host.prompt] == expected
    assert part.host.prompt == part.prompt.tolist()
    labels = part.labels
    for name in ("desirable", "mismatched", "pair"):
        assert getattr(labels.host, name) == getattr(labels, name).tolist()
    assert part.host.mismatched == labels.mismatched.tolist()
    assert part.host.loss == [None if mask is None else mask.nonzero().squeeze(1).tolist() for mask in part.loss or []]
    assert torch.equal(labels.train_index, labels.train.nonzero().squeeze(1))
    assert torch.equal(labels.mismatched_index, labels.mismatched.nonzero().squeeze(1))
    assert labels.unpaired == bool(((labels.pair < 0) & labels.train).any())


def test_a_moved_batch_is_the_same() -> None:
    before, after = batch(), batch().to("cpu")
    for name in ("prompts", "completions"):
        assert [ids.tolist() for ids in getattr(after, name)] == [ids.tolist() for ids in getattr(before, name)]
    assert after.host == before.host
    for column in fields(Labels):
        assert torch.equal(getattr(after.labels, column.name), getattr(before.labels, column.name))
    assert [m is None for m in after.loss or []] == [m is None for m in before.loss or []]
    assert after.row_ids == before.row_ids


@pytest.mark.slow
def test_a_step_waits_for_the_device_once_before_the_optimizer_steps() -> None:
    """``step_on_fake_gpu.py`` fails where anything but ``tolist`` reads a value from the device."""
    program = Path(__file__).with_name("step_on_fake_gpu.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    assert {name.split()[0] for name in steps} == {"kto", "dpo", "aot"}
    for name, step in steps.items():
        assert step["reads before clipping"] == 0, name
        assert step["reads"] == 1, name
        assert step["copies of the batch"] == {"to": 1}, name
        assert step["copies of the step"].keys() == {"to"}, name
