"""Executes a script with cells and shows its output, for the pages below notebooks/."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import redirect_stdout
from functools import cache

import matplotlib
from matplotlib import pyplot


@cache
def notebook_page(stem: str, text: str) -> tuple[str, dict[str, bytes]]:
    """Executes a script with cells.

    Returns:
        The page (Markdown cells as text, the others as Python followed by their output), and its figures by name.
    """
    matplotlib.use("Agg")
    sections: list[str] = []
    figures: dict[str, bytes] = {}
    namespace: dict[str, object] = {"__name__": stem}
    for cell in re.split(r"(?m)^# %%", text)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            sections.append(re.sub(r"(?m)^# ?", "", body).strip())
            continue
        sections.append(f"```python\n{body.strip()}\n```")
        printed = io.StringIO()
        with redirect_stdout(printed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
            exec(compile(body, f"{stem}.py", "exec"), namespace)
        if printed.getvalue().strip():
            sections.append(f"```text\n{printed.getvalue().rstrip()}\n```")
        for number in pyplot.get_fignums():
            name, out = f"{stem}_{len(figures) + 1}.svg", io.BytesIO()
            pyplot.figure(number).savefig(out, format="svg")
            pyplot.close(number)
            figures[name] = out.getvalue()
            sections.append(f"![Output of the cell]({name})")
    return "\n\n".join(sections) + "\n", figures
