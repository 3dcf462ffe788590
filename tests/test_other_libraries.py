"""The table of other libraries' losses: its numbers are those of the code, and its batch reaches what it has to.

Formulas that were written out are computed again here; the library's own code is called where it is installed.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from run_halos import ROOT

from halos_pl.batch import Needs
from halos_pl.objective.build import load_objective

sys.path.insert(0, str(ROOT / "benchmarks"))

from parity import numbers, page
from parity.batch import PAIRS, PROMPT, fixed_batch
from parity.compare import Value, difference, uses_reference, value_of
from parity.table import Ours, libraries, table

ROWS = table()
KEPT = numbers.read()


def test_the_page_and_the_numbers_are_those_of_the_table():
    assert list(KEPT) == [row.key for row in ROWS]
    assert all(numbers.is_of(row, KEPT[row.key]) for row in ROWS)
    assert page.FILE.read_text(encoding="utf-8") == page.page(ROWS, KEPT)


def assert_the_same(kept: dict, again: dict) -> None:
    assert kept["reference"] == again["reference"]
    for old, new in zip(kept["against"], again["against"], strict=True):
        assert old.pop("kind") == new.pop("kind")
        assert old == pytest.approx(new, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", libraries())
def test_the_numbers_are_computed_again(name):
    if missing := libraries()[name].missing:
        pytest.skip(missing)
    rows = [row for row in ROWS if row.library == name]
    assert rows
    for row in rows:
        assert_the_same(KEPT[row.key], numbers.computed(row))


@pytest.mark.parametrize("name", [name for name in libraries() if libraries()[name].missing])
def test_our_side_is_computed_again_where_a_library_is_missing(name):
    for row in (row for row in ROWS if row.library == name):
        for ours, kept in zip(row.ours, KEPT[row.key]["against"], strict=True):
            assert value_of(ours.loss(None), fixed_batch()).loss == pytest.approx(kept["ours"], rel=1e-3)


def test_each_row_names_a_place_and_the_first_of_ours_is_a_shipped_loss():
    for row in ROWS:
        if row.code:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v[\d.]+|[0-9a-f]{40})", row.code), row.key
            assert re.fullmatch(r"[\w/-]+\.(py|yaml):\d+(-\d+)?", row.place), row.key
            first, _, last = row.place.rpartition(":")[2].partition("-")
            assert not last or int(first) < int(last), row.key
        assert all((ROOT / "experiments/objectives" / f"{ours.objective}.yaml").exists() for ours in row.ours), row.key


def test_every_shipped_loss_has_a_row():
    compared = {ours.objective for row in ROWS for ours in row.ours}
    assert compared == {path.stem for path in (ROOT / "experiments/objectives").glob("*.yaml")}


def test_every_function_of_a_library_is_in_the_table():
    for name in libraries():
        text = (ROOT / f"benchmarks/parity/libraries/{name}.py").read_text(encoding="utf-8")
        functions = set(re.findall(r"^def ([a-z]\w*)\(\s*batch", text, flags=re.MULTILINE))
        assert functions == {row.function for row in ROWS if row.library == name}


# -- the batch ---------------------------------------------------------------------------------------------------


def test_the_batch_reaches_every_branch():
    batch = fixed_batch()
    r, z0 = batch.r.detach(), [part.r[part.mismatched].mean().item() for part in (batch, *batch.halves())]
    assert z0[0] > 0.1
    assert z0[1] < -0.1
    assert z0[2] > 0.1
    assert (batch.reference[batch.mask] < 0).all()
    u = 0.1 * batch.margin(r)
    assert (u > 1.1).any()
    assert (u < 0).any()
    assert (batch.margin(batch.logp) > 1.1).any()
    assert (batch.margin(batch.logp) < 0).any()
    mask = batch.mask[batch.train]
    ratio = batch.ratio[batch.train][mask]
    assert (ratio < -1).any()
    assert (ratio > 1.5).any()
    assert (ratio == 0).sum() == 1
    assert ((ratio.exp() > 0.8) & (ratio.exp() < 1.2)).any()
    losers = batch.labels.score[batch.train] < 0
    assert (batch.ratio[batch.train][losers] > 1.5).any()
    assert (ratio[losers[:, None].expand_as(mask)[mask]].exp() > 4).any()
    moved = (batch.policy.exp() - batch.reference.exp())[batch.train][mask]
    assert (moved > 0.1).any()
    assert (moved < -0.2).any()
    per_token = batch.margin(batch.logp / batch.length)
    assert (per_token > -0.1).any()
    assert (per_token < -0.1).any()
    assert (batch.length[batch.good] != batch.length[batch.bad]).all()
    assert len(set(batch.margin(batch.labels.score).tolist())) == PAIRS


def test_micro_batches_are_the_batch():
    batch = fixed_batch()
    for parts in (batch.halves(), batch.each()):
        for of in ("good", "bad", "mismatched"):
            together = torch.cat([part.r[getattr(part, of)] for part in parts])
            assert torch.equal(together.sort().values, batch.r[getattr(batch, of)].sort().values)
    objective = load_objective("dpo")
    losses = [objective(part.rows(Needs())).loss for part in batch.halves()]
    assert torch.stack(losses).mean().item() == pytest.approx(objective(batch.rows(Needs())).loss.item())


def test_nothing_beyond_a_completion_changes_a_loss():
    batch = fixed_batch()
    whole = torch.cat([torch.ones(len(batch.mask), PROMPT, dtype=torch.bool), batch.mask], dim=1)
    other = replace(batch, tokens=torch.where(whole, batch.tokens, -0.7).detach().requires_grad_())
    for row in ROWS:
        if not libraries()[row.library].called:
            ours, theirs = (value_of(row.theirs(None), each) for each in (batch, other))
            assert ours.loss == theirs.loss
            assert torch.equal(ours.gradient, theirs.gradient)


# -- what a difference is called -----------------------------------------------------------------------------------

SIZES = st.floats(0.1, 10).filter(lambda size: abs(size - 1) > 0.01)


OURS = value_of(Ours("dpo").loss(None), fixed_batch())


@given(SIZES, st.floats(-5, 5))
def test_a_scale_is_one_whatever_is_added(scale, constant):
    found = difference(Value(scale * OURS.loss + constant, scale * OURS.gradient), OURS)
    assert found.kind == "scale"
    assert found.scale == pytest.approx(scale, rel=1e-5)
    assert found.gradient == pytest.approx(abs(scale - 1), rel=1e-4)


@given(st.floats(-5, 5))
def test_a_constant_is_one(constant):
    assume(constant == 0 or abs(constant) > 1e-3)
    found = difference(Value(OURS.loss + constant, OURS.gradient), OURS)
    assert found.kind == ("offset" if constant else "equal")
    assert found.gradient == 0


@given(st.integers(0, 10), st.floats(0.01, 5))
def test_a_gradient_with_another_direction_is_another_loss(place, size):
    gradient = OURS.gradient.clone()
    gradient[place] += size * gradient.norm()
    assert difference(Value(OURS.loss, gradient), OURS).kind == "other"


@pytest.mark.parametrize(("objective", "expected"), [("dpo", True), ("simpo", False), ("kto", True)])
def test_whether_the_reference_matters(objective, expected):
    assert uses_reference(Ours(objective).loss(None), fixed_batch()) is expected


def test_a_loss_that_is_not_one_finite_number_is_refused():
    for wrong in (lambda batch: batch.logp, lambda batch: batch.logp.sum() / 0):
        with pytest.raises(ValueError, match="finite"):
            value_of(wrong, fixed_batch())
