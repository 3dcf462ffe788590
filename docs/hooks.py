"""The pages of the site that come from the code: MkDocs calls ``on_files`` before it reads any page."""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib import rc_context
from matplotlib.figure import Figure
from mkdocs.structure.files import File, Files

import halos_pl.data.transforms
import halos_pl.objective.baselines
import halos_pl.objective.feedback
import halos_pl.objective.reference_points
import halos_pl.objective.rewards
import halos_pl.policy.reference
import value_functions
from halos_pl.batch import Labels, LogProbBatch, Needs
from halos_pl.cli.help_page import COMMANDS
from halos_pl.cli.main import main
from halos_pl.data.transforms import Transform
from halos_pl.objective.build import load_objective
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import LogRatio, Reward
from halos_pl.policy.reference import ReferenceModel
from value_functions import Identity, Logistic, LogSigmoid, ValueFunction

ROOT = Path(__file__).resolve().parents[1]
DESIRABLE, UNDESIRABLE, NEUTRAL = "#1b7f5c", "#c2452d", "#4a4a4a"
#: Arguments for the plug-ins that have some without a default.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "Scaled": lambda: {"value_function": Logistic(), "by": 2.0},
    "Shifted": lambda: {"value_function": LogSigmoid(), "by": 10.0},
    "LossAverse": lambda: {"value_function": Identity(), "loss_aversion": 2.25},
    "Clipped": lambda: {"value_function": Identity(), "low": -10.0, "high": 10.0},
    "Mixture": lambda: {"value_functions": [Logistic(), Identity()], "weights": [0.8, 0.2]},
    "Constant": lambda: {"value": 1.0},
    "Flipped": lambda: {"feedback": halos_pl.objective.feedback.Binary()},
}


def plugins(kind: type, module: Any) -> list[type]:
    """The concrete classes of a kind that ``module`` holds, by name."""
    classes = {value for _, value in inspect.getmembers(module, inspect.isclass) if issubclass(value, kind)}
    if kind is ValueFunction:
        classes = {getattr(value_functions, name) for name in value_functions.__all__}
    return sorted((cls for cls in classes if not inspect.isabstract(cls)), key=lambda cls: cls.__name__)


def example(cls: type) -> Any:
    """An instance with default arguments, and those of ``ARGUMENTS`` where there is no default."""
    return cls(**ARGUMENTS.get(cls.__name__, dict)())


def call(cls: type) -> str:
    """How ``example(cls)`` is written in Python."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(shown, value))}]"
        return f"{type(value).__name__}()" if isinstance(value, torch.nn.Module) else repr(value)

    arguments = ARGUMENTS.get(cls.__name__, dict)()
    return f"{cls.__name__}({', '.join(f'{name}={shown(value)}' for name, value in arguments.items())})"


def needs_line(needs: Needs) -> str:
    """The needs of a plug-in, in a sentence."""
    names = [f.name for f in fields(needs) if getattr(needs, f.name)]
    return f"Needs: {', '.join(f'`{name}`' for name in names)}." if names else "Needs nothing."


def picture(draw: Callable[[Any], None], *, xlabel: str, ylabel: str) -> bytes:
    """An SVG of one panel; the same bytes each time."""
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
    """r of a one-token completion over its log-ratio; a pair's other completion keeps the reference's log-prob."""
    ratio = torch.linspace(-1.99, 1.99, 200)
    n = len(ratio)
    pair = torch.cat([torch.arange(n) + n, torch.arange(n)])
    labels = Labels(torch.arange(2 * n) < n, pair)
    policy = torch.cat([ratio - 2, torch.full((n,), -2.0)])
    r = reward(rows_of(policy, torch.full((2 * n,), -2.0), labels))[:n].reshape(n, -1)[:, 0]
    return picture(
        lambda axes: axes.plot(ratio, r, color=NEUTRAL), xlabel="log π_θ/π_ref, with log π_ref = −2", ylabel="r (nats)"
    )


def plot_reference_point(cls: type) -> bytes:
    """z0 of a step's first row as all rewards of the step are raised."""
    shifts = torch.linspace(-4, 4, 81).tolist()
    z0 = []
    for shift in shifts:
        rows = step(shift)
        z0.append(float(example(cls)(LogRatio()(rows), rows).value.reshape(-1)[0]))
    return picture(
        lambda axes: axes.plot(shifts, z0, color=NEUTRAL), xlabel="all rewards raised by (nats)", ylabel="z0 (nats)"
    )


def plot_objective(halo: HALO) -> bytes:
    """The loss of a row of either class over its outcome, as far as the class carries a loss at all."""
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


def entry(cls: type, plot: str | None) -> str:
    """A section of a class: docstring, plot, needs."""
    instance = example(cls) if issubclass(cls, torch.nn.Module) else None
    lines = [f"::: {cls.__module__}.{cls.__name__}\n    options: {{members: false, heading_level: 2}}\n"]
    if plot:
        lines.append(f"Plot of `{call(cls)}`:\n\n![{cls.__name__}]({plot})\n")
    if hasattr(instance, "needs"):
        lines.append(needs_line(instance.needs) + "\n")
    if isinstance(instance, ReferencePoint):
        lines.append(f"Scope: `{instance.scope}`.\n")
    if isinstance(instance, ValueFunction) and instance.violates:
        lines.append(f"Violates: {', '.join(f'`{clause}`' for clause in instance.violates)}.\n")
    return "\n".join(lines)


def feedback_table(feedback: Feedback) -> str:
    """What a feedback says of two pairs and a mismatched row."""
    labels = Labels(
        torch.tensor([True, False, True, False, False]),
        torch.tensor([1, 0, 3, 2, -1]),
        torch.arange(5) == 4,
        torch.tensor([0, 0, 1, 1, 0]),
        torch.tensor([0.5, -0.5, 1.0, -1.0, float("nan")]),
    )
    judged = feedback(rows_of(torch.zeros(5), torch.zeros(5), labels))
    names = ["chosen, score 0.5", "rejected, score −0.5", "chosen, score 1", "rejected, score −1", "mismatched"]
    lines = ["| row | a | w |", "|---|---|---|"]
    lines += [
        f"| {n} | {'−' if a < 0 else '+'}1 | {w:.3g} |"
        for n, a, w in zip(names, judged.sign, judged.weight, strict=True)
    ]
    return "\n".join([*lines, "", f"Denominator: {float(judged.denominator):g}.", ""])


def objective_section(path: Path, verdicts: dict[str, list[str]]) -> tuple[str, bytes | None]:
    """A section of an objective file, and its plot where the whole objective is one loss of outcomes."""
    text = path.read_text(encoding="utf-8")
    head = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    objective: Objective = load_objective(path)
    body = yaml.safe_load(text)
    lines = [f"## {path.stem}\n", " ".join(head) + "\n"]
    if path.stem in verdicts:
        icml, v1 = verdicts[path.stem]
        shown = f"**{icml}**" if icml == v1 else f"**{icml}** (ICML 2024), **{v1}** (arXiv v1)"
        lines.append(f"Verdict: {shown}.\n")
    lines.append(needs_line(objective.needs) + "\n")
    plot = None
    if isinstance(objective, HALO):
        lines.append(f"`{formula(objective)}`\n\n![Loss of a row under {path.stem}](plots/objective_{path.stem}.svg)\n")
        plot = plot_objective(objective)
    shown = yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=100)
    lines.append(f"```yaml\n{shown}```\n")
    return "\n".join(lines), plot


def formula(halo: HALO) -> str:
    """The loss as the parts of the objective make it."""
    judged = halo.feedback(step())
    start = f"{halo.loss_offset:g} " if halo.loss_offset else ""
    readings = {-1.0: "−v(u)", 1.0: "−v(−u)" if halo.reflect_undesirable else "v(u)"}
    if start:
        readings = {a: f"{start}{'− ' if t[0] == '−' else '+ '}{t.lstrip('−')}" for a, t in readings.items()}
    u = f"{type(halo.reward).__name__} − {type(halo.reference_point).__name__}"
    parts = [f"u = {u}", f"v = {halo.value_function!r}"]
    for label, row in (("desirable", 0), ("undesirable", 1)):
        if (weight := float(judged.weight[row])) > 0:
            term = readings[float(judged.sign[row])]
            parts.append(f"{label} row: {term if weight == 1 else f'{weight:.3g} · ({term})'}")
    return "; ".join(parts)


def verdicts() -> dict[str, list[str]]:
    """The verdicts of reference/verdicts.md, by objective."""
    text = (ROOT / "docs" / "reference" / "verdicts.md").read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {name: rest for name, *rest in cells}


def help_text(words: list[str]) -> str:
    """What a command prints for ``--help``, 80 columns wide."""
    out, program, columns = io.StringIO(), sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["halos"], "80"
    try:
        with redirect_stdout(out):
            main([*words, "--help"])
    except SystemExit:
        pass
    finally:
        sys.argv = program
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    text = out.getvalue().replace(str(Path.home()), "~")
    return "".join(c for c in text if c == "\n" or c.isprintable())


def cli_page() -> str:
    """Every command with the options that its parser knows."""
    lines = ["# Command line\n", "Generated from the parsers. `halos COMMAND --help` prints the same.\n"]
    shared = "validate", "test", "predict"
    for name, what in COMMANDS.items():
        lines.append(f"## halos {name}\n\n{what}\n")
        if name in shared:
            lines.append("Takes the options of [`halos fit`](#halos-fit), and `--ckpt_path`.\n")
        else:
            lines.append(f"```text\n{help_text(name.split()).strip()}\n```\n")
    return "\n".join(lines)


KINDS: list[tuple[str, str, type, Any, str]] = [
    (
        "value_functions",
        "Value functions",
        ValueFunction,
        value_functions,
        "v(u) is the value of an outcome u = r − z0.",
    ),
    (
        "reference_points",
        "Reference points",
        ReferencePoint,
        halos_pl.objective.reference_points,
        "z0 is what the reward of a row is compared with. Each plot shows z0 of the first row of one fixed step (four "
        "pairs and four mismatched rows) as all rewards of the step rise together: a slope of 1 means that z0 follows "
        "the rewards, 0 that it does not.",
    ),
    (
        "rewards",
        "Rewards",
        Reward,
        halos_pl.objective.rewards,
        "r(x, y) is what a completion is worth to the policy. Each plot shows r of a completion of one token over its "
        "log-ratio; where a pair is needed, the policy gives its other completion the log-prob of the reference.",
    ),
    (
        "feedback",
        "Feedback",
        Feedback,
        halos_pl.objective.feedback,
        "Feedback gives each row a sign a and a weight w, and the denominator of the loss. Each table shows the same "
        "example: two pairs and one mismatched row.",
    ),
    (
        "extra_terms",
        "Extra terms",
        Objective,
        halos_pl.objective.baselines,
        "Terms that are not HALOs: the baselines, and what composites add to a HALO in `extra_terms`.",
    ),
    (
        "reference_models",
        "Reference models",
        ReferenceModel,
        halos_pl.policy.reference,
        "`model.reference_model` chooses what gives log π_ref. The default is `AdapterOff` with LoRA and `FrozenCopy` "
        "without.",
    ),
    (
        "transforms",
        "Transforms",
        Transform,
        halos_pl.data.transforms,
        "`data.transforms` is a list of changes to the training data, drawn from the seed and counted in "
        "`summary.json`. [Your own data](../howto/data.md#order-and-transforms) shows how to use them.",
    ),
]


def notebook_page(text: str) -> str:
    """A script with cells as a page: Markdown cells as text, the others as Python."""
    sections = []
    for cell in re.split(r"(?m)^# %%", text)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            sections.append(re.sub(r"(?m)^# ?", "", body).strip())
        else:
            sections.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(sections) + "\n"


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Every generated file of the site: its path below docs/, and its content."""
    plots: dict[type, Callable[[type], bytes]] = {
        ValueFunction: lambda cls: plot_value(example(cls)),
        ReferencePoint: plot_reference_point,
        Reward: lambda cls: plot_reward(example(cls)),
    }
    for stem, title, kind, module, text in KINDS:
        sections = [f"# {title}\n\n{text}\n"]
        for cls in plugins(kind, module):
            plot = None
            if kind in plots:
                plot = f"plots/{cls.__name__}.svg"
                yield f"reference/{plot}", plots[kind](cls)
            sections.append(entry(cls, plot))
            if kind is Feedback:
                sections.append(f"The example under `{call(cls)}`:\n\n{feedback_table(example(cls))}")
        yield f"reference/{stem}.md", "\n".join(sections)
    computed = verdicts()
    sections = [
        "# Objectives\n\nEach is a file in `experiments/objectives/`; `halos fit --objective NAME` trains with it. "
        "Plots show the loss of one row, times its weight, over its outcome.\n"
    ]
    for path in sorted((ROOT / "experiments" / "objectives").glob("*.yaml")):
        section, svg = objective_section(path, computed)
        sections.append(section)
        if svg:
            yield f"reference/plots/objective_{path.stem}.svg", svg
    yield "reference/objectives.md", "\n".join(sections)
    yield "reference/cli.md", cli_page()
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
        source = f"[Download this page as a script with cells]({path.name}).\n"
        yield f"notebooks/{path.stem}.md", notebook_page(path.read_text(encoding="utf-8")) + "\n" + source
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        yield name.lower(), (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for folder, place in ((ROOT / "benchmarks", "performance"), (ROOT / "experiments/ablations/results", "results")):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".md", ".png", ".csv"):
                yield f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated files to those of docs/."""
    for path, content in pages():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects as Sphinx does; their last part is shown."""
    return re.sub(r":(?:class|meth|mod|func|attr):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
