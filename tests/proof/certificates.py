"""Certificates of value functions that tests construct, checked as ``halos verify`` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from halos_pl.proof import agreement, form, verify
from halos_pl.proof.certificate import certificate
from halos_pl.proof.prove import Proof, prove
from value_functions import ValueFunction

SOURCE = "0" * 64  # in the place of a hash of the code


def certified(build: Callable[[], ValueFunction], proof: Proof | None = None) -> dict[str, Any]:
    """The certificate of a value function."""
    return json.loads(json.dumps(certificate(proof or prove(build()), "v", None, SOURCE, build())[0]))


def accepted(data: dict[str, Any], build: Callable[[], ValueFunction], source: str = SOURCE) -> set[str]:
    """The claims of a certificate.

    Raises:
        FormError: it is none.
        RefusedError: it is refused.
    """
    read = form.read(json.dumps(data).encode())
    proved = verify.verify(read, source)
    for graph in read["graphs"]:
        agreement.compare(graph, build())
    return {*proved}
