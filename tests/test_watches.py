"""The warnings of a run whose reference point is mostly clamped, or that unlearns what was chosen."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
from run_halos import ROOT

from halos_pl.objective.build import load_objective
from halos_pl.objective.feedback import Binary
from halos_pl.policy.moving_reference import SyncedCopy
from halos_pl.policy.reference import AdapterOff, FrozenCopy, OtherModel
from halos_pl.policy.spec import ModelSpec
from halos_pl.testing import binary_rows, fit
from halos_pl.training.clamped import ClampWatch
from halos_pl.training.displaced import DisplacementWatch
from halos_pl.training.module import HALOModule
from halos_pl.training.watch import Watch


def said_of(watch: Watch[Any], figures: list[dict[str, float]]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in figures:
            watch.see(each)
        watch.finish()
    return [str(warning.message) for warning in caught]


def pages(text: str) -> list[str]:
    """The pages that a message links to, all of which exist, with their headings."""
    links = [link.partition("#") for link in re.findall(r"docs/([\w/.#-]+)", text)]
    for page, _, heading in links:
        assert f": {page}\n" in (ROOT / "mkdocs.yml").read_text("utf-8")  # the site has it
        titles = re.findall(r"^#+ (.*)", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)
        assert heading in ["", *(re.sub(r"\W+", "-", title.lower()).strip("-") for title in titles)]
    return [page for page, *_ in links]


CLAMPED = {"outcome/z0_clamped": 1.0, "outcome/z0": 0.0, "outcome/z0_estimate": -2.5}
FREE = {"outcome/z0_clamped": 0.0, "outcome/z0": 0.5, "outcome/z0_estimate": 0.5}
RUNNING = {**CLAMPED, "outcome/z0": 0.1}  # a running mean of clamped estimates is not 0


@pytest.mark.parametrize(
    ("figures", "clamped"),
    [
        ([CLAMPED] * 100, "20 of the last 20"),
        ([FREE] * 30 + [CLAMPED] * 40, "11 of the last 20"),
        ([FREE] * 2 + [CLAMPED] * 3, "3 of the last 5"),
        ([CLAMPED] * 4, None),  # too short to tell
        ([FREE, CLAMPED] * 30, None),  # half of them
        ([FREE] * 30, None),
        ([RUNNING] * 30, None),
        ([{"loss": 1.0}] * 30, None),
    ],
)
def test_a_run_that_is_mostly_clamped_is_told_so_once(figures, clamped):
    said = said_of(ClampWatch(), figures)
    assert len(said) == (clamped is not None)
    for text in said:
        assert clamped in text
        assert "-2.5" in text
        assert "\n" not in text
        assert pages(text) == ["findings/z0.md", "concepts/reference_point.md"]


def test_a_fit_warns_of_clamped_steps(tiny_folder):
    rows = [{**row, "label": False} for row in binary_rows(24)]  # whatever it unlearns, the mismatched rows go with it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = fit(load_objective("kto"), rows, tiny_folder, steps=8, batch_size=4, lr=0.3).steps
    clamped = [each["outcome/z0_clamped"] for each in steps]
    assert sum(clamped) > 4
    assert sum("the reference point was" in str(warning.message) for warning in caught) == 1


def displaced(nats: float, margin: float = 0.5) -> dict[str, float]:
    """A step with chosen completions of 10 tokens."""
    return {"logps/displacement": nats, "lengths/chosen": 10.0, "rewards/margins": margin}


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ([displaced(-6.0)] * 100, True),
        ([displaced(-6.0)] * 5, True),
        ([displaced(0.0)] * 30 + [displaced(-12.0)] * 20, True),
        ([displaced(-4.0)] * 30, False),  # less than half a nat per token
        ([displaced(6.0)] * 30, False),
        ([displaced(-6.0, margin=-0.5)] * 30, False),  # not displacement: the preferences are not learned either
        ([displaced(-6.0)] * 4, False),  # too short to tell
        ([displaced(-6.0), {"logps/displacement": math.nan}, {"loss": 1.0}] * 30, False),
    ],
)
def test_a_run_that_unlearns_what_was_chosen_is_told_so_once(figures, told):
    said = said_of(DisplacementWatch(), figures)
    assert len(said) == told
    for text in said:
        assert "\n" not in text
        assert pages(text) == ["faq.md"]


@pytest.mark.parametrize(("lr", "told"), [(0.01, False), (0.3, True)])
def test_a_fit_warns_of_displacement(tiny_folder, lr, told):
    """Undesirable completions that contain the desirable ones, and weigh more, take them along."""
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"] + " no" * (not good), "label": good}
        for row in binary_rows(12)
        for good in (True, False)
    ]
    objective = load_objective("kto_zero_reference")
    objective.feedback = Binary(lambda_undesirable=4.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = fit(objective, rows, tiny_folder, steps=12, batch_size=8, lr=lr).steps
    fell = [each["logps/displacement"] / each["lengths/chosen"] for each in steps]
    assert (min(fell) < -0.5) == told
    assert steps[-1]["rewards/margins"] > 0
    assert sum("logps/displacement" in str(warning.message) for warning in caught) == told


@pytest.mark.parametrize(
    ("reference", "watched"),
    [
        (None, True),
        (FrozenCopy(), True),
        (AdapterOff(), True),
        (SyncedCopy(every=1), False),  # moves along
        (OtherModel(ModelSpec("other")), False),  # far from the policy from the start
    ],
)
def test_only_a_distance_from_the_start_is_watched(reference, watched):
    policy = ModelSpec("policy", lora={"r": 2}) if isinstance(reference, AdapterOff) else ModelSpec("policy")
    module = HALOModule(policy, reference, extra_terms=[load_objective("dpo")])
    assert any(isinstance(watch, DisplacementWatch) for watch in module._watches) == watched
