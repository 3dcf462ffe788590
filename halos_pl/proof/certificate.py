"""The certificate of a proof: what ``halos verify`` needs to check it without this prover."""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import version
from typing import Any

from flint import fmpq_mpoly
from torch import nn

from halos_pl.proof import verify
from halos_pl.proof.claims import Claim, Decision, Prover
from halos_pl.proof.element import Element
from halos_pl.proof.interval import PRECISION, Interval
from halos_pl.proof.pieces import Piece
from halos_pl.proof.prove import Outcome, Proof
from halos_pl.proof.roots import Bound

FORMAT = 1


class NotCertifiableError(ValueError):
    """A proof that the certificate's form cannot express."""


def _terms(polynomial: fmpq_mpoly, order: Mapping[int, int]) -> list[Any]:
    return [
        [str(coefficient), {str(order[i]): int(e) for i, e in enumerate(exponents) if e}]
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


def _merged(prover: Prover, decision: Decision) -> list[tuple[Piece, list[tuple[Bound, Bound]]]]:
    """The pieces in ascending order with their cells; neighbours at 0 with the same expression are one."""
    if prover.splitter.roots:
        raise NotCertifiableError("v switches branches where parameters decide")
    numbers = sorted(
        range(len(prover.pieces)), key=lambda i: (prover.pieces[i].low is not None, prover.pieces[i].low or 0)
    )
    return [
        (
            replace(prover.pieces[i], value=decision.forms.get(i, prover.pieces[i].value)),
            sorted(((c.low, c.high) for c in decision.cells.get(i, [])), key=lambda c: (c[0] is not None, c[0] or 0)),
        )
        for i in numbers
    ]


def _range(interval: Interval, value: Fraction) -> dict[str, Any]:
    return {
        "low": str(interval.exact_low) if interval.exact_low is not None else None,
        "high": str(interval.exact_high) if interval.exact_high is not None else None,
        "above_low": interval.above_low,
        "below_high": interval.below_high,
        "value": str(value),
    }


def _graph(prover: Prover, pieces: list[Piece]) -> dict[str, Any]:
    """The chain of pieces as JSON."""
    field = prover.field
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
                "text": field.name(i),
            }
        )
        order[i] = len(order)
    values = prover.samples[0]
    return {
        "recorded": [list(node) for node in prover.nodes],
        "parameters": {name: _range(prover.parameters[name], values[name]) for name in field.parameters},
        "kernels": kernels,
        "pieces": [
            {
                "low": _text(piece.low),
                "high": _text(piece.high),
                "value": _element(piece.expression, order),
                "text": str(piece.expression),
            }
            for piece in pieces
        ],
    }


def _enclosure(prover: Prover, claim: Claim, piece: Piece, low: Bound, high: Bound) -> str:
    """The derivative on a cell, for people."""
    target = piece.expression.derivative if claim.order == 1 else piece.expression.derivative.derivative
    try:
        return str(piece.box(prover.field, prover.parameters, low, high).range(target))
    except ValueError:
        return "not enclosed; its sign is that of its factors"


def _proved(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """A proved claim and its chain."""
    assert outcome.prover is not None
    assert outcome.decision is not None
    merged = _merged(outcome.prover, outcome.decision)
    claim = {
        "claim": outcome.claim.name,
        "status": "proved",
        "scope": outcome.scope,
        "notes": list(outcome.notes),
        "cells": {str(i): [[_text(a), _text(b)] for a, b in cells] for i, (_, cells) in enumerate(merged) if cells},
        "enclosures": {
            str(i): [_enclosure(outcome.prover, outcome.claim, piece, a, b) for a, b in cells]
            for i, (piece, cells) in enumerate(merged)
            if cells
        },
    }
    return claim, _graph(outcome.prover, [piece for piece, _ in merged])


def certificate(proof: Proof, target: str, init_args: str | None, source: str) -> dict[str, Any]:
    """The certificate of a proof, as plain data.

    A claim is certified for all hyper-parameters where the checker can follow, else for those given. One that it cannot
    follow at all is listed as proved without a certificate, with the reason.

    Args:
        proof: of a value function.
        target: its name, as on the command line.
        init_args: its arguments as JSON.
        source: SHA-256 of its code; see :func:`source_hash`.
    """
    graphs: list[dict[str, Any]] = []
    claims: list[dict[str, Any]] = []
    for outcome in proof.outcomes.values():
        entry: dict[str, Any] = {"claim": outcome.claim.name, "status": outcome.status, "reason": outcome.reason}
        if outcome.status == "proved":
            entry = _certified([outcome, outcome.narrower] if outcome.narrower else [outcome], graphs)
        elif outcome.status == "disproved" and outcome.decision is not None:
            decision = outcome.decision
            entry["points"] = [str(u) for u in decision.points]
            entry["values"] = [[str(x.lower()), str(x.upper())] for x in decision.values]
            entry["parameters"] = {name: str(value) for name, value in decision.parameters.items()}
        claims.append(entry)
    return {
        "format": FORMAT,
        "target": target,
        "init_args": init_args,
        "source": source,
        "precision": PRECISION,
        "tolerance": "2^-40",
        "versions": {name: version(name) for name in ("python-flint", "torch")} | {"python": platform.python_version()},
        "claims": claims,
        "graphs": graphs,
    }


def _certified(outcomes: list[Outcome], graphs: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim of the first outcome that the checker can follow; its chain is added to ``graphs``."""
    reasons = []
    for outcome in outcomes:
        try:
            claim, graph = _proved(outcome)
            verify.check(graph, claim)
        except (NotCertifiableError, verify.RefusedError) as error:
            reasons.append(f"{outcome.scope or 'as given'}: {error}")
            continue
        if graph not in graphs:
            graphs.append(graph)
        return claim | {"graph": graphs.index(graph), "reason": "; ".join(reasons)}
    return {"claim": outcomes[0].claim.name, "status": "not certified", "reason": "; ".join(reasons)}


def source_hash(v: nn.Module) -> str:
    """SHA-256 of the code of the classes of v and of all functions within it."""
    classes = sorted(
        {
            cls
            for module in v.modules()
            for cls in type(module).__mro__
            if not cls.__module__.startswith(("torch", "builtins"))
        },
        key=lambda cls: cls.__qualname__,
    )
    digest = hashlib.sha256()
    for cls in classes:
        try:
            digest.update(inspect.getsource(cls).encode())
        except (OSError, TypeError):  # made by a program
            digest.update(cls.__qualname__.encode())
    return digest.hexdigest()
