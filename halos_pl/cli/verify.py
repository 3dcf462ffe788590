"""``halos verify``: checks a certificate of ``halos prove`` without the prover."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from halos_pl.cli.errors import UsageError
from halos_pl.cli.targets import MEMORY, TIMEOUT, limited_child, value_function_of
from halos_pl.common.messages import plain


def verify(certificate: Path, *, timeout: float = TIMEOUT, memory: str = MEMORY) -> None:
    """Check a certificate of halos prove, without the search for the proof.

    The expression in it is checked by a program of its own. That this is the expression of v is checked by code that
    halos prove uses as well: what constructs, hashes and runs v.

    The code of the function that the certificate names is executed, in a process of its own. Exit status: 0 if every
    claim that the certificate makes holds, 1 if it is refused, 2 if it is no certificate, proves nothing, or could not
    be checked.

    Args:
        certificate: file written by halos prove --certificate.
        timeout: seconds that the check may take.
        memory: memory that the check may take, such as 4GB.
    """
    from halos_pl.conformance.target import TargetError, UncheckableError
    from halos_pl.proof.form import LARGEST, FormError, read, versions

    try:
        if not certificate.is_file():
            raise UsageError(f"halos verify: {certificate}: {'not a file' if certificate.exists() else 'no such file'}")
        if certificate.stat().st_size > LARGEST:
            raise UsageError(f"halos verify: {certificate} has more than {LARGEST >> 20} MB and is no certificate")
        data = read(certificate.read_bytes())
    except OSError as error:
        raise UsageError(f"halos verify: {certificate}: {error.strerror or error}") from error
    except FormError as error:
        raise UsageError(f"halos verify: {certificate} is no certificate: {error}") from error
    if all(claim["graph"] is None for claim in data["claims"]):
        raise UsageError(f"halos verify: {certificate} contains no proof")
    try:
        with limited_child(_answer, "halos verify", timeout, memory) as process:
            answer = process.ask(data)
    except UncheckableError as error:
        raise UsageError(plain(f"halos verify: {certificate} could not be checked: {error}")) from error
    except TargetError as error:
        raise UsageError(plain(f"halos verify: {error}")) from error
    if answer["refused"] is not None:
        print(plain(f"halos verify: {certificate} is refused: {answer['refused']}"), file=sys.stderr)
        raise SystemExit(1)
    for claim in data["claims"]:
        if claim["graph"] is None:
            print(f"{claim['claim']}: not in the certificate")
            continue
        print(f"{claim['claim']}: proved{_scope(data['graphs'][claim['graph']]['parameters'])}")
        for jump in answer["proved"][claim["claim"]]:
            print(f"  {jump}")
    for name, now in versions().items():
        if data["versions"][name] != now:
            print(f"halos verify: proved with {name} {data['versions'][name]}, checked with {now}", file=sys.stderr)


def _answer(data: dict[str, Any]) -> dict[str, Any]:
    """Runs in the child process: the proved claims with the jumps that the tolerance excuses, or why it is refused."""
    from halos_pl.proof.agreement import compare
    from halos_pl.proof.source import source_hash
    from halos_pl.proof.verify import RefusedError
    from halos_pl.proof.verify import verify as verified

    v = value_function_of(data["target"], data["init_args"], "halos verify")
    try:
        proved = verified(data, source_hash(v))
        for graph in data["graphs"]:
            compare(graph, v)
    except RefusedError as error:
        return {"refused": str(error), "proved": {}}
    return {"refused": None, "proved": proved}


def _scope(parameters: list[dict[str, Any]]) -> str:
    """The parameters that a proof holds for, from the ranges that the checker used."""
    texts = []
    for p in parameters:
        left, right = (
            "(" if p["above_low"] or p["low"] is None else "[",
            ")" if p["below_high"] or p["high"] is None else "]",
        )
        texts.append(f"{p['name']} in {left}{p['low'] or '-inf'}, {p['high'] or 'inf'}{right}")
    return f" for every {', '.join(texts)}" if texts else " for the hyper-parameters as given"
