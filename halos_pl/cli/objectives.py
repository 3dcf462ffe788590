"""``halos objectives``: lists the shipped losses from a table written by ``halos check --all --write``."""

from __future__ import annotations

import json

from halos_pl.common.experiments import OBJECTIVES_TABLE, config_file
from halos_pl.common.experiments import objectives as shipped


def objectives(*, show: str | None = None) -> None:
    """List the shipped losses with formula, needs and verdict.

    Args:
        show: loss whose file to print instead: a name from the list, or a YAML file.
    """
    if show is not None:
        path = config_file(show, shipped(), "--show")
        print(f"# {path}\n{path.read_text(encoding='utf-8').rstrip()}")
        return
    print("Losses for halos fit --objective NAME, with the verdict of halos check (ICML 2024, Def. 3.4).")
    print("Second line: v(r - z0), feedback; needs.")
    rows = json.loads(OBJECTIVES_TABLE.read_text(encoding="utf-8"))
    width = max(len(each["name"]) for each in rows)
    for each in rows:
        print(f"\n{each['name']:<{width}}  {each['verdict']['icml']}")
        print(f"    {each['formula']}; needs {', '.join(each['needs']) or 'nothing'}")
