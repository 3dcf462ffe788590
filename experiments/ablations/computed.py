"""The part of a page that a script writes, between two comments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from halos_pl.common.files import write

BEGIN, END = "<!-- computed -->", "<!-- end of what is computed -->"


def replace_computed(page: Path, lines: Sequence[str]) -> None:
    """Replaces that part by these lines; all others stay."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    write(page, head + "\n".join([BEGIN, "", *lines, ""]) + "\n" + END + rest.partition(END)[2])
