"""Runs a sweep: all cells, round of seeds by round of seeds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halos_pl.candidates.fitting import Fitted, fit
from halos_pl.candidates.measure import METRICS, Data, choose, prepare
from halos_pl.candidates.read import Preferences, read_preferences
from halos_pl.candidates.report import write_report
from halos_pl.candidates.spec import FIRST_TUNE, Cell, Sweep, load_sweep
from halos_pl.candidates.values import Values, best_rate, claim, digest
from halos_pl.candidates.votes import draw
from halos_pl.common.messages import plain
from halos_pl.common.progress import Progress
from halos_pl.objective.halo import Objective
from halos_pl.provenance import provenance
from halos_pl.study.spec import StudyError


def sweep(study: Path, folder: Path) -> Path:
    """Runs what is left of a sweep, and writes its report.

    Args:
        study: file with ``policy: candidates``.
        folder: folder of its values.

    Returns:
        The report.

    Raises:
        StudyError: names the line, row or setting at fault, before anything is fitted.
        DataError, ModelError: as :func:`halos_pl.candidates.read.read_preferences`.
    """
    made = provenance()  # now: the code may change while this process runs
    spec, built = load_sweep(study)
    began = time.perf_counter()
    read = read_preferences(
        [*spec.train, *spec.held_out],
        spec.model,
        reference=spec.reference,
        states=spec.states > 0,
        precision=spec.precision,
        max_length=spec.max_length,
        text_prompts=spec.text_prompts,
    )
    seconds = time.perf_counter() - began
    if spec.reference:
        print(f"halos: log pi_ref: {read.scored} rows computed, {read.stored} found in the cache ({seconds:.0f} s)")
    try:
        data = prepare(spec, read)
    except ValueError as error:
        raise StudyError(f"{study}: {error}") from error
    claim(spec, built, study, folder, {**_record(read, data), **made})
    values = Values(spec, folder)
    rates = _tuned(spec, built, data, values)
    done = values.rounds()
    work = [(cell, seeds) for seeds in spec.rounds for cell in spec.cells if seeds not in done[cell]]
    with Progress(len(spec.rounds) * len(spec.cells), "fitting", done=len(spec.rounds) * len(done) - len(work)) as bar:
        for cell, seeds in work:
            _round(spec, built[cell], data, values, cell, seeds, rates[cell])
            bar.advance(note=_name(spec, cell))
    report = write_report(spec, folder)
    print(plain(f"halos: the report is {report}"))
    return report


def _name(spec: Sweep, cell: Cell) -> str:
    axes = [f"{key.split('.')[-1]} {value}" for key, value in zip(spec.axes, cell.axes, strict=True)]
    return ", ".join([cell.arm, *axes, f"noise {cell.noise:g}", f"desirable {cell.desirable:g}"])


def _record(read: Preferences, data: Data) -> dict[str, Any]:
    """What the report says about data and machine."""
    return {
        "data": digest(read),
        "training": {
            "preferences": len(data.pairs),
            "prompts": data.candidates.prompts,
            "completions": int(data.candidates.reference_logps.isfinite().sum()),
            "parameters": data.candidates.dimension,
        },
        "tuning_prompts": len(data.tune.names) if data.tune else 0,
        "prompts": data.report.names,
        "before": [round(gap, 4) for gap in data.report.before.tolist()],
        "tokens": round(sum(read.tokens) / len(read.tokens), 1),
        "date": datetime.now(UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
    }


def _fit(spec: Sweep, objective: Objective, data: Data, cell: Cell, seeds: range, rates: list[float]) -> Fitted:
    votes = draw(
        data.pairs,
        seeds,
        count=spec.votes,
        noise=cell.noise,
        desirable=cell.desirable,
        paired=objective.needs.pairs,
    )
    return fit(objective, data.candidates, votes, rates=rates, steps=spec.steps)


def _tuned(spec: Sweep, built: Mapping[Cell, Objective], data: Data, values: Values) -> dict[Cell, float]:
    """The learning rate of each cell; those that have none yet are tuned, on seeds that are not reported."""
    known = values.curves()
    seeds = range(FIRST_TUNE, FIRST_TUNE + spec.tune_seeds)
    done = sum(len(known.get(cell, {})) == len(spec.rates) for cell in spec.cells)
    with Progress(len(spec.cells), "choosing rates", done=done) as bar:
        for cell in spec.cells:
            if len(known.get(cell, {})) == len(spec.rates):
                continue
            try:
                fitted = _fit(spec, built[cell], data, cell, seeds, spec.rates)
                _, figures = choose(fitted, data.tune, spec.tune)
            except ValueError as error:
                raise StudyError(f"{_name(spec, cell)}: {error}") from error
            values.add_rates(cell, figures)
            bar.advance(note=_name(spec, cell))
    curves = values.curves()
    return {cell: best_rate(curves[cell]) for cell in spec.cells}


def _round(
    spec: Sweep, objective: Objective, data: Data, values: Values, cell: Cell, seeds: range, rate: float
) -> None:
    began = time.perf_counter()
    fitted = _fit(spec, objective, data, cell, seeds, [rate])
    seconds = time.perf_counter() - began
    theta: Tensor = fitted.theta[0]
    parts = [data.report(some) for some in theta.split(16)]
    metrics = {name: torch.cat([part[name] for part in parts]) for name in METRICS}
    if not all(bool(each.isfinite().all()) for each in (theta, *metrics.values())):
        raise StudyError(f"{_name(spec, cell)}: parameters are not finite at the rate {rate:g}; lower the rates")
    columns = [metrics[name].mean(1).tolist() for name in METRICS]
    lines = [*zip(*columns, fitted.loss[0].tolist(), strict=True)]
    values.add_seeds(cell, seeds, lines, metrics[spec.primary].mean(0).tolist(), seconds)
