"""``halos check --explain``: the meaning of a clause, an example that fails it, and the remedy.

The texts are next to the clauses (:func:`halos_pl.conformance.clause.explained`).
"""

from __future__ import annotations

import difflib
import textwrap

from halos_pl.conformance import feedback, objective, policy_weight, reference_point, reward, value_function
from halos_pl.conformance.clause import EXPLANATIONS, Law

#: The clauses of each kind of target, in the order of the definition.
CLAUSES: dict[str, tuple[Law, ...]] = {
    "ValueFunction": value_function.CLAUSES,
    "Reward": reward.CLAUSES,
    "ReferencePoint": reference_point.CLAUSES,
    "Feedback": feedback.CLAUSES,
    "HALO": objective.CLAUSES,
    "PolicyWeight": (policy_weight.policy_weight,),
}


def kind_of(clause: str) -> str:
    """The name of the class that the clause belongs to."""
    return next(kind for kind, laws in CLAUSES.items() if clause in {law.__name__ for law in laws})


def code(clause: str) -> str:
    """The example of a clause as the source of a class ``Example``."""
    body = textwrap.indent(textwrap.dedent(EXPLANATIONS[clause].example).strip(), "    ")
    return f"class Example({kind_of(clause)}):\n{body}"


def listed() -> str:
    """All clauses by kind, each with the gist of its meaning."""
    lines = []
    for kind, laws in CLAUSES.items():
        names = [law.__name__ for law in laws]
        width = max(map(len, names))
        gists = [EXPLANATIONS[name].means.partition(". ")[0].partition(": ")[0].rstrip(".") for name in names]
        lines += ["", f"{kind}:", *(f"  {name:<{width}}  {gist}" for name, gist in zip(names, gists, strict=True))]
    return "\n".join([*lines[1:], "", "halos check --explain CLAUSE shows an example that fails it, and the remedy."])


def explain(name: str) -> str:
    """The meaning of a clause, an example that fails it, and the remedy.

    Args:
        name: name of the clause; a prefix with the name of a term, as in the report on a sum, is ignored.

    Raises:
        ValueError: there is no such clause; the message names similar ones.
    """
    clause = name.rpartition(".")[2]
    if clause not in EXPLANATIONS:
        near = difflib.get_close_matches(clause, EXPLANATIONS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"no clause is named {name!r}{hint} (halos check --explain lists all of them)")
    explanation = EXPLANATIONS[clause]
    means, cure = (
        textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        for text in (explanation.means, explanation.cure)
    )
    return (
        f"{clause}, a clause of a {kind_of(clause)}\n\nMeaning\n{means}\n\nExample that fails\n"
        f"{textwrap.indent(code(clause), '  ')}\n\nRemedy\n{cure}"
    )
