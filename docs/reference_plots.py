"""The plots of the reference pages."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from halos_pl.batch import LogProbBatch
from halos_pl.labels import Labels
from halos_pl.objective.halo import HALO
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import LogRatio, Reward
from value_functions import ValueFunction

DESIRABLE, UNDESIRABLE, NEUTRAL = "#1b7f5c", "#c2452d", "#4a4a4a"


def picture(draw: Callable[[Any], None], *, xlabel: str, ylabel: str) -> bytes:
    """An SVG of one panel, with reproducible bytes."""
    figure = Figure(figsize=(6, 2.6))
    figure.subplots_adjust(left=0.12, right=0.98, bottom=0.19, top=0.97)
    axes = figure.subplots()
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    draw(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "halos_pl"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def rows_of(policy: torch.Tensor, reference: torch.Tensor, labels: Labels) -> LogProbBatch:
    """Rows whose completions are one token long."""
    mask = torch.ones(len(policy), 1, dtype=torch.bool)
    return LogProbBatch(policy[:, None], reference[:, None], mask, labels, kl=torch.full((len(policy), 1), 0.5))


def step(shift: float = 0.0) -> LogProbBatch:
    """Four pairs and four mismatched rows, all rewards raised by ``shift``."""
    reward = torch.tensor([2.0, -1.0, 1.0, 0.5, -1.5, 0.0, 3.0, -2.0, -0.5, 1.0, -1.0, 1.5]) + shift
    pair = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6, -1, -1, -1, -1])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3])
    desirable = torch.tensor([True, False] * 4 + [False] * 4)
    return rows_of(reward - 2, torch.full((12,), -2.0), Labels(desirable, pair, torch.arange(12) >= 8, group))


def plot_value(v: ValueFunction) -> bytes:
    """v over outcomes of up to 40 nats."""
    u = torch.linspace(-40, 40, 801)
    with torch.no_grad():
        value = v(u)
    keep = value.abs() <= 60 * value[u.abs() <= 10].abs().max()
    return picture(
        lambda axes: axes.plot(u[keep], value[keep], color=NEUTRAL), xlabel="outcome u (nats)", ylabel="value v(u)"
    )


def plot_reward(reward: Reward) -> bytes:
    """r of a one-token completion against its log-ratio; a pair's other completion keeps the reference's log-prob."""
    ratio = torch.linspace(-1.99, 1.99, 200)
    n = len(ratio)
    pair = torch.cat([torch.arange(n) + n, torch.arange(n)])
    labels = Labels(torch.arange(2 * n) < n, pair)
    policy = torch.cat([ratio - 2, torch.full((n,), -2.0)])
    r = reward(rows_of(policy, torch.full((2 * n,), -2.0), labels))[:n].reshape(n, -1)[:, 0]
    return picture(
        lambda axes: axes.plot(ratio, r, color=NEUTRAL), xlabel="log π_θ/π_ref, with log π_ref = −2", ylabel="r (nats)"
    )


def plot_reference_point(make: Callable[[], ReferencePoint]) -> bytes:
    """z0 of a step's first row against a shift of all rewards of the step."""
    shifts = torch.linspace(-4, 4, 81).tolist()
    z0 = []
    for shift in shifts:
        rows = step(shift)
        z0.append(float(make()(LogRatio()(rows), rows).value.reshape(-1)[0]))
    return picture(
        lambda axes: axes.plot(shifts, z0, color=NEUTRAL), xlabel="all rewards raised by (nats)", ylabel="z0 (nats)"
    )


def plot_objective(halo: HALO) -> bytes:
    """The loss of a row against its outcome, for each class that carries a loss."""
    u = torch.linspace(-40, 40, 801)
    judged = halo.feedback(step())
    with torch.no_grad():
        losses = {-1.0: halo.loss_offset - halo.value_function(u), 1.0: halo.loss_offset + halo.value_function(u)}
        if halo.reflect_undesirable:
            losses[1.0] = halo.loss_offset - halo.value_function(-u)

    def draw(axes: Any) -> None:
        for label, colour, row in (("desirable", DESIRABLE, 0), ("undesirable", UNDESIRABLE, 1)):
            if (weight := float(judged.weight[row])) > 0:
                loss = weight * losses[float(judged.sign[row])]
                keep = loss.abs() <= 60 * loss[u.abs() <= 10].abs().max()
                axes.plot(u[keep], loss[keep], color=colour, label=f"{label} row")

    return picture(draw, xlabel="outcome u (nats)", ylabel="loss of a row")
