"""The page ``docs/reference/parity.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from parity.batch import PAIRS, fixed_batch
from parity.library import link
from parity.table import Ours, Row, headings, libraries

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "reference" / "parity.md"

INTRODUCTION = """---
hide: [toc]
---

# Parity with other libraries

Losses of the same name are often different losses. This page compares losses of other libraries with [our
objectives](objectives.md) on the same {pairs} pairs and {mismatched} mismatched rows: the losses, and their gradients
in the log-prob of every token. Constants are those of our files, such as β = 0.1, unless a row states another one.
`make parity` recomputes everything.

- **equal**: loss and gradient are equal up to rounding.
- **offset**: the gradient is equal, and the losses differ by a constant or by a part without gradient. Training is the
  same.
- **scale**: the gradient is ours times a number. With another learning rate, the training is the same for SGD, and
  nearly so for Adam.
- **other loss**: the gradients have different directions. Behind it: their loss minus ours, and the norm of the
  difference of the gradients as a share of the norm of ours.

*Measured* rows call the library's own code. *By formula*, the formula was written out from the file and lines that the
row links to, or from a paper where no code was read. The first objective in a row is the one that has the loss's name.
To add a row, write an entry in `benchmarks/parity/table.yaml` and, if the library is not called, its formula in
`benchmarks/parity/libraries/`; then run `make parity`.

| library | code | how known |
|---|---|---|
{libraries}

r is the log-ratio of policy and reference of a completion, ℓ its log-prob, both summed over its tokens; r̄ and ℓ̄ are
means over its tokens. Δ is chosen minus rejected (w, l), σ the logistic function, ρ the ratio of policy and old policy
at a token, A the advantage, k3 = 1/ρ + log ρ − 1, and s a score. axolotl runs the trainers of TRL 1.8 without losses of
its own.

## Same name, same loss?

=: equal to our objective of that name. ×: scale. ≠: another loss. Several signs: it depends on settings.

| loss | {titles} |
|---|{rule}
{matrix}
"""
HEAD = """| library, loss and source | formula | mean over | per length | π_ref | compared with ours |
|---|---|---|---|---|---|"""
SIGNS = {"equal": "=", "offset": "= + offset", "scale": "×", "other": "≠"}


def page(rows: Sequence[Row], numbers: Mapping[str, Any]) -> str:
    """The page's text."""
    of_libraries = libraries()
    matrix = []
    for loss in headings():
        cells = [
            _signs([row for row in rows if (row.loss, row.library) == (loss, name)], numbers) for name in of_libraries
        ]
        matrix.append(f"| [{loss}](#{_anchor(loss)}) | {' | '.join(cells)} |")
    sections = [
        INTRODUCTION.format(
            pairs=PAIRS,
            mismatched=len(fixed_batch().mismatched),
            libraries="\n".join(_library(name) for name in of_libraries),
            titles=" | ".join(library.title for library in of_libraries.values()),
            rule="---|" * len(of_libraries),
            matrix="\n".join(matrix),
        )
    ]
    verdicts = {each["name"]: each["verdict"]["icml"] for each in _objectives()}
    for loss, text in headings().items():
        of_loss = [row for row in rows if row.loss == loss]
        names = dict.fromkeys(ours.objective for row in of_loss for ours in row.ours)
        lines = [f"## {loss}\n\n{' '.join(text.split())}\n"]
        lines.append("\n".join(f"- [`{name}`](objectives.md#{name}): {verdicts[name]}" for name in names) + "\n")
        lines.append("\n".join([HEAD, *(_line(row, numbers[row.key]) for row in of_loss)]) + "\n")
        sections.append("\n".join(lines))
    return "\n".join(sections)


def _objectives() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "experiments" / "objectives.json").read_text(encoding="utf-8"))
    return found


def _library(name: str) -> str:
    library = libraries()[name]
    if not library.repository:
        return f"| {library.title} | repositories that are named in the rows, and papers | by formula |"
    how = f"measured, version {library.version}" if library.called else "by formula"
    revision = library.revision if library.called else library.revision[:10]
    tree = f"https://github.com/{library.repository}/tree/{library.revision}"
    return f"| {library.title} | [{revision}]({tree}) | {how} |"


def _anchor(heading: str) -> str:
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -")
    return "-".join(kept.split())


def _signs(rows: Sequence[Row], numbers: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys(SIGNS[numbers[row.key]["against"][0]["kind"]] for row in rows))


def _line(row: Row, numbers: Mapping[str, Any]) -> str:
    library = libraries()[row.library]
    compared = [_compared(ours, found) for ours, found in zip(row.ours, numbers["against"], strict=True)]
    lengths = row.lengths if isinstance(row.lengths, str) else _yes(row.lengths)
    owner = library.title if library.repository else row.repository.partition("@")[0] or "Paper"
    how = "measured" if library.called else "by formula"
    cells = [
        f"**{owner}** {row.name}<br>{how}: {_source(row)}",
        f"`{row.formula}`" + (f"<br>{row.note}" if row.note else ""),
        row.mean,
        lengths,
        _yes(numbers["reference"]),
        "<br>".join(compared),
    ]
    return f"| {' | '.join(cells)} |"


def _source(row: Row) -> str:
    if not row.code:
        return f"{row.place}; code not read"
    return f"[`{row.place.rpartition('/')[2]}`]({link(row.code, row.place)})"


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _compared(ours: Ours, found: Mapping[str, Any]) -> str:
    name = f"`{ours.objective}`"
    if ours.changes:
        settings = yaml.safe_dump(dict(ours.changes), default_flow_style=True, sort_keys=False, width=1000).strip()
        name += f" with `{settings}`"
    apart = found["theirs"] - found["ours"]
    words = {
        "equal": "equal",
        "offset": f"**offset** {apart:+.3g}",
        "scale": f"**scale** × {found['scale']:.3g}",
        "other": f"**other loss** ({apart:+.3g}, {found['gradient']:.0%})",
    }
    return f"{name}: {words[found['kind']]}"
