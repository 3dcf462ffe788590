"""``halos new``: writes a commented skeleton of a plug-in or a loss, with a test of its clauses."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from typing import Literal

from halos_pl.cli.skeletons import SKELETONS
from halos_pl.common.experiments import EXPERIMENTS, objectives
from halos_pl.common.files import write

Kind = Literal["value_function", "reward", "reference_point", "feedback", "policy_weight", "objective"]
_PACKAGE = Path(__file__).resolve().parents[1]
#: Folder for each kind in a checkout, whose tests find new files there.
FOLDERS: dict[Kind, Path] = {
    "value_function": _PACKAGE.parent / "value_functions",
    "reward": _PACKAGE / "objective" / "rewards",
    "reference_point": _PACKAGE / "objective" / "reference_points",
    "feedback": _PACKAGE / "objective" / "feedback",
    "policy_weight": _PACKAGE / "objective" / "policy_weights",
    "objective": EXPERIMENTS / "objectives",
}


def new(kind: Kind, name: str, *, package: bool = False) -> None:
    """Write a skeleton of a plug-in or a loss, and its test, into the working folder; for a policy weight, a loss too.

    Args:
        kind: kind of the plug-in, or objective.
        name: name of the class, such as SoftSign, or of the objective, such as my_loss. The file is named after it.
        package: whether to write into the checkout of halos_pl, whose tests then find the files.

    Raises:
        ValueError: if the name is taken or invalid.
        FileExistsError: if a file already exists.
    """
    words = [word for word in re.split(r"[_\W]+|(?<=[a-z0-9])(?=[A-Z])", name) if word]
    snake = "_".join(words).lower()
    if not re.fullmatch(r"[A-Za-z]\w*", name) or keyword.iskeyword(snake):
        raise ValueError(f"{name!r} cannot be a name; use letters, digits and _, starting with a letter")
    cls = "".join(word[:1].upper() + word[1:] for word in words)
    if "MODULE.yaml" in SKELETONS[kind] and snake in objectives():
        raise ValueError(f"an objective {snake} is shipped with halos_pl; choose another name")
    if kind != "objective":
        _refuse_taken(kind, cls, snake, package=package)
    if package and EXPERIMENTS.parent == _PACKAGE:
        raise ValueError("--package needs a checkout of halos_pl, but this is an installed package; leave it out")
    files = {}
    for place, text in SKELETONS[kind].items():
        if package and place.startswith("test_"):
            continue  # the tests of the checkout find the part
        folder = FOLDERS["objective" if place.endswith(".yaml") else kind] if package else Path()
        files[folder / place.replace("MODULE", snake)] = text
    if existing := [str(path) for path in files if path.exists()]:
        raise FileExistsError(f"{' and '.join(existing)} already exists; choose another name")
    for path, text in files.items():
        write(path, text.replace("CLASS", cls).replace("MODULE", snake))
        print(f"halos: wrote {path}")
    losses = [path for path in files if path.suffix == ".yaml"]
    use = f"--objective {snake}" if losses else f"--model.{kind} {cls}"
    tests = "make test" if package else f"pytest test_{snake}.py"
    print(f"halos: next: halos check {losses[0] if losses else cls}; {tests}; halos fit {use}")


def _refuse_taken(kind: Kind, cls: str, module: str, *, package: bool) -> None:
    """Refuses a class that halos_pl has, and a file that an installed module would hide."""
    from halos_pl.common.subclasses import subclasses  # with the plug-ins, which take a second to import
    from halos_pl.objective.build import PARTS
    from halos_pl.objective.policy_weights import PolicyWeight

    known = subclasses(PARTS.get(kind, PolicyWeight))
    if any(each.__name__ == cls and each.__module__.startswith(("halos_pl.", "value_functions.")) for each in known):
        raise ValueError(f"a {kind} {cls} is part of halos_pl; choose another name")
    installed = None if package or Path(f"{module}.py").exists() else importlib.util.find_spec(module)
    if installed is not None and installed.origin is not None:
        raise ValueError(f"an installed module {module} would hide {module}.py; choose another name")
