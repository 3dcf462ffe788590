"""Proves claims for all parameters in their ranges, divided where the sign of an expression in them matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from flint import fmpq, fmpq_mpoly

from halos_pl.proof.claims import Claim, Decision
from halos_pl.proof.deciding import Case
from halos_pl.proof.element import Element, UndecidedError
from halos_pl.proof.field import Field
from halos_pl.proof.interval import Interval
from halos_pl.proof.pieces import Unsettled, monic
from halos_pl.proof.program import CHOICES, Node
from halos_pl.proof.signs import Box

MOST_CASES = 60


@dataclass(frozen=True)
class Region:
    """A part of the space of the parameters.

    Attributes:
        ranges: of each parameter.
        signs: polynomials in the parameters, their signs, and whether these are strict.
        replaced: by its variable, what a parameter is, as a numerator and a denominator.
    """

    ranges: Mapping[str, Interval]
    signs: tuple[tuple[fmpq_mpoly, int, bool], ...] = ()
    replaced: Mapping[int, tuple[fmpq_mpoly, fmpq_mpoly]] = field(default_factory=dict)

    def nearest(self, parameters: Mapping[str, Fraction]) -> dict[str, Fraction] | None:
        """Values of the parameters, with those that the others determine; None if they are not in this region."""
        names, values = list(self.ranges), dict(parameters)
        for i, (top, bottom) in self.replaced.items():
            divisor = _value(bottom, values, names)
            if divisor == 0:
                return None
            values[names[i - 1]] = _value(top, values, names) / divisor
        inside = all(self.ranges[name].contains(values[name]) for name in names)
        for polynomial, sign, strict in self.signs:
            value = _value(polynomial, values, names)
            inside = inside and (value * sign > 0 or (value == 0 and not strict))
        return values if inside else None


class Prover:
    """Decides the claims about one expression.

    Args:
        nodes: the expression of v.
        parameters: ranges of its parameters.
        samples: values of the parameters at which to look for witnesses.
        deadline: CPU time (``time.process_time``) at which it stops.

    Attributes:
        cases: parts of the ranges, which together cover them.

    Raises:
        UndecidedError: v cannot be split into pieces.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        parameters: Mapping[str, Interval],
        samples: Sequence[Mapping[str, Fraction]] = ({},),
        deadline: float = float("inf"),
    ) -> None:
        self.nodes, self.samples, self.deadline = nodes, samples, deadline
        self._regions: dict[Case, Region] = {}
        self.cases = self._cases([Region(parameters)])

    @property
    def seams(self) -> list[float]:
        """Where what is recorded switches branches, but for places that depend on parameters."""
        return [float(seam.low) for case in self.cases for seam in case.seams if seam.low is not None]

    def decide(self, claim: Claim) -> Decision:
        """Proves or disproves a claim, or says what stops it."""
        todo, self.cases = self.cases, []
        merged, notes = Decision(claim, "proved"), list[str]()
        while todo and merged.status != "disproved":
            case = todo.pop()
            try:
                decision = case.decide(claim)
            except Unsettled as choice:
                try:
                    todo += self._cases(self._parts(self._regions[case], choice.polynomial))
                    continue
                except UndecidedError as error:
                    decision = Decision(claim, "undecided", str(error))
            self.cases.append(case)
            notes += [note for note in decision.notes if note not in notes]
            if merged.status == "proved" or decision.status == "disproved":
                merged = decision
        self.cases += todo
        merged.notes = notes
        return merged

    def _field(self, region: Region) -> Field:
        plain = {"u", "parameter", "constant", "add", "mul", "div", "lookup", "within", *CHOICES}
        functions = sum(name not in plain for name, *_ in self.nodes)
        field = Field(list(region.ranges), 24 + len(region.ranges) + 8 * functions)
        field.deadline = self.deadline
        field.assumed = list(region.signs)
        field.replaced = {i: Element(field, *quotient) for i, quotient in region.replaced.items()}
        return field

    def _cases(self, regions: Sequence[Region]) -> list[Case]:
        todo, found = list(regions), list[Case]()
        while todo:
            region = todo.pop()
            try:
                samples = [at for sample in self.samples if (at := region.nearest(sample)) is not None]
                found.append(Case(self.nodes, self._field(region), region.ranges, samples))
                self._regions[found[-1]] = region
            except Unsettled as choice:
                todo += self._parts(region, choice.polynomial)
            if len(self._regions) + len(todo) > MOST_CASES:
                raise UndecidedError(f"the signs of expressions in the parameters make more than {MOST_CASES} cases")
        return found

    def _parts(self, region: Region, polynomial: fmpq_mpoly) -> list[Region]:
        """The parts of a region where a polynomial in the parameters is below, at and above 0."""
        field = self._field(region)
        box = Box(field, Interval.of(0, 0), region.ranges)
        one = field.one.numerator
        loose = box.sign(Element(field, polynomial, one))[0]
        parts = []
        for sign in {-1, 0, 1} if loose is None else {0, loose}:
            if sign == 0:
                parts.append(self._where_zero(region, polynomial, box))
            else:
                parts.append(self._where_not_zero(region, polynomial, sign))
        return parts

    @staticmethod
    def _where_not_zero(region: Region, polynomial: fmpq_mpoly, sign: int) -> Region:
        """The part of a region where a polynomial has a sign: of one parameter alone, it is a range."""
        name, c, a = _only(polynomial, list(region.ranges))
        if name is None:
            return replace(region, signs=(*region.signs, (polynomial, sign, True)))
        x = region.ranges[name]
        low, high = x.ends
        inside = Interval.of(c, high, True, x.below_high) if sign * a > 0 else Interval.of(low, c, x.above_low, True)
        return replace(region, ranges={**region.ranges, name: inside})

    def _where_zero(self, region: Region, polynomial: fmpq_mpoly, box: Box) -> Region:
        """The part of a region where a polynomial is 0, which gives a parameter in terms of the others if it can."""
        field, one = box.field, box.field.one.numerator
        for i, degree in enumerate(polynomial.degrees()):
            if degree != 1:
                continue
            a = Element(field, polynomial.derivative(i), one)
            b = Element(field, polynomial, one) - a * field.variable(i)
            if not box.sign(a)[1]:
                continue
            root, values = -b / a, dict[int, Element]()
            values[i] = root
            signs = [
                self._assumed(field.composed(each, values), sign, strict, box) for each, sign, strict in region.signs
            ]
            x = region.ranges[field.parameters[i - 1]]
            for end, sign, strict in ((x.exact_low, 1, x.above_low), (x.exact_high, -1, x.below_high)):
                if end is not None:
                    apart = root - field.constant(Fraction(int(end.p), int(end.q)))
                    signs.append(self._assumed(apart, sign, strict, box))
            replaced = {i: root} | {
                k: field.composed(each.numerator, values) / field.composed(each.denominator, values)
                for k, each in field.replaced.items()
            }
            return Region(
                region.ranges,
                tuple(each for each in signs if each is not None),
                {k: (each.numerator, each.denominator) for k, each in replaced.items()},
            )
        return replace(region, signs=(*region.signs, (polynomial, 0, False)))

    @staticmethod
    def _assumed(element: Element, sign: int, strict: bool, box: Box) -> tuple[fmpq_mpoly, int, bool] | None:
        """The sign of an expression as that of its numerator; None if it says nothing."""
        top, flipped = monic(element) if not element.is_zero else (element, 0)
        bottom = box.sign(Element(box.field, element.denominator, box.field.one.numerator))[0]
        if bottom is None or top.numerator.is_constant():
            return None
        return top.numerator, sign * bottom * flipped, strict


def _value(polynomial: fmpq_mpoly, parameters: Mapping[str, Fraction], names: Sequence[str]) -> Fraction:
    """A polynomial in the parameters alone."""
    total = Fraction(0)
    for exponents, coefficient in polynomial.terms():
        term = Fraction(str(coefficient))
        for name, exponent in zip(names, exponents[1:], strict=False):
            term *= parameters[name] ** int(exponent)
        total += term
    return total


def _only(polynomial: fmpq_mpoly, names: Sequence[str]) -> tuple[str | None, fmpq, int]:
    """The parameter, its value where a p + c is 0, and the sign of a; None for another polynomial."""
    terms = {tuple(exponents): fmpq(coefficient) for exponents, coefficient in polynomial.terms()}
    constant = terms.pop((0,) * len(polynomial.degrees()), fmpq(0))
    if len(terms) != 1:
        return None, constant, 0
    ((exponents, a),) = terms.items()
    if sum(exponents) != 1:
        return None, constant, 0
    return names[exponents.index(1) - 1], -constant / a, 1 if a > 0 else -1
