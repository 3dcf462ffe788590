"""``halos prove``: proves that a value function never falls and is concave on gains, or finds where it is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from halos_pl.cli.errors import RunError, UsageError

if TYPE_CHECKING:
    from halos_pl.proof.prove import Proof
    from value_functions import ValueFunction


def value_function_of(target: str, init_args: str | None, command: str) -> ValueFunction:
    """The value function that a command names, or that of the objective that it names.

    Raises:
        UsageError: there is none.
    """
    from halos_pl.common.experiments import PresetError, config_file, objectives
    from halos_pl.common.own_plugins import OwnPluginError, import_own
    from halos_pl.conformance.target import KINDS, TargetError, load_target
    from value_functions import ValueFunction

    try:
        if target in objectives():
            target = str(config_file(target, objectives(), command))
        else:
            import_own(target, KINDS)
        found = load_target(target, init_args)
    except (PresetError, OwnPluginError, TargetError) as error:
        raise UsageError(f"{command}: {error}") from error
    v = found if isinstance(found, ValueFunction) else getattr(found, "value_function", None)
    if not isinstance(v, ValueFunction):
        raise UsageError(f"{command}: {target} is no value function and has none; name one, such as Logistic")
    return v


def report(proof: Proof) -> list[str]:
    """Lines for people."""
    lines = [f"{proof.name}, {proof.seconds:.1f} s", ""]
    width = max(map(len, proof.outcomes))
    for name, outcome in proof.outcomes.items():
        lines.append(f"{name:<{width}}  {outcome}")
        lines += [f"{'':<{width}}  {note}" for note in outcome.notes]
    return lines


def prove(target: str, *, init_args: str | None = None, certificate: Path | None = None) -> None:
    """Prove that a value function never falls and is concave on gains, on the whole real line.

    The proof is about the real function that the code computes, with constants read as decimals: not about rounding,
    dtypes, state or gradients, which halos check searches. The code of the target is executed. Exit status: 0 if v has
    the shape of a HALO's value function, 1 if not, 2 if it is undecided or there is nothing to prove.

    Args:
        target: a value function or an objective, named as for halos check.
        init_args: arguments of the class as JSON, such as '{"beta": 0.2}'.
        certificate: file that receives the proof, for halos verify.
    """
    from halos_pl.proof.certificate import certificate as certified
    from halos_pl.proof.certificate import source_hash
    from halos_pl.proof.prove import prove as proved

    v = value_function_of(target, init_args, "halos prove")
    proof = proved(v)
    print("\n".join(report(proof)))
    if certificate is not None:
        data = certified(proof, target, init_args, source_hash(v))
        try:
            certificate.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{certificate}: {error.strerror or error}") from error
        print(f"\ncertificate: {certificate}; check it with halos verify {certificate}")
        for claim in data["claims"]:
            if claim["status"] == "not certified":
                print(f"not certified: {claim['claim']}: {claim['reason']}")
    statuses = [outcome.status for outcome in proof.outcomes.values() if outcome.claim.side >= 0]
    if "disproved" in statuses:
        raise SystemExit(1)
    if "undecided" in statuses:
        print("undecided does not mean wrong: halos check searches for a counterexample", file=sys.stderr)
        raise SystemExit(2)
