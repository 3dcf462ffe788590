"""Finds judges by name: the shipped ones, and rubrics in files."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

from halos_pl.judge import judges
from halos_pl.judge.base import BenchmarkFiles, Judge, JudgeError
from halos_pl.judge.rubric import read_rubric

_FOLDER = Path(judges.__file__).parent


def judge_classes() -> dict[str, type[Judge]]:
    """The judges that are classes, by name."""
    classes: dict[str, type[Judge]] = {}
    for module in pkgutil.iter_modules([str(_FOLDER)]):
        for cls in vars(import_module(f"{judges.__name__}.{module.name}")).values():
            if inspect.isclass(cls) and issubclass(cls, Judge) and not inspect.isabstract(cls):
                classes[cls.name] = cls
    return classes


def judge_names() -> list[str]:
    """The names of the shipped judges."""
    return sorted([*judge_classes(), *(path.stem for path in _FOLDER.glob("*.yaml"))])


def named_judge(name: str, files: BenchmarkFiles | None = None) -> Judge:
    """The judge called ``name``.

    Args:
        name: the name of a shipped judge, or a YAML file with a rubric.
        files: folders with the files of published benchmarks.

    Raises:
        JudgeError: if there is no such judge, it lacks its files, or it does not read those that were named; names file
            and line.
        OSError: if the file cannot be read.
        YAMLFileError: if the file is not YAML.
    """
    files = files or BenchmarkFiles()
    cls = judge_classes().get(name)
    judge = cls(files) if cls else _rubric(name)  # type: ignore[call-arg]
    for option, folder in vars(files).items():
        if folder is not None and option not in judge.reads:
            raise JudgeError(f"--{option} has no effect, as the judge {name} does not read it; omit it")
    return judge


def _rubric(name: str) -> Judge:
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise JudgeError(f"{name}: no such file; a judge is a YAML file or one of {', '.join(judge_names())}")
        return read_rubric(Path(name))
    if (_FOLDER / f"{name}.yaml").is_file():
        return read_rubric(_FOLDER / f"{name}.yaml")
    near = difflib.get_close_matches(name, judge_names(), n=1)
    guess = f"did you mean {near[0]}?" if near else f"there are {', '.join(judge_names())}, and YAML files"
    raise JudgeError(f"no judge is called {name!r}; {guess}")
