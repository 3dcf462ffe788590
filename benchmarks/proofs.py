"""Proves the shape of every shipped value function, alone and in each wrapper: what is known, and the CPU time.

    OMP_NUM_THREADS=1 python benchmarks/proofs.py

``all``: proved for all hyper-parameters. ``some``: proved as given, and disproved for others. ``given``: proved as
given, and undecided for others. ``false``: disproved as given. ``open``: undecided. The exit status is 1 if a claim is
``given``. There is no peer to compare with: no other library proves anything about its losses.
"""

from __future__ import annotations

import sys
from pathlib import Path

import value_functions
from halos_pl.proof.claims import CLAIMS
from halos_pl.proof.prove import Outcome, prove

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def known(outcome: Outcome) -> str:
    """What is known about a claim, in a word."""
    if outcome.status != "proved":
        return "false" if outcome.status == "disproved" else "open"
    if "given" not in outcome.scope:
        return "all"
    return "some" if outcome.reason.startswith("disproved") else "given"


def main() -> None:
    """Prints the table."""
    from make_parts import WRAPPERS, example, library  # of the tests

    shipped = library(value_functions.__name__)
    alone = {name: example(cls) for name, cls in shipped.items() if name not in WRAPPERS}
    targets = alone | {f"{w}({name})": wrap(v) for w, wrap in WRAPPERS.items() for name, v in alone.items()}
    print("| value function | " + " | ".join(claim.name for claim in CLAIMS) + " | s |")
    print("| --- | --- | --- | --- | --- |")
    found, seconds = [], []
    for name, v in targets.items():
        proof = prove(v)
        found += (words := [known(proof.outcomes[claim.name]) for claim in CLAIMS])
        seconds.append(proof.seconds)
        print(f"| {name} | " + " | ".join(words) + f" | {proof.seconds:.2f} |", flush=True)
    counts = ", ".join(f"{found.count(word)} {word}" for word in ("all", "some", "false", "given", "open"))
    print(f"\n{len(targets)} value functions, {len(found)} claims: {counts}; at most {max(seconds):.2f} s of CPU time")
    sys.exit("given" in found)


if __name__ == "__main__":
    main()
