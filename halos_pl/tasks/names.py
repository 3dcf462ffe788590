"""Finds the names of lm-eval's tasks in its files, which takes seconds; importing it and reading them, a minute."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from halos_pl.common.messages import plain
from halos_pl.data.example import DataError

#: The task files of this package.
YAMLS = Path(__file__).parent / "yamls"
#: Ending of the names of groups whose tasks read local files.
LOCAL = "_local"
#: Folders of lm-eval that contain the tasks those groups refer to; an index of all its folders takes 20 s.
USUAL = ("gsm8k", "mmlu", "bbh")
#: A name in a task file: of a task, group or tag, or of one in a list.
_NAME = re.compile(
    r"""^["']?(?:task|group|tag)["']?:\s*["']?([\w.:()-]+)["']?\s*$|^\s*-\s*["']?([\w.:()-]+)["']?\s*$""", re.M
)


def home() -> Path:
    """The folder of lm-eval's task files."""
    spec = find_spec("lm_eval")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())), "tasks")


@cache
def folders() -> dict[str, str]:
    """The folder of lm-eval in which the name of each task, group or tag occurs; a search is faster than an index."""
    found: dict[str, str] = {}
    for path in sorted(home().rglob("*")):
        if path.suffix not in (".yaml", "") or not path.is_file():  # task files may include one without a suffix
            continue
        folder = path.relative_to(home()).parts[0]
        for name, member in _names_in(path):
            if name:
                found[name] = folder
            else:
                found.setdefault(member, folder)
    return found


def _names_in(path: Path) -> list[tuple[str, str]]:
    return _NAME.findall(path.read_text(encoding="utf-8", errors="replace"))


def check_names(names: Iterable[str]) -> None:
    """Refuses names that no task file of lm-eval or of this package mentions; imports nothing.

    Raises:
        DataError: naming similar tasks.
    """
    usual = (path for folder in (YAMLS, *(home() / name for name in USUAL)) for path in folder.rglob("*.yaml"))
    known = {name or member for path in usual for name, member in _names_in(path)}
    for name in names:
        if name.endswith(LOCAL) or not (name in known or name in folders()):
            raise no_such_task(name, (each for each in {*known, *folders()} if not each.endswith(LOCAL)))


def no_such_task(name: str, names: Iterable[str]) -> DataError:
    """The error about a task that is not among ``names``."""
    near = difflib.get_close_matches(name, sorted(names), n=4, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "python -m lm_eval ls tasks lists all"
    return DataError(f"task {plain(name)!r} does not exist; {hint}")
