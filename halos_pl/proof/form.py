"""The form of a certificate: which keys it has, and of which types and sizes the values are.

A file is read completely before anything in it is used. There is no key that the checker does not use, and no value
whose size could stop it.
"""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from typing import Any, NamedTuple

from halos_pl.proof.verify import CLAIMS, FUNCTIONS, PRECISION

FORMAT = 2
LARGEST = 2**22  # bytes of a file
TOLERANCE = "2^-48"


class FormError(ValueError):
    """A text that is no certificate; the message says where."""


class Maybe(NamedTuple):
    """A value of that form, or null."""

    form: Any


class Many(NamedTuple):
    """A list of at most so many values of a form."""

    form: Any
    most: int


TEXT, TARGET, DIGEST = (
    re.compile(r"(?s).{0,100000}"),
    re.compile(r"[^\x00-\x1f\x7f]{1,4096}"),
    re.compile("[0-9a-f]{64}"),
)
NUMBER = re.compile(r"(0|-?[1-9][0-9]{0,3999})(/[1-9][0-9]{0,3999})?")  # shorter than Python's limit of 4,300 digits
END = Maybe(NUMBER)
# A sum of [coefficient, [[variable, power], ...]]; variable 0 is u, then come the parameters and the kernels.
SUM = Many((NUMBER, Many((range(2000), range(1, 1000)), 2000)), 5000)
QUOTIENT = (SUM, SUM)
RANGE = {"low": END, "high": END, "above_low": bool, "below_high": bool}
GRAPH = {
    "parameters": Many({"name": TARGET, **RANGE}, 200),
    "kernels": Many({"kind": {*FUNCTIONS}, "argument": QUOTIENT, "exponent": END}, 300),
    "pieces": Many({"low": END, "high": END, "value": QUOTIENT}, 3000),
}
CELL = (END, END, END, END)  # its ends, and those of an interval that contains the derivative on it
CELLS = Many(Many(CELL, 1000), 3000)  # of each piece
CERTIFICATE = {
    "format": FORMAT,
    "target": TARGET,
    "init_args": Maybe(TEXT),
    "source": DIGEST,
    "precision": PRECISION,
    "tolerance": TOLERANCE,
    "versions": dict.fromkeys(("python-flint", "torch", "python"), re.compile(r"[\w.+-]{1,80}", re.ASCII)),
    "claims": tuple({"claim": name, "graph": Maybe(range(3)), "cells": CELLS} for name in CLAIMS),
    "graphs": Many(GRAPH, 3),
}


def _require(data: Any, form: Any, where: str) -> None:
    """Raises FormError unless the data has the form: a type, a pattern, a set or range of values, a value, or parts."""
    if isinstance(form, Maybe):
        if data is not None:
            _require(data, form.form, where)
    elif isinstance(form, dict):
        if type(data) is not dict or data.keys() != form.keys():
            raise FormError(f"{where or 'it'} must have the keys {', '.join(form)} and no others")
        for key, each in form.items():
            _require(data[key], each, f"{where}.{key}".lstrip("."))
    elif isinstance(form, tuple):  # also Many
        most = form.most if isinstance(form, Many) else len(form)
        if type(data) is not list or len(data) > most or (not isinstance(form, Many) and len(data) < most):
            raise FormError(f"{where} must be a list of {'at most ' if isinstance(form, Many) else ''}{most}")
        for i, each in enumerate(data):
            _require(each, form.form if isinstance(form, Many) else form[i], f"{where}[{i}]")
    elif isinstance(form, re.Pattern):
        if type(data) is not str or not form.fullmatch(data):
            raise FormError(f"{where} is not written as a {'number' if form is NUMBER else 'text of its kind'} must be")
    elif isinstance(form, range):
        if type(data) is not int or data not in form:
            raise FormError(f"{where} must be a whole number from {form.start} to {form.stop - 1}")
    elif isinstance(form, type):
        if type(data) is not form:
            raise FormError(f"{where} must be a {form.__name__}")
    else:
        values = form if isinstance(form, set) else {form}
        if not isinstance(data, str | int) or (type(data), data) not in {(type(each), each) for each in values}:
            raise FormError(f"{where} must be {' or '.join(sorted(map(str, values)))}")


def versions() -> dict[str, str]:
    """The versions of the programs that a proof and its check depend on."""
    return {name: version(name) for name in ("python-flint", "torch")} | {"python": platform.python_version()}


def require_cells(cells: list[Any], where: str) -> None:
    """Raises FormError unless the cells of a claim have their form."""
    _require(cells, CELLS, where)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise FormError("a key occurs twice")
    return dict(pairs)


def read(data: bytes) -> dict[str, Any]:
    """The certificate in a file, as plain data.

    Raises:
        FormError: it is none.
    """
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once)
    except FormError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormError(f"it is not JSON ({' '.join(str(error).split())[:100]})") from error
    if type(found) is dict and type(other := found.get("format")) is int and other != FORMAT:
        raise FormError(f"it has format {other}, and this version reads {FORMAT}: prove again")
    _require(found, CERTIFICATE, "")
    assert isinstance(found, dict)
    for number, graph in enumerate(found["graphs"]):
        require_graph(graph, f"graphs[{number}]")
    if {claim["graph"] for claim in found["claims"]} - {None} != {*range(len(found["graphs"]))}:
        raise FormError("a claim is about a graph that is not there, or a graph is about no claim")
    for claim in found["claims"]:
        pieces = 0 if claim["graph"] is None else len(found["graphs"][claim["graph"]]["pieces"])
        if len(claim["cells"]) != pieces:
            raise FormError(f"the claim {claim['claim']} has {len(claim['cells'])} lists of cells for {pieces} pieces")
    return found


def require_graph(graph: dict[str, Any], where: str) -> None:
    """Raises FormError unless a graph has its form, in which a kernel is defined before it is used, and is used."""
    _require(graph, GRAPH, where)
    first, used = 1 + len(graph["parameters"]), set[int]()
    values = [kernel["argument"] for kernel in graph["kernels"]] + [piece["value"] for piece in graph["pieces"]]
    for number, quotient in enumerate(values):
        known = min(first + number, first + len(graph["kernels"]))
        for terms in quotient:
            products = [[variable for variable, _ in powers] for _, powers in terms]
            variables = {variable for product in products for variable in product}
            if any(sorted({*product}) != product for product in products):
                raise FormError(f"{where} has a product whose variables are not in order")
            if max(variables, default=0) >= known:
                raise FormError(f"{where} uses a function before it is defined")
            if len({str(powers) for _, powers in terms}) < len(terms):
                raise FormError(f"{where} has a sum with two terms of the same powers")
            used |= variables
    if not used >= {*range(first, first + len(graph["kernels"]))}:
        raise FormError(f"{where} has a function that nothing uses")
    if any((kernel["kind"] == "power") != (kernel["exponent"] is not None) for kernel in graph["kernels"]):
        raise FormError(f"{where} has a power without exponent, or another function with one")
    if any(kernel["kind"] == "pi" and kernel["argument"][0] for kernel in graph["kernels"]):
        raise FormError(f"{where} has a constant with an argument")
