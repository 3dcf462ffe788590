"""``halos objectives``: lists the shipped losses from a table that ``halos check --all --write`` makes."""

from __future__ import annotations

import json

from halos_pl.common.experiments import OBJECTIVES_TABLE, config_file
from halos_pl.common.experiments import objectives as shipped


def objectives(*, show: str | None = None) -> None:
    """List the shipped losses with formula, needs and verdict.

    Args:
        show: print the file of this loss instead: a name of the list, or a YAML file.
    """
    if show is not None:
        path = config_file(show, shipped(), "--show")
        print(f"# {path}\n{path.read_text(encoding='utf-8').rstrip()}")
        return
    print(
        "halos fit --objective NAME takes these. Below each: v(r - z0), feedback; what it needs. The verdict is that of"
    )
    print("halos check under ICML 2024, Def. 3.4.")
    rows = json.loads(OBJECTIVES_TABLE.read_text(encoding="utf-8"))
    width = max(len(each["name"]) for each in rows)
    for each in rows:
        print(f"\n{each['name']:<{width}}  {each['verdict']['icml']}")
        print(f"    {each['formula']}; needs {', '.join(each['needs']) or 'nothing'}")
