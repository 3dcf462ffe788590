"""Losses as lists of terms, made from the shipped objectives with other values."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from halos_pl.common.experiments import objectives
from halos_pl.common.yaml_files import read_yaml

#: A term of a loss, as in ``model.extra_terms``: ``{class_path: ..., init_args: {...}}``.
Term = dict[str, Any]
_HALO = ("reward", "reference_point", "value_function", "feedback", "reflect_undesirable", "loss_offset")


def part(name: str, **arguments: Any) -> Term:
    """A plug-in with arguments, as in YAML."""
    return {"class_path": name, "init_args": arguments}


def terms(objective: str, **values: Any) -> list[Term]:
    """The terms of a shipped objective.

    Args:
        objective: its name.
        values: new values of arguments, such as ``beta``: of all plug-ins that have an argument of that name, or, for
            the name of a part such as ``reward``, the part itself.
    """
    model = deepcopy(read_yaml(objectives()[objective])[0]["model"])
    halo = [part("HALO", **{name: model[name] for name in _HALO})] if model["reward"] else []
    found = [*halo, *(model["extra_terms"] or [])]
    for name, value in values.items():
        if not _replace(found, name, value):
            raise AssertionError(f"{objective} has no argument {name}")
    return found


def _replace(node: Any, name: str, value: Any) -> int:
    """Replaces every argument of a name; the number that were replaced."""
    if isinstance(node, list):
        return sum(_replace(each, name, value) for each in node)
    if not isinstance(node, dict):
        return 0
    arguments = node.get("init_args", {})
    count = sum(_replace(each, name, value) for each in arguments.values())
    if name in arguments:
        arguments[name] = value
        return count + 1
    return count


def scaled(term: Term, weight: float) -> Term:
    """A term times a weight."""
    arguments = dict(term["init_args"])
    if "weight" in arguments:
        arguments["weight"] *= weight
    elif weight != 1:
        value = arguments["value_function"]
        arguments["value_function"] = part("Scaled", by=weight, value_function=value)
        arguments["loss_offset"] *= weight
    return {**term, "init_args": arguments}


def mean_nll(weight: float) -> Term:
    """Weight times the mean over pairs of the chosen completion's negative log-likelihood per token.

    Unlike ``NLL``, every pair counts the same, however long its completion is.
    """
    return part(
        "HALO",
        reward=part("LogProb", length_normalised=True),
        reference_point="Zero",
        value_function=part("Identity", beta=weight),
        feedback=part("Pairwise", label_smoothing=0.0),
        reflect_undesirable=False,
        loss_offset=0.0,
    )


def section(found: list[Term]) -> dict[str, Any]:
    """The settings of a config's ``model`` section for a loss."""
    halo = next((term for term in found if term["class_path"] == "HALO"), None)
    others = [term for term in found if term is not halo]
    arguments = halo["init_args"] if halo else {**dict.fromkeys(_HALO), "loss_offset": 0.0}
    return {**arguments, "extra_terms": others or None}
