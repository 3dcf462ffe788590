"""The certificate of a proof: what ``halos verify`` needs to check it without this prover."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from flint import fmpq_mpoly
from torch import nn

from halos_pl.proof import form, verify
from halos_pl.proof.agreement import compare
from halos_pl.proof.claims import Decision
from halos_pl.proof.deciding import Case
from halos_pl.proof.element import Element
from halos_pl.proof.interval import Interval
from halos_pl.proof.pieces import Piece
from halos_pl.proof.prove import Outcome, Proof
from halos_pl.proof.roots import Bound


class NotCertifiableError(ValueError):
    """A proof that the certificate's form cannot express."""


def _terms(polynomial: fmpq_mpoly, order: Mapping[int, int]) -> list[Any]:
    return [
        [str(coefficient), sorted([order[i], int(e)] for i, e in enumerate(exponents) if e)]
        for exponents, coefficient in polynomial.terms()
    ]


def _element(element: Element, order: Mapping[int, int]) -> list[Any]:
    return [_terms(element.numerator, order), _terms(element.denominator, order)]


def _needed(element: Element) -> Iterator[int]:
    """Kernels of an expression, those in the arguments of others first."""
    for i in sorted(element.variables):
        if i in element.field.kernels:
            yield from _needed(element.field.kernels[i].argument)
            yield i


def _text(bound: Bound) -> str | None:
    return None if bound is None else str(bound)


def _merged(case: Case, decision: Decision) -> list[tuple[Piece, list[tuple[Bound, Bound]]]]:
    """The pieces in ascending order with their cells; neighbours at 0 with the same expression are one."""
    if case.splitter.roots:
        raise NotCertifiableError("v switches branches where parameters decide")
    numbers = sorted(range(len(case.pieces)), key=lambda i: (case.pieces[i].low is not None, case.pieces[i].low or 0))
    return [
        (
            replace(case.pieces[i], value=decision.forms.get(i, case.pieces[i].value)),
            sorted(((c.low, c.high) for c in decision.cells.get(i, [])), key=lambda c: (c[0] is not None, c[0] or 0)),
        )
        for i in numbers
    ]


def _range(name: str, interval: Interval) -> dict[str, Any]:
    return {
        "name": name,
        "low": str(interval.exact_low) if interval.exact_low is not None else None,
        "high": str(interval.exact_high) if interval.exact_high is not None else None,
        "above_low": interval.exact_low is None or interval.above_low,
        "below_high": interval.exact_high is None or interval.below_high,
    }


def _graph(case: Case, pieces: list[Piece]) -> dict[str, Any]:
    """The chain of pieces as JSON."""
    field = case.field
    order = {0: 0} | {1 + i: 1 + i for i in range(len(field.parameters))}
    kernels = []
    for i in (i for piece in pieces for i in _needed(piece.expression)):
        if i in order:
            continue
        kernel = field.kernels[i]
        if isinstance(kernel.exponent, Element):
            raise NotCertifiableError("an exponent is a parameter")
        kernels.append(
            {
                "kind": kernel.kind,
                "argument": _element(kernel.argument, order),
                "exponent": _text(kernel.exponent),
            }
        )
        order[i] = len(order)
    return {
        "parameters": [_range(name, case.parameters[name]) for name in field.parameters],
        "kernels": kernels,
        "pieces": [
            {"low": _text(piece.low), "high": _text(piece.high), "value": _element(piece.expression, order)}
            for piece in pieces
        ],
    }


def _enclosed(chain: verify.Chain, claim: str, value: Any, low: Bound, high: Bound) -> list[str | None]:
    """The ends of a cell and of an interval that contains the derivative on it; None: not bounded there."""
    found: list[str | None] = [None, None]
    try:
        span = verify.number(_text(low), -verify.INF), verify.number(_text(high), verify.INF)
        ends = verify.Cell(chain, *span).range(verify.target(chain, {"claim": claim}, value))
        outwards = [float(ends[0]), float(ends[1])]
        outwards = [
            x if x == 0 else math.nextafter(x, side) for x, side in zip(outwards, (-math.inf, math.inf), strict=True)
        ]
        found = [str(Fraction(repr(x))) if math.isfinite(x) else None for x in outwards]
    except (verify.RefusedError, OverflowError):
        pass
    return [_text(low), _text(high), *found]


def _proved(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """A proved claim and its chain."""
    assert outcome.prover is not None
    assert outcome.decision is not None
    if len(outcome.prover.cases) > 1:
        raise NotCertifiableError("it is proved in cases, by signs of expressions in the parameters")
    case = outcome.prover.cases[0]
    merged = _merged(case, outcome.decision)
    graph, name = _graph(case, [piece for piece, _ in merged]), outcome.claim.name
    chain = verify.Chain(graph)
    cells = [
        [_enclosed(chain, name, value, a, b) for a, b in parts]
        for (_, parts), (_, _, value) in zip(merged, chain.pieces, strict=True)
    ]
    return {"claim": name, "cells": cells}, graph


def certificate(
    proof: Proof, target: str, init_args: str | None, source: str, v: nn.Module
) -> tuple[dict[str, Any], dict[str, str]]:
    """The certificate of a proof, as plain data, and by claim why it is not in there, or for fewer parameters.

    A claim is certified for all hyper-parameters where the checker can follow, else for those given.

    Args:
        proof: of a value function.
        target: its name, as on the command line.
        init_args: its arguments as JSON.
        source: SHA-256 of its code; see :func:`~halos_pl.proof.source.source_hash`.
        v: the value function.
    """
    graphs: list[dict[str, Any]] = []
    claims, reasons = [], {}
    for name, outcome in proof.outcomes.items():
        claim: dict[str, Any] = {"claim": name, "graph": None, "cells": []}
        failed = [f"it is {outcome.status}"] if outcome.status != "proved" else []
        if not failed and outcome.claim.of != "v":
            failed = ["v is given by its slope, which a certificate cannot contain yet"]
        for each in filter(None, [outcome, outcome.narrower] if not failed else []):
            try:
                found, graph = _proved(each)
                form.require_graph(graph, "its expression")
                form.require_cells(found["cells"], "its proof")
                verify.check(graph, found)
                if graph not in graphs:
                    compare(graph, v)
                    graphs.append(graph)
            except (NotCertifiableError, form.FormError, verify.RefusedError) as error:
                failed.append(f"{each.scope or 'as given'}: {error}")
                continue
            claim = {**found, "graph": graphs.index(graph)}
            break
        claims.append(claim)
        if failed:
            reasons[name] = "; ".join(failed)
    data = {
        "format": form.FORMAT,
        "target": target,
        "init_args": init_args,
        "source": source,
        "precision": verify.PRECISION,
        "tolerance": form.TOLERANCE,
        "versions": form.versions(),
        "claims": [{key: claim[key] for key in ("claim", "graph", "cells")} for claim in claims],
        "graphs": graphs,
    }
    return data, reasons
