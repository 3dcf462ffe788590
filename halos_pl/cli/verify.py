"""``halos verify``: checks a certificate of ``halos prove`` without the prover."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from halos_pl.cli.errors import UsageError


def verify(certificate: Path) -> None:
    """Check a certificate of halos prove, by a program that shares no code with the prover.

    The code of the function that the certificate names is executed. Exit status: 0 if every claim that the certificate
    makes holds, 1 if it is refused, 2 if it cannot be read or proves nothing.

    Args:
        certificate: file written by halos prove --certificate.
    """
    import torch

    from halos_pl.cli.prove import value_function_of
    from halos_pl.proof.agreement import compare
    from halos_pl.proof.certificate import FORMAT, source_hash
    from halos_pl.proof.verify import RefusedError
    from halos_pl.proof.verify import verify as verified

    try:
        data = json.loads(certificate.read_text(encoding="utf-8"))
        target, init_args, form = data["target"], data["init_args"], data["format"]
    except OSError as error:
        raise UsageError(f"halos verify: {certificate}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"halos verify: {certificate} is no certificate; write one with halos prove") from error
    if form != FORMAT:
        raise UsageError(f"halos verify: {certificate} has format {form}; this version reads {FORMAT}: prove again")
    v = value_function_of(target, init_args, "halos verify")

    def values(us: list[float]) -> list[float]:
        with torch.no_grad():
            found: list[float] = v(torch.tensor(us, dtype=torch.float64)).tolist()
        return found

    try:
        claims = verified(data, source_hash(v))
        for graph in {claim["graph"] for claim in claims}:
            compare(data["graphs"][graph], values)
    except RefusedError as error:
        print(f"halos verify: {certificate} is refused: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        print(f"halos verify: {certificate} is refused: it is damaged ({type(error).__name__})", file=sys.stderr)
        raise SystemExit(1) from error
    if not claims:
        raise UsageError(f"halos verify: {certificate} contains no proof")
    for claim in claims:
        print(f"{claim['claim']}: proved{_scope(data['graphs'][claim['graph']]['parameters'])}")


def _scope(parameters: dict[str, dict[str, Any]]) -> str:
    """The parameters that a proof holds for, from the ranges that the checker used."""
    texts = []
    for name, p in parameters.items():
        left, right = (
            "(" if p["above_low"] or p["low"] is None else "[",
            ")" if p["below_high"] or p["high"] is None else "]",
        )
        texts.append(f"{name} in {left}{p['low'] or '-inf'}, {p['high'] or 'inf'}{right}")
    return f" for every {', '.join(texts)}" if texts else " for the hyper-parameters as given"
