"""The table of the shipped losses, computed from their files and the reports of their checks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from halos_pl.common.experiments import objectives
from halos_pl.common.subclasses import every_subclass
from halos_pl.common.yaml_files import read_yaml
from halos_pl.conformance.report import Definition, Report
from halos_pl.objective.build import KINDS, load_objective


def verdicts(checked: Mapping[str, Mapping[Definition, Report]]) -> str:
    """The text of ``experiments/objectives.json``: one line per checked loss."""
    rows = [_row(name, reports) for name, reports in checked.items()]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def _row(name: str, reports: Mapping[Definition, Report]) -> dict[str, Any]:
    path = objectives()[name]
    needs = load_objective(path).needs
    return {
        "name": name,
        "formula": formula(read_yaml(path)[0]["model"]),
        "needs": [field.name for field in fields(needs) if getattr(needs, field.name)],
        "verdict": {definition: report.shown_verdict for definition, report in reports.items()},
    }


def formula(model: Mapping[str, Any]) -> str:
    """An objective in one line, by its plug-ins: ``Logistic(beta=0.1)(LogRatio - MismatchedKL), Binary``.

    Args:
        model: the ``model:`` part of an objective's file.
    """
    terms = [_part(term) for term in model.get("extra_terms") or []]
    if model.get("reward"):
        v, r, z0, feedback = (
            _part(model[name]) for name in ("value_function", "reward", "reference_point", "feedback")
        )
        terms.insert(0, f"{v}({r} - {z0}), {feedback}{', reflected' if model['reflect_undesirable'] else ''}")
    return " + ".join(terms)


def _part(spec: Any) -> str:
    """A plug-in by name, with arguments that differ from its defaults."""
    if not isinstance(spec, dict) or "class_path" not in spec:
        return str(spec)
    name = spec["class_path"].rpartition(".")[2]
    if name == "HALO":
        return formula(spec["init_args"])
    [cls] = {cls for base in KINDS for cls in every_subclass(base) if cls.__name__ == name}
    defaults = {key: parameter.default for key, parameter in inspect.signature(cls).parameters.items()}
    arguments = [f"{k}={_part(v)}" for k, v in spec.get("init_args", {}).items() if v != defaults.get(k)]
    return f"{name}({', '.join(arguments)})" if arguments else name
