"""The re-analysis of the KTO paper's Table 2: its formulas against independent ones, its page against its output."""

from __future__ import annotations

import importlib.util
import math
import re
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import test_proportions_2indep as two_proportions

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "findings" / "table_2.md"
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?")

shares = st.floats(0.05, 0.95)
sizes = st.integers(20, 2000)


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table_2", ROOT / "experiments" / "paper" / "table_2.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table_2 = _script()


@given(n=sizes, right=st.floats(0.05, 0.95), wrong=st.floats(0.05, 0.95))
def test_unpaired_is_walds_test(n, right, wrong):
    one, other = round(right * n), round(wrong * n)
    assume(0 < one < n and 0 < other < n)
    size, p = table_2.unpaired(one / n, other / n, n)
    test = two_proportions(one, n, other, n, method="wald", compare="diff")
    assert p == pytest.approx(test.pvalue, rel=1e-9)
    assert size == pytest.approx(math.sqrt(test.variance), rel=1e-9)


@given(both=st.integers(0, 50), one=st.integers(0, 60), other=st.integers(0, 60))
def test_paired_is_mcnemars_exact_test(both, one, other):
    assume(one + other > 0)
    expected = contingency_tables.mcnemar([[both, one], [other, 5]], exact=True).pvalue
    assert table_2.mcnemar(abs(one - other), one + other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("more", "discordant"), [(5, 4), (5, 6)])
def test_impossible_numbers_of_disagreements_are_refused(more, discordant):
    with pytest.raises(ValueError, match="impossible"):
        table_2.mcnemar(more, discordant)


@given(p=shares, q=shares, both=st.floats(0, 1))
def test_discordance_is_that_of_a_joint_distribution_with_that_correlation(p, q, both):
    """The four cells of the joint distribution, from the largest overlap to the smallest."""
    least, most = max(0.0, p + q - 1), min(p, q)
    overlap = least + both * (most - least)
    outcomes = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    cells = np.array([overlap, p - overlap, q - overlap, 1 - p - q + overlap])
    covariance = cells @ (outcomes[:, 0] * outcomes[:, 1]) - (cells @ outcomes[:, 0]) * (cells @ outcomes[:, 1])
    correlation = covariance / math.sqrt(p * (1 - p) * q * (1 - q))
    assert table_2.discordance(p, q, correlation) == pytest.approx(cells[1] + cells[2], abs=1e-12)


@given(p=shares, q=shares, n=sizes, correlation=st.floats(0, 1))
def test_a_paired_test_counts_a_possible_number_of_disagreements(p, q, n, correlation):
    discordant, _ = table_2.paired(p, q, n, correlation)
    one, other = round(p * n), round(q * n)
    assert abs(one - other) <= discordant
    assert abs(discordant - n * table_2.discordance(p, q, correlation)) <= 3
    assert (discordant - abs(one - other)) % 2 == 0


@given(n=st.integers(2, 120), one=st.floats(0, 1), other=st.floats(0, 1), level=st.sampled_from([0.05, 0.05 / 32]))
def test_the_largest_disagreement_is_found(n, one, other, level):
    one, other = round(one * n), round(other * n)
    possible = range(abs(one - other), min(one + other, 2 * n - one - other) + 1, 2)
    small = [d for d in possible if table_2.mcnemar(abs(one - other), d) < level]
    assert table_2.largest_discordance(one, other, n, level) == (max(small, default=None), len(small) == len(possible))


@given(n=sizes, gap=st.floats(0.01, 0.3), p=st.floats(0.2, 0.8), correlation=st.floats(0, 0.9))
def test_power_is_that_of_a_z_test(n, gap, p, correlation):
    """Correlated answers to n questions are worth n / (1 - correlation) independent ones."""
    expected = NormalIndPower().power(gap / math.sqrt(p * (1 - p)), n / (1 - correlation), 0.05)
    assert table_2.power(gap, n, 0.05, correlation, p) == pytest.approx(expected, abs=1e-9)


@given(n=sizes, level=st.sampled_from([0.05, 0.05 / 32]), correlation=st.floats(0, 0.9))
def test_the_detectable_difference_has_the_power_it_claims(n, level, correlation):
    """Up to the chance of finding it with the wrong sign."""
    reach = table_2.detectable(n, level, correlation)
    assert table_2.power(reach, n, level, correlation) == pytest.approx(0.8, abs=1e-5)


@given(n=st.integers(1, 1500), tenths=st.integers(0, 1000))
def test_a_figure_fits_where_some_count_is_printed_so(n, tenths):
    shown = {f"{100 * k / n:.1f}" for k in range(n + 1)}
    assert table_2.fits(tenths / 10, n) == (f"{tenths / 10:.1f}" in shown)


@pytest.mark.parametrize("n", [200, 400, 1319])
def test_multiples_of_a_half_are_counted(n):
    counts = [k for k in range(n + 1) if 30 * n <= 100 * k <= 60 * n]
    rounded = [(Decimal(100 * k) / n).quantize(Decimal("0.1"), ROUND_HALF_EVEN) for k in counts]
    expected = sum((2 * value) % 1 == 0 for value in rounded) / len(counts)
    assert table_2.share_of_halves(n) == pytest.approx(expected, abs=2 / len(counts))  # ties round by binary fractions


def test_missing_figures_can_only_raise_corrected_p():
    """Holm's correction of the known p, whatever the missing ones are."""
    known = [table_2.unpaired(p, q, table_2.QUESTIONS[benchmark])[1] for benchmark, _, p, q in table_2.comparisons()]
    missing = table_2.FAMILY - len(known)
    assert missing > 0
    ours = table_2.corrected(known, table_2.FAMILY, step_down=True)
    for value in (1e-9, 0.003, 0.2, 1.0):
        adjusted = multipletests([*known, *[value] * missing], method="holm")[1][: len(known)]
        assert (adjusted <= np.array(ours) + 1e-15).all()
    assert adjusted == pytest.approx(ours)


def test_the_page_is_what_the_script_prints():
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(table_2.BEGIN)
    computed, _, tail = rest.partition(table_2.END)
    assert computed.strip().splitlines() == list(table_2.lines())
    printed = set(NUMBER.findall(computed))
    prose = re.sub(r"\(https?://\S+\)|```.*?```|arXiv v4|Table 2|80%", "", head + tail, flags=re.DOTALL)
    assert not [number for number in NUMBER.findall(prose) if number not in printed]
