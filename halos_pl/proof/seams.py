"""What v is at a switching point itself, which may be neither of its limits there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from halos_pl.proof.element import Element, UndecidedError
from halos_pl.proof.evaluation import Evaluation, Undecided
from halos_pl.proof.pieces import Piece, Seam, Splitter, monic
from halos_pl.proof.signs import Box

MOST_ASSUMED = 3  # choices at a seam that depend on parameters


def values_at(splitter: Splitter, seam: Seam, sides: tuple[Piece, Piece], box: Box) -> list[Element]:
    """What v may be at a seam: more than one value where a choice there depends on parameters."""
    possible = _possible(splitter, seam, sides, box)
    root, found = splitter.field.u if seam.root is None else seam.root, list[Element]()
    todo: list[dict[str, int]] = [{}]
    while todo:
        assumed = todo.pop()
        sign = partial(_sign_at, seam=seam, box=box, assumed=assumed, possible=possible)
        evaluation = Evaluation(
            splitter.nodes, splitter.field, root, sign, box.range, {}, seam.sums, splitter.tables, splitter.partial
        )
        try:
            found.append(evaluation.value())
            unmet = next((each for each in evaluation.conditions().values() if not each.holds(box)), None)
            if unmet is not None:
                raise UndecidedError(f"{seam.label}: v may be undefined: {unmet}")
        except Undecided as choice:
            if len(assumed) == MOST_ASSUMED:
                raise UndecidedError(f"{seam.label}: the branch that v takes there is not found") from choice
            key = monic(choice.difference)[0].key
            todo += [{**assumed, key: each} for each in possible.get(key, (-1, 0, 1))]
    return found


def _possible(splitter: Splitter, seam: Seam, sides: tuple[Piece, Piece], box: Box) -> dict[str, set[int]]:
    """Signs at a seam of differences whose roots depend on parameters: 0, or those on either side."""
    found: dict[str, set[int]] = {}
    for key in sides[0].signs.keys() & sides[1].signs.keys() & splitter.roots.keys():
        other, rises = splitter.roots[key]
        if seam.root is None:
            continue
        apart = seam.root - other
        bottom, strict = box.sign(Element(splitter.field, apart.denominator, splitter.field.one.numerator))
        if not apart.is_zero and bottom and strict:
            top, flipped = monic(apart)
            found[top.key] = {0, *(side.signs[key] * rises * flipped * bottom for side in sides)}
    return found


def _sign_at(
    difference: Element, seam: Seam, box: Box, assumed: Mapping[str, int], possible: Mapping[str, set[int]]
) -> int:
    """The sign of a difference at a seam, where the seam's own one is 0."""
    value = difference.rational
    if value is not None:
        return (value > 0) - (value < 0)
    found, strict = box.sign(difference)
    if found == 0 or (found is not None and strict):
        return found
    top, flipped = monic(difference)
    if seam.root is None and seam.top is not None:
        common = top.numerator.gcd(seam.top.numerator)
        rest = box.field.quotient(seam.top.numerator, common)
        if not common.is_constant() and box.sign(rest)[1]:
            return 0
    bottom, strict = box.sign(Element(box.field, difference.denominator, box.field.one.numerator))
    if bottom is None or not strict:
        raise UndecidedError(f"{seam.label}: v may be undefined")
    if top.key not in assumed:
        one_sided = {each * flipped * bottom for each in possible.get(top.key, ()) if each}
        raise Undecided(difference, one_sided.pop() if found is None and len(one_sided) == 1 else found)
    return assumed[top.key] * flipped * bottom
