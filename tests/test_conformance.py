"""The conformance suite for its users: ``check_halo``, the pytest decorator, strategies, ``halos check``, verdicts.

That it catches what it should is shown in ``tests/meta``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from fractions import Fraction
from itertools import takewhile
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from make_parts import PACKAGES, example, library
from run_halos import ROOT, halos_check

import value_functions
from halos_pl.batch import Needs
from halos_pl.cli.check import END, START, _answer, family, family_table
from halos_pl.cli.verdicts import verdicts
from halos_pl.common.experiments import OBJECTIVES_TABLE, objectives
from halos_pl.conformance import CheckFailed, Report, check_halo, parametrize_with_checks, strategies
from halos_pl.conformance.check import reports
from halos_pl.conformance.child import Child
from halos_pl.conformance.report import TITLES, Definition
from halos_pl.conformance.target import TargetError
from halos_pl.objective.build import load_objective
from halos_pl.objective.feedback import Binary, Pairwise
from halos_pl.objective.halo import HALO
from halos_pl.objective.reference_points import MismatchedKL
from halos_pl.objective.rewards import LogProb, LogRatio
from value_functions import Identity, Logistic, LogSigmoid, ValueFunction
from value_functions.discovery import plug_ins

OBJECTIVES = ROOT / "experiments" / "objectives"
TABLE = ROOT / "docs" / "reference" / "verdicts.md"
SHAPED = (
    r"halo-shaped: (reward is not a function of \(x, y\)|(reward is not a function of \(x, y\); )?fails \w+(, \w+)*)"
)
VERDICTS = (
    rf"halo( \(v proved\))?|halo \(two-sided(, v proved)?\)|degenerate reference|{SHAPED}|"
    r"composite(: policy-dependent weights)?|not a halo"
)


def kto(**parts: Any) -> HALO:
    sound: dict[str, Any] = {
        "reward": LogRatio(),
        "reference_point": MismatchedKL(),
        "value_function": Logistic(),
        "feedback": Binary(),
        "reflect_undesirable": True,
    }
    return HALO(**(sound | parts))


def verdict(target: Any) -> str:
    return check_halo(target, on_fail="report", max_examples=10).verdict


def status(report: Report, clause: str) -> str:
    return next(c.status for c in report.clauses if c.clause == clause)


# -- the whole family ---------------------------------------------------------------------------------------

# One objective for each kind of verdict; the others are checked by a slow test.
SAMPLE = ("kto", "kto_kahneman_tversky", "kto_zero_reference", "simpo", "ppo_clip", "sft")


def table() -> dict[str, dict[Definition, str]]:
    """The verdicts in the docs, by objective and definition."""
    shown = TABLE.read_text().partition(START)[2].partition(END)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" |")] for line in shown]
    return {name: dict(zip(TITLES, verdicts, strict=True)) for name, *verdicts, _ in cells}


@pytest.fixture(scope="module")
def sample():
    shared: dict[Any, Any] = {}
    files = {name: load_objective(OBJECTIVES / f"{name}.yaml") for name in SAMPLE}
    return {name: reports(objective, max_examples=12, shared=shared) for name, objective in files.items()}


@pytest.mark.slow
def test_the_verdict_tables_match_the_code():
    with Child(_answer, timeout=600, memory=4e9) as child:
        checked = dict(family(objectives().values(), child))
    shown = TABLE.read_text().partition(START)[2].partition(END)[0]
    assert shown.splitlines() == list(family_table(checked.items())), "it is another one now; say make readme"
    assert OBJECTIVES_TABLE.read_text(encoding="utf-8") == verdicts(checked), "it is another one now; say make readme"


def test_the_table_lists_every_objective_and_agrees_with_a_sample(sample):
    recorded = table()
    assert list(recorded) == sorted(path.stem for path in OBJECTIVES.glob("*.yaml"))
    computed = {
        name: {definition: report.shown_verdict for definition, report in of.items()} for name, of in sample.items()
    }
    assert computed == {name: recorded[name] for name in SAMPLE}


def test_both_tables_contain_the_same_verdicts():
    listed = json.loads(OBJECTIVES_TABLE.read_text(encoding="utf-8"))
    assert {row["name"]: row["verdict"] for row in listed} == table()


def test_the_header_of_a_file_states_its_verdict():
    """Headers are written by hand, verdicts are computed."""
    words = {
        "halo": r"[Aa] HALO\b",
        "halo (two-sided)": r"two-sided HALO\b",
        "degenerate reference": r"degenerate\s+reference",
        "composite": r"[Cc]omposite",
        "not a halo": r"baseline, not a HALO",
        "halo-shaped": r"HALO-shaped|HALO (only )?for a uniform pi_ref",
    }
    wrong = {}
    for name, recorded in table().items():
        lines = (OBJECTIVES / f"{name}.yaml").read_text().splitlines()
        header = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        kind = recorded["icml"].partition(":")[0].replace(" (v proved)", "").replace(", v proved", "")
        if not re.search(words[kind], header) and "The loss is that of kto.yaml" not in header:
            wrong[name] = (kind, header)
    assert not wrong


def test_verdicts_use_these_words_only():
    for name, recorded in table().items():
        for words in recorded.values():
            assert re.fullmatch(VERDICTS, words), (name, words)


def test_verdicts_on_well_known_losses():
    verdicts = table()
    for name in ("kto", "dpo", "hinge"):
        assert verdicts[name]["icml"] == "halo (v proved)"
    assert verdicts["kto_kahneman_tversky"]["icml"] == "halo (two-sided, v proved)"
    assert verdicts["kto_zero_reference"]["icml"] == "degenerate reference"
    assert verdicts["sft"]["icml"] == verdicts["unlikelihood"]["icml"] == "not a halo"
    assert verdicts["bco"]["icml"] == "halo-shaped: fails undesirable_concave_on_gains"
    assert verdicts["ipo"]["icml"] == "halo-shaped: fails non_decreasing"
    # Any parameterised reward is one under arXiv v1.
    for name in ("simpo", "dpo_forward_kl", "humanline_kto"):
        assert verdicts[name]["icml"].startswith("halo-shaped: fails reward_")
        assert verdicts[name]["v1"] == "halo (v proved)"


def test_the_clamp_of_kto_passes_with_its_reason(sample):
    report = sample["kto"]["icml"]
    for clause in ("reference_in_range", "reference_shift_equivariant"):
        row = next(c for c in report.clauses if c.clause == clause)
        assert row.status == "passed"
        assert "both sum to 1" in row.reason
    assert report.failed == []


def test_the_exponential_of_ppo_is_convex_on_gains_and_the_clip_of_the_logarithm_is_not(sample):
    report = sample["ppo_clip"]["icml"]
    witness = next(c.witness for c in report.clauses if c.clause == "0_HALO.concave_on_gains")
    middle, value, chord, low, high = map(float, re.findall(r"[\d.]+", witness.removeprefix("v"))[:5])
    assert low < middle < high < 0.19  # on (0, log 1.2)
    assert value == pytest.approx(2.718281828**middle, abs=1e-3)
    assert value < chord == pytest.approx((2.718281828**low + 2.718281828**high) / 2, abs=1e-3)
    assert verdict(value_functions.Clipped(Identity(), low=-0.2, high=0.2)) == "halo"


def test_the_report_lists_unequal_weights():
    report = check_halo(kto(feedback=Binary(lambda_undesirable=0.5)), on_fail="report", max_examples=5)
    reason = next(c.reason for c in report.clauses if c.clause == "feedback_weight")
    assert reason
    assert "weights 0.5, 1" in reason
    assert report.verdict == "halo"


@pytest.mark.slow
def test_a_reading_is_part_of_the_loss():
    """Log sigmoid is concave everywhere, so its reflection onto undesirable rows is convex on their gains."""
    assert verdict(kto(value_function=LogSigmoid(), reflect_undesirable=False)) == "halo"
    assert verdict(kto(value_function=LogSigmoid())) == "halo-shaped: fails undesirable_concave_on_gains"
    # Where no undesirable row counts, nothing is reflected.
    alone = kto(value_function=LogSigmoid(), feedback=Binary(lambda_undesirable=0.0))
    assert verdict(alone) == "halo"


@pytest.mark.slow
@pytest.mark.parametrize(
    "v",
    [
        pytest.param(LogSigmoid(), marks=pytest.mark.slow),
        pytest.param(value_functions.KahnemanTversky(), marks=pytest.mark.slow),
        Logistic(),
    ],
)
def test_in_v1_an_undesirable_row_is_valued_as_by_the_other_reading_in_icml(v):
    """v1 maps each row's value to its loss, so the reward of an undesirable row is -r: -v(-u) is v, and +v(u) is v~."""
    of = {
        reflect: reports(kto(value_function=v, reflect_undesirable=reflect), max_examples=10)
        for reflect in (False, True)
    }
    for reflect in (False, True):
        assert of[reflect]["v1"].verdict == of[not reflect]["icml"].verdict


# -- plug-ins alone -----------------------------------------------------------------------------------------


PLUG_INS = [cls for package in PACKAGES for cls in library(package).values()]
#: Most of the time of all parts. A new part is checked by default.
LONG = {
    *("AllottedMargin", "AlphaDivergence", "AlphaProbability", "BatchMean", "BatchQuantile", "CappedSlope", "Clipped"),
    *("DiscoPOP", "ExoPair", "Flipped", "ForwardKL", "GammaWeight", "GroupAdvantage", "GroupLogSumExp", "Hinge"),
    *("LeaveOneOut", "LogSigmoid", "LossAverse", "MarginAdaptive", "Mixture", "NormalisedGapMargin", "Quadratic"),
    *("QuantileCalibrated", "RankMatched", "RatioClip", "RobustPairwise", "RunningMean", "SampledKL", "Scaled"),
    *("ScoreMargin", "SharedLengthLogRatio", "Shifted", "SoftGate", "SoftmaxOfScores", "SortedMargins", "Squared"),
    *("Tanh", "TokenKL", "TotalVariationLogRatio"),
}


@pytest.mark.parametrize(
    "part",
    [pytest.param(cls, id=cls.__name__, marks=[pytest.mark.slow] if cls.__name__ in LONG else []) for cls in PLUG_INS],
)
def test_a_shipped_part_fails_exactly_its_declared_clauses(part):
    instance = example(part)
    report = check_halo(instance, on_fail="report")
    failed = {c.clause: c.reason for c in report.clauses if c.status == "failed" and c.required}
    assert failed == dict(instance.violates), str(report)
    if report.verdict != "degenerate reference":
        assert not [c for c in report.clauses if c.status == "expected"], str(report)


def test_classes_are_discovered_and_duplicate_names_refused(tmp_path, monkeypatch):
    package = f"package_{id(tmp_path)}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "brand.py").write_text("import fractions\n\nclass Brand(fractions.Fraction):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [cls.__module__ for cls in plug_ins(package, Fraction).values()] == [f"{package}.brand"]
    (tmp_path / package / "again.py").write_text((tmp_path / package / "brand.py").read_text())
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match=r"two classes named Brand: in .*again and in .*brand"):
        plug_ins(package, Fraction)


@pytest.mark.slow
def test_a_new_file_in_the_folder_of_its_kind_is_checked_by_its_bare_name(tmp_path):
    for package in ("halos_pl", "value_functions"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    models = dict(zip(("Identity", "LogRatio", "BatchMean", "Binary"), PACKAGES, strict=True))
    for name, package in models.items():
        folder = tmp_path / package.replace(".", "/")
        (folder / f"brand_{name.lower()}.py").write_text(
            f"from {library(package)[name].__module__} import {name}\n\n\nclass Brand{name}({name}):\n    pass\n"
        )
    code = f"import halos_pl.cli.main as m\nfor name in {list(models)}:\n    m.main(['check', 'Brand' + name])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("verdict: halo\n") == len(models)


class Squared(LogRatio):
    violates = {"reward_linear": "squares punish far log-ratios"}  # noqa: RUF012

    def forward(self, rows: Any) -> torch.Tensor:
        return super().forward(rows).square()


def test_a_declared_violation_is_shown_with_its_reason_and_counts():
    report = check_halo(Squared(), on_fail="report", max_examples=10)
    row = next(c for c in report.clauses if c.clause == "reward_linear")
    assert (row.status, row.reason) == ("failed", Squared.violates["reward_linear"])
    assert report.verdict == "halo-shaped: fails reward_linear"
    assert not report.sound


@pytest.mark.parametrize(
    ("attribute", "statement", "named"),
    [
        ("violates", ("reward_linear",), "Wrong.violates"),
        ("violates", {"reference_in_range": " "}, "Wrong.violates"),
        ("violates", {"reference_in_rage": "a typing error"}, "did you mean reference_in_range"),
    ],
)
def test_declarations_without_a_valid_clause_or_reason_are_refused(attribute, statement, named):
    wrong = type("Wrong", (MismatchedKL,), {attribute: statement})
    with pytest.raises(TargetError, match=re.escape(named)) as raised:
        check_halo(wrong(), on_fail="report")
    assert "\n" not in str(raised.value)


@parametrize_with_checks([Identity(), LogRatio(), Binary()], max_examples=10)
def test_the_decorator_runs_each_clause(check):
    check()


def test_reflected_clauses_of_a_value_function_are_reported_but_not_required():
    report = check_halo(LogSigmoid())
    assert status(report, "undesirable_concave_on_gains") == "failed"
    assert report.verdict == "halo"
    assert report.sound


# -- check_halo ---------------------------------------------------------------------------------------------


class Falling(ValueFunction):
    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return -u


def test_a_failure_raises_with_the_report_unless_it_is_expected_or_only_reported():
    with pytest.raises(CheckFailed, match=r"non_decreasing: v\(.*\) = .* > v\(") as raised:
        check_halo(Falling())
    assert raised.value.report.verdict.startswith("halo-shaped: fails non_decreasing")
    assert check_halo(Falling, on_fail="report").failed
    reason = "it is upside down"
    report = check_halo(Falling(), expected_failures={"non_decreasing": reason})
    row = next(c for c in report.clauses if c.clause == "non_decreasing")
    assert (row.status, row.reason) == ("expected", reason)
    assert report.verdict.startswith("halo-shaped: fails non_decreasing")  # computed, never declared
    assert not report.sound


@pytest.mark.parametrize("wrong", [{"definition": "v5"}, {"on_fail": "ignore"}])
def test_unknown_words_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        check_halo(Logistic(), **wrong)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (3, "int object is not an instance of Objective, ValueFunction"),
        (dict, "dict is not a class of Objective, ValueFunction"),
        (ValueFunction, "ValueFunction is abstract: it lacks forward"),
        (value_functions.Scaled, "arguments: value_function, by"),
    ],
)
def test_invalid_targets_are_refused_in_one_line(target, said):
    with pytest.raises(TypeError, match=re.escape(said)) as raised:
        check_halo(target)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"expected_failures": {"non_increasing": "a typing error"}}, "no clause 'non_increasing'"),
        ({"expected_failures": {"non_decreasing": " "}}, "a reason for each clause"),
        ({"expected_failures": ["non_decreasing"]}, "a reason for each clause"),
        ({"max_examples": 0}, "at least 1"),
    ],
)
def test_invalid_expected_failures_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        check_halo(Logistic(), **arguments)


def test_the_decorator_refuses_an_expected_failure_that_no_target_can_have():
    marked = parametrize_with_checks([Logistic(), LogRatio()], expected_failures={"reward_linear": "of the reward"})
    assert len(marked.args[1]) > 10
    with pytest.raises(ValueError, match="no target has a clause 'reward_lineal'"):
        parametrize_with_checks([Logistic()], expected_failures={"reward_lineal": "a typing error"})


def test_a_loss_without_any_weight_is_no_halo():
    nothing = kto(feedback=Binary(lambda_desirable=0.0, lambda_undesirable=0.0))
    assert verdict(nothing) == "halo-shaped: fails feedback_weight"


def test_the_target_is_unchanged():
    bco = load_objective(OBJECTIVES / "bco.yaml")
    before = (str(bco.state_dict()), bco.training)
    check_halo(bco, on_fail="report", max_examples=5)
    assert (str(bco.state_dict()), bco.training) == before


@pytest.mark.slow
def test_reports_are_reproducible():
    one, other = (check_halo(kto(reward=LogProb()), on_fail="report", max_examples=10) for _ in range(2))
    assert one.to_json() == other.to_json()


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    check_halo(Logistic())
    assert torch.get_num_threads() == before


def test_the_decorator_gives_one_item_per_clause_and_names_both():
    marked = parametrize_with_checks([Falling(), LogRatio(), Falling()])
    names, items = marked.args
    assert names == "check"
    ids = [item.id for item in items]
    assert {"Falling0-non_decreasing", "Falling2-shape", "LogRatio-reward_linear"} <= set(ids)
    assert len(set(ids)) == len(ids)
    (check,) = items[ids.index("Falling0-non_decreasing")].values
    with pytest.raises(AssertionError, match=r"Falling, non_decreasing: v\("):
        check()
    (check,) = items[ids.index("Falling0-shape")].values
    check()


# -- strategies ---------------------------------------------------------------------------------------------


@given(st.data())
def test_rows_satisfy_the_needs(data):
    needs = Needs(**{name: data.draw(st.booleans(), name) for name in ("pairs", "mismatched", "groups")})
    rows = data.draw(strategies.rows(needs))
    n = len(rows)
    assert rows.mask.any(dim=1).all()
    assert bool((rows.policy_logps <= 0).all())
    assert bool((rows.policy_logps[~rows.mask] == 0).all())
    own = rows.labels.train.nonzero().squeeze(1)
    assert len(own) >= 1
    if needs.mismatched:
        assert bool(rows.labels.mismatched.any())
    if needs.pairs:
        pair = rows.labels.pair[own]
        assert bool((rows.labels.pair[pair] == own).all())
        assert bool((rows.labels.desirable[own] != rows.labels.desirable[pair]).all())
        assert bool((rows.labels.group[own] == rows.labels.group[pair]).all())
    if needs.groups:  # a row may be alone with its prompt
        assert bool((rows.labels.group[own] >= 0).all())
    assert bool(((rows.labels.pair >= -1) & (rows.labels.pair < n)).all())


@pytest.mark.parametrize("largest", [50.0, 0.5])
@given(data=st.data())
def test_outcomes_stay_in_their_range(largest, data):
    assert abs(data.draw(strategies.outcomes(largest))) <= largest


@pytest.mark.parametrize("cls", [Logistic, value_functions.KahnemanTversky, value_functions.DiscoPOP, Pairwise, Binary])
@given(data=st.data())
def test_arguments_make_an_instance(cls, data):
    cls(**data.draw(strategies.arguments(cls)))


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def own_file(tmp_path):
    """A file outside the repository with sound and unsound classes."""
    file = tmp_path / "mine.py"
    file.write_text(
        textwrap.dedent(
            '''
            import torch
            from value_functions import ValueFunction


            class Softsign(ValueFunction):
                def __init__(self, *, beta: float = 0.1) -> None:
                    super().__init__()
                    self.beta = beta

                def forward(self, u):
                    x = self.beta * u
                    return x / (1 + x.abs())


            class Dented(Softsign):
                """Falls between 40 and 40.01 nats."""

                def forward(self, u):
                    return super().forward(u) - 1e-2 * (u - 40).clamp(0, 0.01)


            class Summed(ValueFunction):
                def forward(self, u):
                    return u.sum()


            class Broken(ValueFunction):
                def forward(self, u):
                    return undefined


            class Unfinished(ValueFunction):
                pass


            class Needy(ValueFunction):
                def __init__(self, scale: float) -> None:
                    super().__init__()
                    self.scale = scale

                def forward(self, u):
                    return self.scale * u


            class Unannotated(ValueFunction):
                def __init__(self, a, b=2):
                    super().__init__()
                    self.a, self.b = a, b

                def forward(self, u):
                    return (self.a + self.b) * u


            class Leaves(ValueFunction):
                def forward(self, u):
                    raise SystemExit(0)


            class Chatty(Softsign):
                def forward(self, u):
                    print("called with", u.shape)
                    return super().forward(u)


            class Outer:
                class Inner(Softsign):
                    pass
            '''
        )
    )
    return file


def test_sound_and_unsound_classes_outside_the_repository(own_file, capfd):
    code, out, _ = halos_check(capfd, f"{own_file}:Softsign")
    assert code == 0
    assert "verdict: halo (v proved)\n" in out
    code, out, _ = halos_check(capfd, f"{own_file}:Dented")
    assert code == 1
    assert re.search(r"non_decreasing +failed +(disproved|undecided) +v\(40\S*\) = \S+ > v\(40\S*\) = ", out)
    assert "verdict: halo-shaped: fails non_decreasing" in out


@pytest.mark.slow
def test_objectives_by_name_and_path_and_classes_with_arguments(capfd):
    code, out, _ = halos_check(capfd, OBJECTIVES / "dpo.yaml")
    assert code == 0
    assert "verdict: halo (v proved)\n" in out
    assert halos_check(capfd, "LogProb")[0] == 1
    assert halos_check(capfd, "LogProb", "--definition", "v1")[0] == 0
    assert halos_check(capfd, "Logistic")[0] == 0
    assert halos_check(capfd, "value_functions.Quadratic")[0] == 1
    nested = {"value_function": {"class_path": "Logistic", "init_args": {"beta": 0.3}}, "by": 2.0}
    assert halos_check(capfd, "Scaled", "--init_args", json.dumps(nested))[0] == 0


def test_json_is_plain_data(own_file, capfd):
    code, out, _ = halos_check(capfd, f"{own_file}:Dented", "--json", "--definition=v1")
    assert code == 1
    found = json.loads(out)
    assert list(found) == ["target", "definition", "verdict", "proved", "clauses"]
    assert (found["target"], found["definition"]) == (f"{own_file}:Dented", "v1")
    assert all(list(row) == ["clause", "status", "witness", "reason", "proof"] for row in found["clauses"])
    assert {row["status"] for row in found["clauses"]} <= {"passed", "failed", "expected"}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{file}:Summed", "could not be checked: u of shape (3,), v(u) of shape ()"),
        ("{file}:Broken", "could not be checked: raises NameError: name 'undefined' is not defined"),
        ("{file}:Unfinished", "Unfinished is abstract: it lacks forward"),
        ("{file}:Needy", "arguments: scale"),
        ("{file}:Missing", "has no 'Missing'"),
        ("{file}:Outer.Missing", "has no 'Outer.Missing'"),
        ("{file}:Leaves", "could not be checked: raises SystemExit: 0"),
        ("{file}", "name a class in it, as in {file}:"),
        ("{folder}/leaves.py:Softsign", "does not import: SystemExit: 0"),
        ("{folder}/broken.yaml", "broken.yaml:2: "),
        ("{folder}/binary.yaml", "binary.yaml is not UTF-8"),
        ("{folder}/absent.py:Softsign", "no such file"),
        ("{folder}/absent.yaml", "No such file"),
        ("no.such.module.Softsign", "does not import"),
        ("value_functions.Softsign", "has no 'Softsign'"),
        ("Softsing", "'Softsing'"),
        ("json.dumps", "is not an instance of Objective"),
        ("{base}", "no objective"),
    ],
)
def test_bad_input_is_one_line_and_status_2(target, said, own_file, tmp_path, capfd):
    places = {"file": own_file, "folder": tmp_path, "base": ROOT / "experiments" / "base.yaml"}
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "broken.yaml").write_text("model: [1, 2\n")
    (tmp_path / "binary.yaml").write_bytes(bytes([0xFF, 0xFE, 0x00]))
    code, out, err = halos_check(capfd, target.format(**places))
    assert (code, out) == (2, "")
    assert said.format(**places) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given_arguments", "said"),
    [("{", "JSON"), ("[1]", "as an object"), ('{"scale": "many"}', "scale"), ('{"scale": 1, "size": 2}', "size")],
)
def test_bad_arguments_are_one_line_and_status_2(given_arguments, said, own_file, capfd):
    code, _, err = halos_check(capfd, f"{own_file}:Needy", "--init_args", given_arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert halos_check(capfd, f"{own_file}:Needy", "--init_args", '{"scale": 2.0}')[0] == 0


def test_arguments_without_annotations_and_inner_classes(own_file, capfd):
    assert halos_check(capfd, f"{own_file}:Unannotated", "--init_args", '{"a": 0.1, "b": 0}')[0] == 0
    code, _, err = halos_check(capfd, f"{own_file}:Unannotated", "--init_args", '{"a": 0.1, "c": 3}')
    assert code == 2
    assert err.count("\n") == 1
    assert halos_check(capfd, f"{own_file}:Outer.Inner")[0] == 0


def test_output_of_a_target_is_not_part_of_the_json(own_file, capfd):
    code, out, err = halos_check(capfd, f"{own_file}:Chatty", "--json")
    assert code == 0
    assert json.loads(out)["verdict"] == "halo"
    assert "called with" in err


def test_a_yaml_with_a_wrong_name_or_part_is_one_line(tmp_path, capfd):
    config = yaml.safe_load((OBJECTIVES / "kto.yaml").read_text())
    config["model"]["value_function"] = "Logistc"
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    code, _, err = halos_check(capfd, tmp_path / "typo.yaml")
    assert code == 2
    assert "typo.yaml" in err
    assert re.search(r"value_function .*\bdid you mean Logistic\?", err)
    assert err.count("\n") == 1
    del config["model"]["value_function"]
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(config))
    code, _, err = halos_check(capfd, tmp_path / "part.yaml")
    assert code == 2
    assert "lacks value_function" in err


def test_one_target_or_all(capfd):
    for words in ([], ["Logistic", "--all"]):
        code, _, err = halos_check(capfd, *words)
        assert code == 2
        assert "target, --all" in err


def test_all_prints_the_table_and_writes_it_where_it_belongs(tmp_path, capfd, monkeypatch):
    two = {name: OBJECTIVES / f"{name}.yaml" for name in ("sft", "unlikelihood")}
    monkeypatch.setattr("halos_pl.cli.check.objectives", lambda: two)
    page, table = tmp_path / "page.md", tmp_path / "table.json"
    page.write_text(f"before\n{START}old\n{END}after\n")
    code, out, _ = halos_check(capfd, "--all", "--write", page, "--write", table)
    assert code == 0
    assert out == (
        "| loss | ICML 2024, Def. 3.4 | arXiv v1 | remark on Q(·\\|x) |\n|---|---|---|---|\n"
        "| sft | not a halo | not a halo |  |\n| unlikelihood | not a halo | not a halo |  |\n"
    )
    assert page.read_text() == f"before\n{START}{out}{END}after\n"
    assert [row["name"] for row in json.loads(table.read_text())] == ["sft", "unlikelihood"]
    page.write_text("no marks\n")
    code, _, _ = halos_check(capfd, "--all", "--write", page)
    assert code == 2
    assert page.read_text() == "no marks\n"
