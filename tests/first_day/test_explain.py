"""``halos check --explain``, and the targets that ``check_halo`` takes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from run_halos import ROOT

from halos_pl.batch import Needs
from halos_pl.cli.main import main
from halos_pl.conformance import check_halo
from halos_pl.conformance.check import checks_of, clauses
from halos_pl.conformance.clause import EXPLANATIONS
from halos_pl.conformance.explain import code, kind_of
from halos_pl.conformance.target import TargetError, as_target
from halos_pl.conformance.witness import Raised
from halos_pl.objective.build import load_objective
from halos_pl.objective.feedback import Binary, Feedback, Judgement
from halos_pl.objective.halo import HALO
from halos_pl.objective.policy_weighted import PolicyWeighted
from halos_pl.objective.policy_weights import PolicyWeight
from halos_pl.objective.reference_points import Estimate, MismatchedKL, ReferencePoint
from halos_pl.objective.reference_points.base import MeanOverRanks
from halos_pl.objective.rewards import LogRatio, Reward
from value_functions import Logistic, ValueFunction

NAMES = {
    "torch": torch,
    "F": F,
    "dataclasses": dataclasses,
    "Needs": Needs,
    "Judgement": Judgement,
    "MeanOverRanks": MeanOverRanks,
    "Estimate": Estimate,
    **{kind.__name__: kind for kind in (ValueFunction, Reward, ReferencePoint, Feedback, HALO, PolicyWeight)},
}
MINE = """
import torch
from value_functions import ValueFunction

class Softsign(ValueFunction):
    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        x = self.beta * u
        return x / (1 + x.abs())
"""
# The slow ones draw many steps, or search the whole of a curve.
QUICK = (
    "policy_weight",
    "shape",
    "no_in_place_change",
    "reward_shape",
    "reference_detached",
    "feedback_sign",
    "feedback_weight",
)


def test_every_clause_of_the_suite_is_explained() -> None:
    """As the suite itself names them, of every kind of target."""
    kto = load_objective(ROOT / "experiments/objectives/kto.yaml")
    weighted = load_objective(ROOT / "experiments/objectives/wpo.yaml")
    targets = [Logistic(), LogRatio(), MismatchedKL(), Binary(), kto, weighted]
    assert {clause.name for target in targets for clause in clauses(target)} == set(EXPLANATIONS)
    assert all(it.means and it.cure for it in EXPLANATIONS.values())


@pytest.mark.parametrize("clause", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in EXPLANATIONS])
def test_an_example_fails_its_clause(clause: str) -> None:
    names: dict[str, Any] = dict(NAMES)
    exec(code(clause), names)
    kind = kind_of(clause)
    parts = {"reward": LogRatio(), "reference_point": MismatchedKL(clamp=False), "value_function": Logistic()}
    if kind == "HALO":
        target = names["Example"](**parts, feedback=Binary(), reflect_undesirable=False)
    elif kind == "PolicyWeight":
        halo = HALO(**parts, feedback=Binary(), reflect_undesirable=False)
        target = PolicyWeighted(halo=halo, policy_weight=names["Example"]())
    else:
        target = names["Example"]()
    witness = next(it for it in checks_of(target).clauses if it.name == clause).witness()
    assert witness is not None
    assert not isinstance(witness, Raised)


def test_explain_prints_meaning_example_and_cure(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--explain", "reference_detached"])
    said = capsys.readouterr().out
    assert code("reference_detached").splitlines()[-1].strip() in said
    assert ".detach()" in said
    main(["check", "--explain", "0_HALO.reference_split"])  # as a report on a sum names it
    assert "gather_over_ranks" in capsys.readouterr().out
    main(["check", "--explain"])
    listed = capsys.readouterr().out
    assert all(clause in listed for clause in EXPLANATIONS)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--explain", "reference_detatched"], "reference_detached"),
        (["--explain", "concave", "mine.py:X"], "--explain"),
        (["Logistc"], "Logistic"),
        (["mine.py"], "mine.py:Softsign"),
        (["mine.py:Softsing"], "Softsign"),
    ],
)
def test_a_wrong_name_is_answered_by_the_closest(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["check", *words])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_what_fails_names_the_command_that_explains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bent.py").write_text(MINE.replace("x / (1 + x.abs())", "x * x.abs()"), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["check", "bent.py:Softsign"])
    assert ended.value.code == 1
    assert "halos check --explain concave_on_gains" in capsys.readouterr().out


def test_check_halo_takes_what_the_command_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_softsign.py").write_text(MINE, encoding="utf-8")
    for target in ("own_softsign.py:Softsign", "own_softsign.Softsign"):
        assert type(as_target(target)).__name__ == "Softsign"
    assert isinstance(as_target("Logistic"), Logistic)
    assert isinstance(as_target(ROOT / "experiments/objectives/kto.yaml"), HALO)
    assert check_halo(f"{os.fspath(tmp_path)}/own_softsign.py:Softsign").sound
    for wrong, named in {"Logistc": "Logistic", "nope.yaml": "nope.yaml", "own_softsign.py": ":Softsign"}.items():
        with pytest.raises(TargetError, match=named) as error:
            check_halo(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match=r"YAML file, path/to/file\.py:Class"):
        check_halo(3)
