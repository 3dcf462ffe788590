"""Generates the pages of the site that come from the code: MkDocs calls ``on_files`` before it reads any page."""

from __future__ import annotations

import inspect
import io
import json
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
from mkdocs.structure.files import File, Files
from notebook_page import notebook_page
from reference_plots import plot_objective, plot_reference_point, plot_reward, plot_value, rows_of, step

import halos_pl.data.transforms
import halos_pl.objective.baselines
import halos_pl.objective.feedback
import halos_pl.objective.policy_weights
import halos_pl.objective.reference_points
import halos_pl.objective.rewards
import halos_pl.policy.moving_reference
import halos_pl.policy.reference
import value_functions
from halos_pl.batch import Needs
from halos_pl.cli.convert import peers
from halos_pl.cli.help_page import COMMANDS
from halos_pl.cli.main import main
from halos_pl.conformance.clause import EXPLANATIONS
from halos_pl.conformance.explain import CLAUSES, code
from halos_pl.convert.table import table
from halos_pl.data.transforms import Transform
from halos_pl.evaluation.metrics import METRICS
from halos_pl.labels import Labels
from halos_pl.objective.build import load_objective
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.policy_weights import PolicyWeight
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from halos_pl.policy.reference import ReferenceModel
from value_functions import Identity, Logistic, LogSigmoid, ValueFunction

ROOT = Path(__file__).resolve().parents[1]
#: Arguments of plug-ins that cannot be created without any.
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "Scaled": lambda: {"value_function": Logistic(), "by": 2.0},
    "Shifted": lambda: {"value_function": LogSigmoid(), "by": 10.0},
    "LossAverse": lambda: {"value_function": Identity(), "loss_aversion": 2.25},
    "Clipped": lambda: {"value_function": Identity(), "low": -10.0, "high": 10.0},
    "Mixture": lambda: {"value_functions": [Logistic(), Identity()], "weights": [0.8, 0.2]},
    "Constant": lambda: {"value": 1.0},
    "Flipped": lambda: {"feedback": halos_pl.objective.feedback.Binary()},
    "ByLength": lambda: {"feedback": halos_pl.objective.feedback.Binary(), "power": -1.0},
}


def plugins(kind: type, *modules: Any) -> list[type]:
    """The concrete classes of a kind in ``modules``, sorted by name."""
    known = [value for module in modules for _, value in inspect.getmembers(module, inspect.isclass)]
    classes = {value for value in known if issubclass(value, kind)}
    if kind is ValueFunction:
        classes = {getattr(value_functions, name) for name in value_functions.__all__}
    return sorted((cls for cls in classes if not inspect.isabstract(cls)), key=lambda cls: cls.__name__)


def example(cls: type) -> Any:
    """An instance with default arguments, or with those in ``ARGUMENTS``."""
    return cls(**ARGUMENTS.get(cls.__name__, dict)())


def call(cls: type) -> str:
    """``example(cls)`` as Python code."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return f"[{', '.join(map(shown, value))}]"
        return f"{type(value).__name__}()" if isinstance(value, torch.nn.Module) else repr(value)

    arguments = ARGUMENTS.get(cls.__name__, dict)()
    return f"{cls.__name__}({', '.join(f'{name}={shown(value)}' for name, value in arguments.items())})"


def needs_line(needs: Needs) -> str:
    """The needs of a plug-in as a sentence."""
    names = [f.name for f in fields(needs) if getattr(needs, f.name)]
    return f"Needs: {', '.join(f'`{name}`' for name in names)}." if names else "Needs nothing."


def entry(cls: type, plot: str | None) -> str:
    """The section of a class: docstring, plot, needs."""
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
    """Sign and weight of two pairs and a mismatched row, as a table."""
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
    """The section of an objective file, and its plot if the objective is a single HALO."""
    text = path.read_text(encoding="utf-8")
    head = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    objective: Objective = load_objective(path)
    body = yaml.safe_load(text)
    lines = [f"## {path.stem}\n", " ".join(head) + "\n"]
    if path.stem in verdicts:
        icml, v1, _ = verdicts[path.stem]
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
    """The loss of an objective as text."""
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
    """The verdicts of reference/verdicts.md and the remark beside them, by objective."""
    text = (ROOT / "docs" / "reference" / "verdicts.md").read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line.startswith("|")
    ]
    return {name: rest for name, *rest in cells}


def help_text(words: list[str]) -> str:
    """The output of a command with ``--help``, 80 columns wide."""
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
    """Every command with its help text."""
    lines = ["# Command line\n", "Every command and its options, as printed by `halos COMMAND --help`.\n"]
    lines += ["| command | |\n|---|---|"]
    for name, summary in COMMANDS.items():
        lines[-1] += f"\n| [`halos {name}`](#halos-{name.replace(' ', '-')}) | {summary} |"
    lines[-1] += "\n"
    for name, summary in COMMANDS.items():
        lines.append(f"## halos {name}\n\n{summary}\n")
        if name in ("validate", "test", "predict"):
            lines.append("Takes the options of [`halos fit`](#halos-fit).\n")
        else:
            lines.append(f"```text\n{help_text(name.split()).strip()}\n```\n")
    return "\n".join(lines)


def clauses_page() -> str:
    """Every clause of the definition: its meaning, an example that fails it, and the remedy."""
    lines = [
        "# Clauses\n",
        "`halos check` tests these clauses of the [definition](../concepts/definition.md), each on the kind of plug-in "
        "that it belongs to. Each section shows a class that fails the clause, and the remedy; `halos check --explain "
        "CLAUSE` prints the same.\n",
    ]
    for kind, laws in CLAUSES.items():
        lines.append(f"## {kind}\n")
        for law in laws:
            name = law.__name__
            text = EXPLANATIONS[name]
            lines.append(f"### {name}\n\n{text.means}\n\n```python\n{code(name)}\n```\n\n**Remedy.** {text.cure}\n")
    return "\n".join(lines)


def evaluation_metrics_page() -> str:
    """Every metric of ``halos evaluate``."""
    better = {True: "higher", False: "lower", None: "–"}
    lines = [
        "# Evaluation metrics\n",
        "[`halos evaluate`](../howto/evaluate.md) measures these; [studies](../howto/study.md) compare them. Reward "
        "is the log-ratio to the reference: the model before training, or `--reference`.\n",
        "| metric | meaning | measured on | better |\n|---|---|---|---|",
    ]
    for name, metric in METRICS.items():
        lines[-1] += f"\n| `{name}` | {metric.meaning} | {metric.unit} | {better[metric.higher_is_better]} |"
    lines.append(
        "\nRows with the same prompt are not independent, so they count as one example: the n of a metric is a number "
        "of prompts. A metric of prompts is a mean over prompts, and a repeated prompt has the mean of its answers; a "
        "metric of held-out data is a mean over pairs or rows. Examples are pairs or single rows.\n\nEach "
        "[benchmark](../howto/benchmarks.md) of "
        "`--tasks` is a metric too, with the name of the task: the score of each question, from 0 to 1.\n"
    )
    return "\n".join(lines)


KINDS: list[tuple[str, str, type, Any, str]] = [
    (
        "value_functions",
        "Value functions",
        ValueFunction,
        (value_functions,),
        "v(u) is the value of an outcome u = r − z0. In a HALO, v is non-decreasing everywhere and concave on gains "
        "(u > 0). Each plot shows v for outcomes of up to 40 nats.",
    ),
    (
        "reference_points",
        "Reference points",
        ReferencePoint,
        (halos_pl.objective.reference_points,),
        "The reward of a row is compared with [z0](../concepts/reference_point.md). Each plot shows z0 of the first "
        "row of one fixed step (four pairs and four mismatched rows) as all rewards of the step rise together: a slope "
        "of 1 means that z0 follows the rewards, a slope of 0 that it does not.",
    ),
    (
        "rewards",
        "Rewards",
        Reward,
        (halos_pl.objective.rewards,),
        "r(x, y) measures how much more likely the policy makes a completion than the reference does. Each plot shows "
        "r of a one-token completion against its log-ratio. If the reward needs a pair, the other completion has the "
        "same log-prob under policy and reference.",
    ),
    (
        "feedback",
        "Feedback",
        Feedback,
        (halos_pl.objective.feedback,),
        "Feedback gives each row a sign a and a weight w, and the denominator of the loss. Each table shows the same "
        "example: two pairs and one mismatched row.",
    ),
    (
        "extra_terms",
        "Extra terms",
        Objective,
        (halos_pl.objective.baselines, halos_pl.objective.classification),
        "Terms that are not HALOs: the baselines, and the terms that composites add to a HALO in `extra_terms`.",
    ),
    (
        "policy_weights",
        "Policy weights",
        PolicyWeight,
        (halos_pl.objective.policy_weights,),
        "Numbers that depend on the policy, without gradient. `PolicyWeighted` in `extra_terms` applies one to a HALO; "
        "such a loss is a composite, because the weights of a HALO do not depend on the policy. `wpo`, `beta_dpo` and "
        "`fipo` are examples.",
    ),
    (
        "reference_models",
        "Reference models",
        ReferenceModel,
        (halos_pl.policy.moving_reference, halos_pl.policy.reference),
        "`model.reference_model` selects the model that computes log π_ref. The default is `AdapterOff` with LoRA and "
        "`FrozenCopy` without.",
    ),
    (
        "transforms",
        "Transforms",
        Transform,
        (halos_pl.data.transforms,),
        "`data.transforms` is a list of changes to the training data. They draw from the seed and record counts in "
        "`summary.json`. [Your own data](../howto/data.md#order-and-transforms) shows how to use them.",
    ),
]


def convert_page() -> str:
    """Every setting of the libraries that ``halos convert`` reads: its default, and what becomes of it."""
    lines = [
        "# Converted settings\n",
        "[`halos convert`](../howto/convert.md) reads these settings. Those marked *converted* are used; the others "
        "are noted or refused if their value is not the default.\n",
    ]
    for peer in peers().values():
        whole = table(*peer.tables)
        lines.append(f"## {peer.title}\n\nRead from {whole.version}.\n\n| setting | default | |\n|---|---|---|")
        for key, each in whole.settings.items():
            meaning = f"error: {each.refuse}" if each.refuse else each.note or "*converted*"
            only = f" ({', '.join(each.only)})" if each.only else ""
            lines.append(f"| `{key}`{only} | `{json.dumps(each.default)}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Every generated file of the site: its path relative to docs/, and its content."""
    plots: dict[type, Callable[[type], bytes]] = {
        ValueFunction: lambda cls: plot_value(example(cls)),
        ReferencePoint: lambda cls: plot_reference_point(lambda: example(cls)),
        Reward: lambda cls: plot_reward(example(cls)),
    }
    for stem, title, kind, modules, text in KINDS:
        sections = [f"# {title}\n\n{text}\n"]
        for cls in plugins(kind, *modules):
            plot = None
            if kind in plots and not (kind is Reward and cls.needs.scalar):  # a learned reward has no curve
                plot = f"plots/{cls.__name__}.svg"
                yield f"reference/{plot}", plots[kind](cls)
            sections.append(entry(cls, plot))
            if kind is Feedback:
                sections.append(f"The example under `{call(cls)}`:\n\n{feedback_table(example(cls))}")
        yield f"reference/{stem}.md", "\n".join(sections)
    computed = verdicts()
    sections = [
        "# Objectives\n\nThe shipped losses. Each is a file in `experiments/objectives/`; `halos fit --objective NAME` "
        "trains with it. Plots show the weighted loss of one row against its outcome. [Verdicts](verdicts.md) lists "
        "which are HALOs.\n"
    ]
    for path in sorted((ROOT / "experiments" / "objectives").glob("*.yaml")):
        section, svg = objective_section(path, computed)
        sections.append(section)
        if svg:
            yield f"reference/plots/objective_{path.stem}.svg", svg
    yield "reference/objectives.md", "\n".join(sections)
    yield "reference/cli.md", cli_page()
    yield "reference/clauses.md", clauses_page()
    yield "reference/convert.md", convert_page()
    yield "reference/evaluation_metrics.md", evaluation_metrics_page()
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
        page, figures = notebook_page(path.stem, path.read_text(encoding="utf-8"))
        source = f"[Download this page as a script with cells]({path.name}).\n"
        yield f"notebooks/{path.stem}.md", f"{page}\n{source}"
        for name, figure in figures.items():
            yield f"notebooks/{name}", figure
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        yield name.lower(), (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for folder, place in ((ROOT / "benchmarks", "performance"), (ROOT / "experiments/ablations/results", "results")):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".md", ".png", ".csv"):
                yield f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes()


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated files to those in docs/."""
    for path, content in pages():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Replaces Sphinx roles of docstrings by the last part of the name in code font."""
    return re.sub(r":(?:class|meth|mod|func|attr):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
