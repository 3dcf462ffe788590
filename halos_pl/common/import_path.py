"""Imports plug-ins from the working folder, after installed packages."""

from __future__ import annotations

import os
import sys

#: Set for the processes of a study: ``python -P`` keeps the working folder off ``sys.path``, and ours puts it last.
FOLDER_LAST = "HALOS_FOLDER_LAST"


def put_last(folder: str) -> None:
    """Puts the working folder last on ``sys.path``, so that its plug-ins are found but hide no installed library.

    ``python -m`` and an empty entry of PYTHONPATH put it first. An entry of PYTHONPATH that names it keeps its place,
    and with ``python -P`` it is left out.
    """
    named = {os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place}
    if folder not in named:
        sys.path[:] = [place for place in sys.path if os.path.abspath(place) != folder]
        if not sys.flags.safe_path or os.environ.get(FOLDER_LAST):
            sys.path.append(folder)


def folder_last() -> dict[str, str]:
    """Environment variables by which ``python -m halos_pl`` also puts the working folder last."""
    return {} if sys.flags.safe_path else {"PYTHONSAFEPATH": "1", FOLDER_LAST: "1"}
