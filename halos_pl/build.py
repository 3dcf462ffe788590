"""From plug-ins, or from the file that names them, to an objective."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

import halos_pl.baselines  # noqa: F401  (so that its terms are found by their bare names)
from halos_pl.feedback import Feedback
from halos_pl.objective import HALO, Objective, Sum
from halos_pl.reference_points import ReferencePoint
from halos_pl.rewards import Reward
from value_functions import ValueFunction


def build_objective(
    *,
    reward: Reward | None = None,
    reference_point: ReferencePoint | None = None,
    value_function: ValueFunction | None = None,
    feedback: Feedback | None = None,
    undesirable: Literal["same", "reflect"] | None = None,
    constant: float = 0.0,
    extra_terms: list[Objective] | None = None,
) -> Objective:
    """One objective from the plug-ins: a HALO, a sum with extra terms, or the extra terms alone.

    Raises:
        ValueError: where some, but not all, parts of a HALO are given, or nothing is.
    """
    parts = {
        "reward": reward,
        "reference_point": reference_point,
        "value_function": value_function,
        "feedback": feedback,
        "undesirable": undesirable,
    }
    missing = [name for name, part in parts.items() if part is None]
    terms = list(extra_terms or [])
    if not missing:
        halo = HALO(**parts, constant=constant)  # type: ignore[arg-type]
        terms.insert(0, halo)
    elif len(missing) < len(parts):
        raise ValueError(
            f"the objective lacks {', '.join(missing)}: a HALO is a reward, a reference_point, a value_function, a"
            " feedback and a reading of undesirable rows (same or reflect); see experiments/objectives/"
        )
    if not terms:
        raise ValueError(
            "no objective: choose one with --config experiments/objectives/NAME.yaml, or set model.reward,"
            " model.reference_point, model.value_function, model.feedback and model.undesirable"
        )
    return terms[0] if len(terms) == 1 else Sum(terms)


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(build_objective, as_group=False)
    return parser


def load_objective(path: str | Path) -> Objective:
    """The objective of a YAML file such as those of ``experiments/objectives/``, without any model.

    What the ``model:`` part says of policy, reference model and optimizer is not looked at.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a file that is no objective, naming the file and what is wrong with it.
    """
    content = yaml.safe_load(Path(path).read_text())
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"{path}: no objective file; it has no model: part that names plug-ins")
    known = _parser().get_defaults().keys()
    parts: dict[str, Any] = {name: value for name, value in model.items() if name in known}
    try:
        return build_objective(**_parser().instantiate(_parser().parse_object(parts)))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
