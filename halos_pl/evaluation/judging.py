"""Rules and judges: the user's functions that grade answers.

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
from halos_pl.evaluation.precision import computing_in
from halos_pl.objective.build import module_of_file

#: The parameters of each kind, and their older form without the row.
FORMS: dict[str, tuple[str, ...]] = {"rule": ("answer", "row"), "judge": ("answer", "other", "row")}
OLDER: dict[str, tuple[str, ...]] = {"rule": ("answer", "finished"), "judge": ("prompt", "answer", "other")}
#: The return value of each kind.
RETURNS = {
    "rule": "True or 1 if the answer meets it, False or 0 if not, or a number in between",
    "judge": "1 if the answer is preferred, 0 if the other one is, 0.5 for a tie",
}


class Row(dict[str, Any]):
    """A row of the prompts file: its columns, such as a gold answer, with ``row["column"]``; always has ``prompt``.

    Attributes:
        text: the prompt as text; for messages, the content of the last one.
        messages: the prompt as messages; a text is a single user message.
        finished: whether the model ended the answer itself, before the length limit.
        other_finished: the same for the other answer; None for a rule.
        place: ``FILE:LINE``.
    """

    def __init__(
        self, columns: Mapping[str, Any], prompt: Prompt, place: str, finished: bool, other_finished: bool | None = None
    ) -> None:
        super().__init__(deepcopy({"prompt": prompt, **columns}))  # the function may change it
        self.messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else deepcopy(prompt)
        self.text: str = self.messages[-1]["content"]
        self.place, self.finished, self.other_finished = place, finished, other_finished


@dataclass(frozen=True)
class Judged:
    """A rule or a judge that can be called.

    Attributes:
        kind: ``rule`` or ``judge``.
        function: the user's function.
        by_name: whether to pass the row by name.
        older: whether it takes the parameters in ``OLDER``.
    """

    kind: str
    function: Callable[..., Any]
    by_name: bool
    older: bool

    def __call__(self, row: Row, answer: str, other: str = "") -> float:
        """The verdict, from 0 to 1. A function that computes with torch does so in its own precision.

        Raises:
            DataError: naming the row, if the function fails, exits or returns anything else.
        """
        answers = (answer, other) if self.kind == "judge" else (answer,)
        arguments: tuple[Any, ...] = (*answers, row)
        if self.older:
            arguments = (row.text, *answers) if self.kind == "judge" else (answer, row.finished)
        try:
            with computing_in("32-true"):
                verdict = self.function(*answers, row=row) if self.by_name else self.function(*arguments)
        except (Exception, SystemExit) as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(
                f"the {self.kind} fails on the answer to {row.place}: {why} ({at.filename}:{at.lineno})"
            ) from error
        if isinstance(verdict, np.generic | torch.Tensor) and np.ndim(verdict) == 0:
            verdict = verdict.item()
        if isinstance(verdict, numbers.Real) and 0 <= float(verdict) <= 1:  # false for NaN, too
            return float(verdict)
        raise DataError(
            f"the {self.kind} returns {verdict!r:.60} for the answer to {row.place} ({row.text[:40]!r}); it must return"
            f" {RETURNS[self.kind]}"
        )


def judged_by(place: str, kind: str) -> Judged:
    """The function named ``path/to/file.py:name``; executes the file's code.

    Args:
        place: the name of a function, or of a class whose instances are called.
        kind: ``rule`` or ``judge``.

    Raises:
        ValueError: if there is no such function, or its parameters do not fit the kind.
    """
    path, _, name = place.rpartition(":")
    if not path or not Path(path).is_file():
        raise ValueError(f"{place!r}: no such file; a rule or judge is named path/to/file.py:function")
    try:
        module = module_of_file(Path(path), "study")
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not import: {type(error).__name__}: {' '.join(str(error).split())}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{place!r}: {path} has no function {name!r}")
    if inspect.isclass(function):
        if not any("__call__" in base.__dict__ for base in function.__mro__):
            raise ValueError(f"{place!r}: instances of the class cannot be called; give it a __call__")
        try:
            function = function()
        except (Exception, SystemExit) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{place!r}: the class must take no arguments: {why}") from error
    try:
        return _checked(function, kind)
    except ValueError as error:
        raise ValueError(f"{place!r}: {error}") from error


def _checked(function: Callable[..., Any], kind: str) -> Judged:
    """The function, and how to call it.

    Parameters are matched by name: in another order, the function would silently compute something else.

    Raises:
        ValueError: if its parameters do not fit the kind.
    """
    form, older = FORMS[kind], OLDER[kind]
    wanted = f"a {kind} is {kind}({', '.join(form)}) -> float"
    code: Any = function
    while isinstance(code, functools.partial):
        code = code.func
    code = code if inspect.isroutine(code) else code.__call__
    if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
        raise ValueError(f"{wanted}; this one is async and would never be awaited")
    if inspect.isgeneratorfunction(code):
        raise ValueError(f"{wanted}; this one yields instead of returning")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wanted}; the parameters of this one are unknown: wrap it in a function") from error
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in signature.parameters.values() if p.kind in kinds)
    for answers, by_name in ((form, {}), (form[:-1], {"row": "row"})):
        bound = _bound(signature, *answers, **by_name)
        elsewhere = any(n != expected for n, expected in zip(names, answers, strict=False) if n in (*form, *older))
        # *args and **kwargs bind a tuple and a mapping.
        takes_row = bound and ("row" in bound or any(not isinstance(value, str) for value in bound.values()))
        if takes_row and not elsewhere:
            return Judged(kind, function, by_name=bool(by_name), older=False)
    if names[: len(older)] == older and _bound(signature, *older) is not None:
        return Judged(kind, function, by_name=False, older=True)
    raise ValueError(f"{wanted}, the last parameter named row; this one is {kind}{signature}")


def _bound(signature: inspect.Signature, *positional: str, **named: str) -> Mapping[str, Any] | None:
    """The arguments by parameter; None if the call would fail."""
    try:
        return signature.bind(*positional, **named).arguments
    except TypeError:
        return None
