"""A clause of the definition: a plain function of a target, with its explanation.

A function that takes a :class:`Case` and returns ``None`` or a witness is a clause once it is decorated with
:func:`explained` and listed in the ``CLAUSES`` of its kind. A kind's ``clauses(case)`` yields them bound to a target;
``check_halo``, the pytest decorator and ``halos check`` all run these.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, get_args

from halos_pl.conformance.report import Definition
from halos_pl.conformance.target import TargetError
from halos_pl.conformance.witness import Raised

Law = Callable[[Any], str | None]
L = TypeVar("L", bound=Law)


@dataclass(frozen=True)
class Explanation:
    """One clause in words.

    Attributes:
        means: meaning of the clause: the docstring of its function.
        example: body of a class that fails it; the class extends the clause's kind of target.
        cure: remedy for a target that fails it.
    """

    means: str
    example: str
    cure: str


EXPLANATIONS: dict[str, Explanation] = {}


def explained(*, example: str, cure: str) -> Callable[[L], L]:
    """Registers a clause's explanation, with the docstring as its meaning; the function is unchanged."""

    def register(law: L) -> L:
        means = " ".join((law.__doc__ or "").split())
        EXPLANATIONS[law.__name__] = Explanation(means, example, " ".join(cure.split()))
        return law

    return register


def _nothing() -> str | None:
    return None


def _always_required(definition: Definition) -> str | None:
    return None


def witness_of(check: Callable[[], str | None]) -> str | None:
    """The witness of a check; an exception or exit of the code under check is a witness too."""
    try:
        return check()
    except (Exception, SystemExit) as error:
        return Raised.by(error)


@dataclass(frozen=True)
class Clause:
    """One clause, bound to one target.

    Attributes:
        name: name of the clause, after the term's name if an objective sums several.
        check: runs the clause: ``None`` if the clause holds, else a witness.
        definitions: versions of the definition that have the clause.
        excused: called after a failure; returns the reason why it is expected, else ``None``.
        not_required: called after a failure with a version of the definition; returns the reason why the failure does
            not count, else ``None``.
        note: called after all checks; returns a remark for the report, else ``None``.
    """

    name: str
    check: Callable[[], str | None]
    definitions: tuple[Definition, ...] = get_args(Definition)
    excused: Callable[[], str | None] = _nothing
    not_required: Callable[[Definition], str | None] = _always_required
    note: Callable[[], str | None] = _nothing

    def witness(self) -> str | None:
        """The witness of the check; an exception or exit of the target is a witness too."""
        return witness_of(self.check)

    def of_term(self, prefix: str) -> Clause:
        """The same clause of a term in a sum."""
        return replace(self, name=prefix + self.name)


class Case:
    """One target, and the state that its clauses share. Each clause runs once, even if several terms share the target.

    Args:
        target: the object under check; only copies of it are called.
        laws: the clauses of its kind.

    Raises:
        TargetError: ``target.violates`` is not a mapping from clauses of its kind to reasons.
    """

    def __init__(self, target: Any, laws: tuple[Law, ...]) -> None:
        self.laws = laws
        self.plug_in = target
        self.violates = reasons(target, laws)
        self._witnesses: dict[str, str | None] = {}

    def witness(self, law: Law) -> str | None:
        """``None`` if the clause holds, else its witness."""
        name = law.__name__
        if name not in self._witnesses:
            self._witnesses[name] = witness_of(partial(law, self))
        return self._witnesses[name]

    def clause(self, law: Law, **details: Any) -> Clause:
        """The clause, bound to this target; ``details`` are further attributes of a :class:`Clause`."""
        return Clause(
            law.__name__, **({"check": partial(self.witness, law), "note": partial(self.note, law)} | details)
        )

    def note(self, law: Law) -> str | None:
        """The author's reason why the target fails the clause, or why a reason of a base class does not count."""
        name = law.__name__
        if self.witness(law) is None:
            return None
        if name in self.violates:
            return self.violates[name]
        cls = type(self.plug_in)
        for base in cls.__mro__[1:]:
            declared = vars(base).get("violates")
            if isinstance(declared, Mapping) and name in declared:
                return (
                    f"{base.__name__}.violates is about the forward of {base.__name__}; {cls.__name__}"
                    f" overrides it and may state a reason in {cls.__name__}.violates"
                )
        return None


def reasons(target: Any, laws: tuple[Law, ...]) -> dict[str, str]:
    """The reasons by clause that a plug-in declares in ``violates``."""
    declared = getattr(target, "violates", {})
    name = f"{type(target).__name__}.violates"
    if not isinstance(declared, Mapping) or not all(isinstance(why, str) and why.strip() for why in declared.values()):
        raise TargetError(f"{name} is {declared!r}; it takes a reason for each clause, {{clause: reason}}")
    clauses = [law.__name__ for law in laws]
    for clause in declared:
        if clause not in clauses:
            near = difflib.get_close_matches(str(clause), clauses, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(clauses)}"
            raise TargetError(f"{name} names {clause!r}; {hint}")
    return dict(declared)
