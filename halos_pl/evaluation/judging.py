"""Rules and judges: functions of the user's own that say how good an answer is.

A rule is ``rule(answer: str, row: Row) -> float``; a judge is ``judge(answer: str, other: str, row: Row) -> float``.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halos_pl.data.example import DataError, Prompt
from halos_pl.objective.build import module_of_file

#: The parameters of each kind; and those of older ones, without the row.
FORMS: dict[str, tuple[str, ...]] = {"rule": ("answer", "row"), "judge": ("answer", "other", "row")}
OLDER: dict[str, tuple[str, ...]] = {"rule": ("answer", "finished"), "judge": ("prompt", "answer", "other")}
#: What a kind says.
SAYS = {
    "rule": "True or 1 where the answer meets it, False or 0 where it does not, or a number between",
    "judge": "1 where the answer is preferred, 0 where the other one is, 0.5 for a draw",
}


class Row(dict[str, Any]):
    """A row of the prompts file: its columns, such as a gold answer, with ``row["column"]``.

    Attributes:
        text: the prompt as text; of messages, what the last one says.
        messages: the prompt as messages; text as a single one of the user's.
        finished: whether the model ended the answer by itself, and no limit of length did.
        other_finished: the same of the other answer; None for a rule.
        place: ``FILE:LINE``.
    """

    def __init__(
        self, columns: Mapping[str, Any], prompt: Prompt, place: str, finished: bool, other_finished: bool | None = None
    ) -> None:
        super().__init__(deepcopy(dict(columns)))  # the function may do with it what it likes
        self.messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else deepcopy(prompt)
        self.text: str = self.messages[-1]["content"]
        self.place, self.finished, self.other_finished = place, finished, other_finished


@dataclass(frozen=True)
class Judged:
    """A rule or a judge that can be called.

    Attributes:
        kind: ``rule`` or ``judge``.
        function: the user's.
        by_name: give the row by its name.
        older: it takes the parameters of ``OLDER``.
    """

    kind: str
    function: Callable[..., Any]
    by_name: bool
    older: bool

    def __call__(self, row: Row, answer: str, other: str = "") -> float:
        """What it says, from 0 to 1.

        Raises:
            DataError: where it fails, leaves the process or says something else, naming the row.
        """
        answers = (answer, other) if self.kind == "judge" else (answer,)
        given: tuple[Any, ...] = (*answers, row)
        if self.older:
            given = (row.text, *answers) if self.kind == "judge" else (answer, row.finished)
        try:
            said = self.function(*answers, row=row) if self.by_name else self.function(*given)
        except (Exception, SystemExit) as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"the {self.kind} fails on the answer to {row.place}: {why} ({at.filename}:{at.lineno})"
            ) from error
        if isinstance(said, np.generic | torch.Tensor) and np.ndim(said) == 0:
            said = said.item()
        if isinstance(said, numbers.Real) and 0 <= float(said) <= 1:  # false for NaN, too
            return float(said)
        raise DataError(
            f"the {self.kind} says {said!r:.60} of the answer to {row.place} ({row.text[:40]!r}); it must say"
            f" {SAYS[self.kind]}"
        )


def judged_by(place: str, kind: str) -> Judged:
    """The function or class named ``path/to/file.py:name``; the file's code is executed.

    Args:
        place: of the function, or of a class whose instances are called.
        kind: ``rule`` or ``judge``.

    Raises:
        ValueError: where there is none that can be called as one of that kind is.
    """
    path, _, name = place.rpartition(":")
    if not path or not Path(path).is_file():
        raise ValueError(f"{place!r}: no such file; a rule or judge is named path/to/file.py:function")
    try:
        module = module_of_file(Path(path), "study")
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not import: {type(error).__name__}: {' '.join(str(error).split())}") from error
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{place!r}: {path} has no function {name!r}")
    if inspect.isclass(found):
        if not any("__call__" in base.__dict__ for base in found.__mro__):
            raise ValueError(f"{place!r}: its instances cannot be called; give the class a __call__")
        try:
            found = found()
        except (Exception, SystemExit) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{place!r}: the class must take no arguments: {why}") from error
    try:
        return _checked(found, kind)
    except ValueError as error:
        raise ValueError(f"{place!r}: {error}") from error


def _checked(function: Callable[..., Any], kind: str) -> Judged:
    """The function, to be called as its parameters want it.

    Names tell a function of another form or order from one that fits: it would be wrong without a word.

    Raises:
        ValueError: where it cannot be called as one of that kind is.
    """
    form, older = FORMS[kind], OLDER[kind]
    wanted = f"a {kind} is {kind}({', '.join(form)}) -> float"
    code: Any = function
    while isinstance(code, functools.partial):
        code = code.func
    code = code if inspect.isroutine(code) else code.__call__
    if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
        raise ValueError(f"{wanted}; this one is async, and its answer would never be awaited")
    if inspect.isgeneratorfunction(code):
        raise ValueError(f"{wanted}; this one yields, where it must return")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wanted}; this one does not say which parameters it takes: wrap it in a function") from error
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in signature.parameters.values() if p.kind in kinds)
    for answers, by_name in ((form, {}), (form[:-1], {"row": "row"})):
        bound = _bound(signature, *answers, **by_name)
        elsewhere = any(n != given for n, given in zip(names, answers, strict=False) if n in (*form, *older))
        # Of *args and **kwargs the values are a tuple and a mapping.
        takes_row = bound and ("row" in bound or any(not isinstance(value, str) for value in bound.values()))
        if takes_row and not elsewhere:
            return Judged(kind, function, by_name=bool(by_name), older=False)
    if names[: len(older)] == older and _bound(signature, *older) is not None:
        return Judged(kind, function, by_name=False, older=True)
    raise ValueError(f"{wanted}, the last parameter named row; this one is {kind}{signature}")


def _bound(signature: inspect.Signature, *given: str, **named: str) -> Mapping[str, Any] | None:
    """Which parameter gets what; None where the call would fail."""
    try:
        return signature.bind(*given, **named).arguments
    except TypeError:
        return None
