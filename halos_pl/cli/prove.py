"""``halos prove``: proves that a value function never falls and is concave on gains, or finds where it is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from halos_pl.cli.errors import UsageError
from halos_pl.cli.targets import MEMORY, TIMEOUT, limited_child, value_function_of
from halos_pl.common.messages import plain


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """Runs in the child process: what is known about each claim, and the certificate if that is asked for."""
    from halos_pl.proof.certificate import certificate
    from halos_pl.proof.prove import prove as proved
    from halos_pl.proof.source import source_hash

    target, init_args = question["target"], question["init_args"]
    v = value_function_of(target, init_args, "halos prove")
    source = source_hash(v)
    proof = proved(v)
    width = max(map(len, proof.outcomes))
    lines = [f"{proof.name}, {proof.seconds:.1f} s", ""]
    for name, outcome in proof.outcomes.items():
        lines.append(f"{name:<{width}}  {outcome}")
        lines += [f"{'':<{width}}  {note}" for note in outcome.notes]
    statuses = [outcome.status for outcome in proof.outcomes.values() if outcome.claim.side >= 0]
    data, reasons = certificate(proof, target, init_args, source, v) if question["certificate"] else (None, {})
    return {"lines": lines, "statuses": statuses, "certificate": data, "reasons": reasons}


def prove(
    target: str,
    *,
    init_args: str | None = None,
    certificate: Path | None = None,
    timeout: float = TIMEOUT,
    memory: str = MEMORY,
) -> None:
    """Prove that a value function never falls and is concave on gains, on the whole real line.

    The proof is about the real function that the code computes, with constants read as decimals: not about rounding,
    dtypes, state or gradients, which halos check searches. The code of the target is executed, in a process of its own.
    Exit status: 0 if v has the shape of a HALO's value function, 1 if not, 2 if it is undecided or there is nothing to
    prove or to certify.

    Args:
        target: a value function or an objective, named as for halos check.
        init_args: arguments of the class as JSON, such as '{"beta": 0.2}'.
        certificate: file that receives the proof, for halos verify.
        timeout: seconds that the proof may take.
        memory: memory that the proof may take, such as 4GB.
    """
    import halos_pl.proof.certificate  # noqa: F401  # in the child, its time would count
    from halos_pl.conformance.target import TargetError, UncheckableError

    if certificate is not None and (certificate.is_dir() or not certificate.parent.is_dir()):
        fault = "a folder" if certificate.is_dir() else f"there is no folder {certificate.parent}"
        raise UsageError(f"halos prove: --certificate {certificate}: {fault}")
    try:
        with limited_child(_answer, "halos prove", timeout, memory) as process:
            asked = {"target": target, "init_args": init_args, "certificate": certificate is not None}
            answer = process.ask(asked)
    except UncheckableError as error:
        raise UsageError(plain(f"halos prove: {target} is undecided: {error}")) from error
    except TargetError as error:
        raise UsageError(plain(f"halos prove: {error}")) from error
    print("\n".join(answer["lines"]))
    written = certificate is None or _write(certificate, answer["certificate"], answer["reasons"])
    if "disproved" in answer["statuses"]:
        raise SystemExit(1)
    if not written:
        raise SystemExit(2)
    if "undecided" in answer["statuses"]:
        print("undecided does not mean wrong: halos check searches for a counterexample", file=sys.stderr)
        raise SystemExit(2)


def _write(path: Path, data: dict[str, Any], reasons: dict[str, str]) -> bool:
    """Writes a certificate, unless it would contain no proof, and says what it lacks; whether it was written."""
    print()
    if empty := all(claim["graph"] is None for claim in data["claims"]):
        print(f"certificate: {path} is not written, since it would contain no proof")
    else:
        try:
            path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"halos prove: --certificate {path}: {error.strerror or error}") from error
        print(f"certificate: {path}; check it with halos verify {path}")
    for claim in data["claims"]:
        if reason := reasons.get(claim["claim"]):
            print(f"  {claim['claim']} is {'for less' if claim['graph'] is not None else 'not'} in it: {reason}")
    return not empty
