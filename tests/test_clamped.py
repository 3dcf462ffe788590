"""The warning of a run whose reference point is mostly clamped."""

from __future__ import annotations

import re
import warnings

import pytest
from run_halos import ROOT

from halos_pl.objective.build import load_objective
from halos_pl.testing import binary_rows, fit
from halos_pl.training.clamped import ClampWatch


def clamp_warnings(figures: list[dict[str, float]]) -> list[str]:
    watch = ClampWatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in figures:
            watch.see(each)
        watch.finish()
    return [str(warning.message) for warning in caught]


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
    said = clamp_warnings(figures)
    assert len(said) == (clamped is not None)
    for text in said:
        assert clamped in text
        assert "-2.5" in text
        assert "\n" not in text
        links = [link.partition("#") for link in re.findall(r"docs/([\w/.#-]+)", text)]
        assert [page for page, *_ in links] == ["findings/z0.md", "concepts/reference_point.md"]
        for page, _, heading in links:
            assert f": {page}\n" in (ROOT / "mkdocs.yml").read_text("utf-8")  # the site has it
            titles = re.findall(r"^#+ (.*)", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)
            assert heading in ["", *(re.sub(r"\W+", "-", title.lower()).strip("-") for title in titles)]


def test_a_fit_warns_of_clamped_steps(tiny_folder):
    rows = [{**row, "label": False} for row in binary_rows(24)]  # whatever it unlearns, the mismatched rows go with it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = fit(load_objective("kto"), rows, tiny_folder, steps=8, batch_size=4, lr=0.3).steps
    clamped = [each["outcome/z0_clamped"] for each in steps]
    assert sum(clamped) > 4
    assert sum("the reference point was" in str(warning.message) for warning in caught) == 1
