"""The report of a sweep, from its tables alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from halos_pl.candidates.differences import Difference, Mean, differences, means, over_chance
from halos_pl.candidates.figures import axes_name, heat_map, lines
from halos_pl.candidates.measure import METRICS
from halos_pl.candidates.spec import Cell, Sweep, load_sweep
from halos_pl.candidates.values import STUDY, Values, best_rate, read_record
from halos_pl.common.files import write
from halos_pl.common.messages import counted
from halos_pl.study.drawing import png
from halos_pl.study.spec import StudyError

REPORT, MAP, LINES = "report.md", "map.png", "lines.png"


def read_sweep(folder: Path) -> tuple[Sweep, Values]:
    """The sweep in a folder and its tables.

    Raises:
        StudyError: the folder is not that of a sweep.
    """
    spec, _ = load_sweep(folder / STUDY)
    return spec, Values(spec, folder)


def write_report(spec: Sweep, folder: Path) -> Path:
    """Writes ``report.md`` and its figures.

    Raises:
        StudyError: nothing has been measured.
    """
    values, record = Values(spec, folder), read_record(folder)
    of_cells, found = means(values), differences(values)
    if not of_cells:
        raise StudyError(f"{folder}: nothing to report: no cell has been measured")
    drawn: list[str] = []
    for name, figure in ((MAP, heat_map(spec, found)), (LINES, lines(spec, of_cells))):
        if figure is not None:
            _draw(folder / name, figure)
            drawn.append(name)
    text = "\n".join(_text(spec, values, record, of_cells, found, drawn)) + "\n"
    write(folder / REPORT, text)
    return folder / REPORT


def _draw(path: Path, figure: Figure) -> None:
    path.write_bytes(png(figure))


def status_lines(spec: Sweep, values: Values) -> Iterator[str]:
    """How far each round is."""
    done, tuned = values.rounds(), values.curves()
    rates = sum(len(tuned.get(cell, {})) == len(spec.rates) for cell in done)
    yield f"learning rates of {rates} of {counted(len(done), 'cell')}"
    for seeds in spec.rounds:
        fitted = sum(seeds in of_cell for of_cell in done.values())
        yield f"seeds {seeds[0]} to {seeds[-1]}: {fitted} of {counted(len(done), 'cell')}"


def _text(
    spec: Sweep,
    values: Values,
    record: Mapping[str, Any],
    of_cells: Mapping[Cell, Mean],
    found: Mapping[Cell, Difference],
    drawn: Sequence[str],
) -> Iterator[str]:
    yield f"# {spec.note or 'Policies over candidates'}"
    yield ""
    yield from _control(spec, values)
    yield _first_line(spec, found)
    yield ""
    for name in drawn:
        yield f"![{name}]({name})\n"
    yield from _about(spec, values, record, of_cells)
    yield ""
    yield from _cells(spec, values, of_cells, found)
    yield from _others(spec, values)


def _control(spec: Sweep, values: Values) -> Iterator[str]:
    """Whether anything was learned where that is easiest."""
    if spec.primary not in ("accuracy", "follows", "chosen"):
        return
    above = over_chance(values)
    tests = len(above)
    best = max(above, key=lambda cell: above[cell].effect - above[cell].reach_of(tests), default=None)
    if best is None:
        return
    each, reach = above[best], above[best].reach_of(tests)
    interval = f"[{0.5 + each.effect - reach:.3f}, {0.5 + each.effect + reach:.3f}]"
    of = f", the best of {tests} cells (Bonferroni)" if tests > 1 else ""
    text = f"{best.arm} has {0.5 + each.effect:.3f} {interval} with the cleanest preferences{of}; chance is 0.5."
    yield f"Positive control: {text}" if each.effect > reach else f"**No positive control**: {text} Claim nothing."
    yield ""


def _first_line(spec: Sweep, found: Mapping[Cell, Difference]) -> str:
    """How many points each arm wins and loses."""
    if not found:
        return f"{spec.primary} of one arm; there is nothing to compare it with."
    parts = []
    for arm in dict.fromkeys(cell.arm for cell in found):
        of_arm = [each for cell, each in found.items() if cell.arm == arm]
        above, below = (sum(each.decided and sign * each.effect > 0 for each in of_arm) for sign in (1, -1))
        parts.append(f"{arm} is significantly above {spec.reference_arm} at {above} and below it at {below} of")
        parts[-1] += f" {counted(len(of_arm), 'point')}"
    return f"On {spec.primary}, {'; '.join(parts)} (Holm over all {len(found)})."


def _about(spec: Sweep, values: Values, record: Mapping[str, Any], of_cells: Mapping[Cell, Mean]) -> Iterator[str]:
    training, numbers = record["training"], sorted({each.seeds for each in of_cells.values()})
    seeds = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    yield "## How it was made"
    yield ""
    yield f"- Command: `halos ablate {STUDY} --out FOLDER`, with this folder's {STUDY}."
    yield (
        f"- Trained on {training['preferences']} preferences about {training['prompts']} prompts"
        f" ({training['completions']} completions, {record['tokens']:g} tokens on average); each seed draws"
        f" {spec.votes} of them. {training['parameters']} parameters, {spec.steps} steps of Adam on all rows of a seed."
    )
    tuned = (
        f"its mean {spec.tune} over {counted(record['tuning_prompts'], 'other held-out prompt')}"
        if record["tuning_prompts"]
        else "its training loss"
    )
    yield (
        f"- Each cell's learning rate was chosen by {tuned} and {counted(spec.tune_seeds, 'seed')} that"
        f" {'are' if spec.tune_seeds > 1 else 'is'} not reported."
    )
    where = "prompts of training" if spec.measure_on == "training_prompts" else "held-out prompts"
    yield f"- Measured on {len(record['prompts'])} {where} of equal weight, with {seeds} of {spec.seeds} seeds."
    yield f"- {spec.primary}: {METRICS[spec.primary]}."
    if spent := [(n, s) for rounds in values.of_prompts().values() for n, s, _ in rounds.values()]:
        each = 1000 * sum(s for _, s in spent) / sum(n for n, _ in spent)
        yield f"- {sum(n for n, _ in spent)} fits at the chosen rates took {each:.1f} ms of wall time each on average."
    made = f"{record['machine']}, {counted(record['threads'], 'thread')}, torch {record['versions']['torch']}"
    yield f"- {record['date']}; {made}; halos_pl {record['halos_pl']}."
    yield ""
    yield (
        "The seeds share these prompts and draw from the same preferences: ± over seeds alone says nothing about other"
        " prompts. A difference's interval and p are over new seeds and new prompts; both standard errors are given. A"
        " completion counts as one token, and KTO's z0 (`CandidateKL`) is exact; it is not the paper's estimate."
    )


def _cells(
    spec: Sweep, values: Values, of_cells: Mapping[Cell, Mean], found: Mapping[Cell, Difference]
) -> Iterator[str]:
    curves, edges = values.curves(), 0
    others = [arm for arm in spec.arms if arm != spec.reference_arm]
    heads = [f"{arm} (SD over seeds; rate)" for arm in spec.arms]
    heads += [
        part
        for arm in others
        for part in (f"{arm} - {spec.reference_arm} [95 %]", "SE over seeds, prompts", "p (Holm)")
    ]
    yield f"## {spec.primary}"
    for axes in dict.fromkeys(cell.axes for cell in spec.cells):
        yield ""
        if axes:
            yield f"### {axes_name(spec, axes)}\n"
        yield f"| flipped | chosen kept | {' | '.join(heads)} |"
        yield f"|{'---|' * (2 + len(heads))}"
        for cell in dict.fromkeys(cell.point for cell in spec.cells if cell.axes == axes):
            row = [f"{cell.noise:.0%}", f"{cell.desirable:.0%}"]
            for arm in spec.arms:
                mean, curve = of_cells.get(cell._replace(arm=arm)), curves.get(cell._replace(arm=arm), {})
                best = best_rate(curve) if curve else 0.0
                edge = len(curve) > 1 and best in (min(curve), max(curve))
                edges += edge
                text = f"{mean.value:.3f} ± {mean.seed_sd:.3f}; {best:g}{', edge' if edge else ''}" if mean else ""
                row.append(text)
            for arm in others:
                each = found.get(cell._replace(arm=arm))
                row += _row(each) if each else ["", "", ""]
            yield f"| {' | '.join(row)} |"
    if edges:
        yield ""
        yield (
            f"In {edges} of {len(spec.cells)} cells the best rate is at an edge of the grid; unless the curve is flat"
            " there (rates.csv.gz), widen `rates`."
        )


def _row(each: Difference) -> list[str]:
    mark = "**" if each.decided else ""
    return [
        f"{mark}{each.effect:+.3f}{mark} [{each.effect - each.reach:+.3f}, {each.effect + each.reach:+.3f}]",
        f"{each.seeds:.4f}, {each.prompts:.4f}",
        "< 0.001" if each.p < 0.001 else f"{each.p:.2g}",
    ]


def _others(spec: Sweep, values: Values) -> Iterator[str]:
    """The other metrics, exploratory: means over seeds."""
    by_seed = values.seeds()
    names = [name for name in METRICS if name != spec.primary]
    yield ""
    yield "## Other metrics"
    yield ""
    yield "Exploratory: means over seeds."
    yield ""
    yield "; ".join(f"{name}: {METRICS[name]}" for name in names) + "."
    yield ""
    point = [key.rpartition(".")[2] for key in spec.axes]
    yield f"| arm | {' | '.join([*point, 'flipped', 'chosen kept', *names])} |"
    yield f"|{'---|' * (3 + len(point) + len(names))}"
    for cell, seeds in by_seed.items():
        if seeds:
            each = [f"{statistics.fmean(line[name] for line in seeds.values()):.3f}" for name in names]
            row = [cell.arm, *map(str, cell.axes), f"{cell.noise:.0%}", f"{cell.desirable:.0%}", *each]
            yield f"| {' | '.join(row)} |"
