"""What the figures of a report share: sizes, the looks of arms, labels and legends."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from halos_pl.study.results import Results
from halos_pl.study.spec import Arm

#: Inches: on a page, and on a phone, where panels are stacked.
WIDTH, NARROW = 6.2, 3.5
#: Okabe and Ito 2008, safe for colour-blind readers; without yellow, which is too pale on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
LINES = ("-", "--", ":", "-.")
MARKERS = ("", "o", "s", "^", "D", "v", "P", "X", "*")
SIGNIFICANT, NOT = "#0072B2", "#777777"


def look(number: int) -> dict[str, Any]:
    """Colour, line and marker of the arm with this number; the first 252 are distinct."""
    line, marker = number // len(COLOURS), number // (len(COLOURS) * len(LINES))
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[line % len(LINES)],
        "marker": MARKERS[marker % len(MARKERS)],
    }


def looks(results: Results) -> dict[str, dict[str, Any]]:
    """Styles by arm, in the study's order; the baseline is black."""
    arms = sorted(results.study.arms, key=lambda arm: arm is not results.baseline)
    return {arm.name: look(number) for number, arm in enumerate(arms)}


def png(figure: Figure) -> bytes:
    """A PNG with 256 colours, a third of the size; the colours of arms stay exact. Equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    image = Image.open(buffer).convert("RGB")
    pixels = np.asarray(image, dtype=np.int64)
    codes, places = np.unique(pixels @ np.array([65536, 256, 1]), return_inverse=True)
    colours = np.stack([codes // 65536, codes // 256 % 256, codes % 256], axis=1)
    kept = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in dict.fromkeys((*COLOURS, SIGNIFICANT, NOT, "#FFFFFF"))]
    rest = image.quantize(256 - len(kept)).getpalette() or []
    palette = np.array([*kept, *np.reshape(rest, (-1, 3)).tolist()])
    nearest = np.concatenate(
        [((some[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1) for some in np.array_split(colours, 32)]
    )
    drawn = Image.fromarray(nearest[places].reshape(pixels.shape[:2]).astype(np.uint8), mode="P")
    drawn.putpalette(palette.flatten().tolist())
    out = io.BytesIO()
    drawn.save(out, format="PNG", optimize=True)
    return out.getvalue()


def label(name: str, width: int = 30) -> str:
    """An arm's name, wrapped and escaped: matplotlib reads $ as a formula, and leaves _names out of legends."""
    name = "\n".join(textwrap.wrap(name, width) or [name]).replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def legend_size(arms: list[Arm], width: float) -> tuple[dict[str, str], int, float]:
    """The labels of a legend by arm, its number of columns, and its height in inches."""
    names = {arm.name: label(arm.name, 40 if width == WIDTH else 30) for arm in arms}
    longest = max(len(line) for name in names.values() for line in name.split("\n"))
    columns = max(1, min(3, len(arms), int((width - 0.3) / (0.085 * longest + 0.6))))
    lines = sum(1 + name.count("\n") for name in names.values()) / columns + 1
    return names, columns, 0.19 * lines


def legend(figure: Figure, handles: dict[str, Any], names: dict[str, str], columns: int) -> None:
    """A legend below the axes, of the arms that are drawn."""
    figure.legend(
        [handles[name] for name in names if name in handles],
        [text for name, text in names.items() if name in handles],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3,
    )
