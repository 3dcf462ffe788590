"""AlpacaEval 2's length-controlled win rate (Dubois et al. 2024), computed by the alpaca-eval package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from halos_pl.judge.base import JudgeError
from halos_pl.judge.estimates import Estimate

#: Verdicts on models that were asked to be brief or verbose, and the difficulty of each question.
GAMED = "df_gamed.csv"


def check_files(folder: Path) -> None:
    """Refuses a folder without the table that the fit needs, or an environment without the package.

    Raises:
        JudgeError: naming the file or the package.
    """
    if not (folder / GAMED).is_file():
        raise JudgeError(f"{folder / GAMED}: no such file; download it from the hub's data set tatsu-lab/alpaca_eval")
    _package()


def _package() -> Any:
    try:
        from alpaca_eval.metrics import glm_winrate
    except ImportError as error:  # pkg_resources, too, which setuptools 82 no longer has
        raise JudgeError(
            f"the length-controlled win rate needs the alpaca-eval package ({error}): pip install 'halos_pl[alpaca]'"
        ) from error
    return glm_winrate


def length_controlled(
    preferences: Mapping[int, float], answers: Sequence[str], baseline: Sequence[str], folder: Path
) -> Estimate:
    """The win rate that a logistic regression predicts for answers as long as the baseline's.

    Args:
        preferences: preference for the answer, from 0 to 1, by the number of the question in AlpacaEval's order.
        answers: the model's answer to each question.
        baseline: the baseline's answer to each question.
        folder: folder with ``df_gamed.csv``.

    Returns:
        the win rate; its standard error is the package's, which covers the questions but not the fit.

    Raises:
        JudgeError: naming a missing file or package, or if the preferences are too few to fit.
    """
    check_files(folder)
    glm, rows = _package(), sorted(preferences)
    if len(rows) < 10:
        raise JudgeError(f"{len(rows)} verdicts; the length-controlled win rate needs at least 10")
    table = [
        {
            "index": i,
            "preference": 1 + preferences[i],
            "output_1": baseline[i],
            "output_2": answers[i],
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "judge",
        }
        for i in rows
    ]

    def local(*, filename: str, **_: Any) -> str:
        return str(folder / filename)

    with patch.object(glm, "hf_hub_download", local):
        metrics = glm.get_length_controlled_winrate(table, save_weights_dir=None)
    rate, error = (float(metrics[name]) / 100 for name in ("length_controlled_winrate", "lc_standard_error"))
    if not math.isfinite(rate):
        raise JudgeError("the fit of the length-controlled win rate gives no finite figure")
    reach = 1.96 * error
    return Estimate(rate, error, max(rate - reach, 0.0), min(rate + reach, 1.0), len(rows))
