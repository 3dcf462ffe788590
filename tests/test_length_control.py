"""The length-controlled win rate of the alpaca-eval package against an independent logistic regression."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from halos_pl.judge.base import JudgeError
from halos_pl.judge.length_control import GAMED, length_controlled

Array = NDArray[np.float64]
N = 120


def test_a_folder_without_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=GAMED):
        length_controlled({}, [], [], tmp_path)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array, Array, list[str], list[str]]:
    """A table like the hub's, verdicts that favour long answers, and answers of several lengths."""
    pandas = pytest.importorskip("pandas")
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("alpaca")
    difficulty = rng.normal(size=N)
    gamed = [
        {
            "index": i,
            "model": model,
            "preference": 1 / (1 + np.exp(-(2 * np.tanh(delta) + 0.3 * difficulty[i]))),
            "std_delta_len": delta,
            "instruction_difficulty": difficulty[i],
            "not_gamed_baseline": False,
        }
        for model, shift in (("concise", -1.0), ("verbose", 1.0))
        for i, delta in enumerate(rng.normal(shift, 0.5, size=N))
    ]
    pandas.DataFrame(gamed).to_csv(folder / GAMED, index=False)
    lengths = rng.integers(50, 800, size=(2, N)) + np.array([[300], [0]])
    answers, baseline = (["x" * int(n) for n in each] for each in lengths)
    delta = (lengths[1] - lengths[0]) / np.std(lengths[1] - lengths[0], ddof=1)
    logit = -1.5 * np.tanh(delta) + 0.5 * difficulty + 0.4
    preferences = 1 / (1 + np.exp(-(logit + rng.normal(0, 0.7, size=N))))
    return folder, preferences, difficulty, answers, baseline


def fit(x: Array, y: Array, weights: Array, c: float) -> Array:
    """The minimum of |w| + c * weighted log loss, with w = p - q and p, q >= 0."""
    k = x.shape[1]

    def loss(pq: Array) -> tuple[float, Array]:
        z = x @ (pq[:k] - pq[k:])
        slope = c * (weights * (1 / (1 + np.exp(-z)) - y)) @ x
        return pq.sum() + c * float(weights @ (np.logaddexp(0, z) - y * z)), np.concatenate([1 + slope, 1 - slope])

    options = {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-10}
    found = minimize(loss, np.zeros(2 * k), jac=True, bounds=[(0, None)] * 2 * k, method="L-BFGS-B", options=options)
    return np.asarray(found.x[:k] - found.x[k:])


def test_it_is_that_of_an_independent_logistic_fit(
    synthetic: tuple[Path, Array, Array, list[str], list[str]],
) -> None:
    """The same folds and grid of penalties, but another optimiser, on the undivided probabilities."""
    pytest.importorskip("alpaca_eval")
    import pandas
    from sklearn.model_selection import GroupKFold

    folder, preferences, difficulty, answers, baseline = synthetic
    ours = length_controlled(dict(enumerate(preferences.tolist())), answers, baseline, folder)
    gamed = pandas.read_csv(folder / GAMED)
    delta = np.array([len(b) - len(a) for a, b in zip(answers, baseline, strict=True)], dtype=float)
    delta /= delta.std(ddof=1)
    x = np.column_stack(
        [
            np.tanh(np.concatenate([gamed["std_delta_len"], delta])),
            np.concatenate([gamed["instruction_difficulty"], difficulty]),
            np.concatenate([np.zeros(2 * N), np.ones(N)]),
        ]
    )
    y = np.concatenate([gamed["preference"], preferences])
    weights = np.concatenate([np.full(2 * N, 0.2 / 2), np.ones(N)])
    rows = np.concatenate([np.arange(3 * N)] * 2)  # the package has each row once for either class
    costs = {}
    for c in np.logspace(-4, 4, 10):
        losses = []
        for train, test in GroupKFold(5).split(rows, groups=rows):
            w = fit(x[np.unique(rows[train])], y[np.unique(rows[train])], weights[np.unique(rows[train])], c)
            held = np.unique(rows[test])
            z = x[held] @ w
            losses.append(float(weights[held] @ (np.logaddexp(0, z) - y[held] * z)))
        costs[c] = np.mean(losses)
    w = fit(x, y, weights, min(costs, key=lambda c: costs[c]))
    predicted = 1 / (1 + np.exp(-(difficulty * w[1] + w[2])))
    assert ours.value == pytest.approx(predicted.mean(), abs=2e-4)
    assert ours.error == pytest.approx(predicted.std(ddof=1) / np.sqrt(N), rel=2e-3)
    assert ours.value < preferences.mean() - 0.02  # the model's answers are longer


def test_questions_without_a_verdict_are_left_out(
    synthetic: tuple[Path, Array, Array, list[str], list[str]],
) -> None:
    pytest.importorskip("alpaca_eval")
    folder, preferences, _, answers, baseline = synthetic
    some = {i: float(preferences[i]) for i in range(0, N, 2)}
    assert length_controlled(some, answers, baseline, folder).n == N // 2
    with pytest.raises(JudgeError, match="10"):
        length_controlled({0: 0.5}, answers, baseline, folder)
