"""A part of a loss, or a loss, later in training: after many calls, and with learnable parameters that moved."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from halos_pl.batch import LogProbBatch, Needs, Routing
from halos_pl.conformance.backward import runs_code_backwards
from halos_pl.conformance.clause import Case, Clause, Law
from halos_pl.conformance.devices import DEVICE, on_another_device
from halos_pl.conformance.duplicate import duplicate
from halos_pl.conformance.states import STATES, copies, pushed
from halos_pl.conformance.steps import with_leaf, with_outputs
from halos_pl.conformance.switches import multiplies_matrices
from halos_pl.conformance.witness import pair
from halos_pl.labels import Labels

CALLS = 5000
# Calls after which a part is compared again that has been worn, or whose parameters have moved.
_CALLS_LATER = 20
_CALLS_OF_AN_EPOCH = 10  # before each validation, which turns a part to evaluation and back
# Steps on which a clause is tried for a part as it is later.
EXAMPLES = 12
_ROUNDED = 2e-2  # of a matrix product in bfloat16


def state_of(part: object) -> object:
    """A key that is equal for two parts if and only if they have the same class and equal contents."""
    try:
        return pickle.dumps(part)
    except Exception:  # such as a lambda, which equals only itself
        return id(part)


class PartCase(Case):
    """One part of a loss under check, now and later in training.

    A kind of part defines ``called``, ``drawn`` and ``of``.

    Attributes:
        target: the part.
        steps: number of calls after which the part is checked again.
        has_slope: whether training calls the part with outputs of the policy that have a gradient.
        origin: the part before the history of ``target``; None if it has none.
    """

    target: Any
    steps = CALLS
    has_slope = True
    origin: Any = None

    def called(self, part: nn.Module, rows: LogProbBatch) -> Tensor:
        """What a part returns for the rows, as one tensor."""
        raise NotImplementedError

    def of(self, part: nn.Module, examples: int) -> PartCase:
        """The same case of another part of the kind."""
        raise NotImplementedError

    def drawn(self, number: int) -> LogProbBatch:
        """Rows of a small step; the larger its number, the more."""
        raise NotImplementedError

    def lived(self) -> Iterator[tuple[str, PartCase]]:
        """Cases of the part after steps of training that have changed it, with these in words; by default, none."""
        return iter(())

    @property
    def small(self) -> LogProbBatch:
        """Rows of a small step."""
        return self.drawn(1)

    def as_trained(self, rows: LogProbBatch) -> tuple[Tensor | None, LogProbBatch]:
        """The leaf with the policy's outputs, None if these have no gradient, and the rows with them."""
        return with_leaf(rows, Needs(scalar=rows.scalar is not None)) if self.has_slope else (None, rows)

    def repeated(self, rows: LogProbBatch) -> Callable[[Any], Tensor]:
        """``called`` for the same rows, many times."""
        return lambda part: self.called(part, rows)

    def alike(self, first: Tensor, later: Tensor) -> bool:
        """Whether a later result for the same rows is right, given the first one."""
        return torch.equal(first, later) or torch.allclose(later.double(), first.double(), rtol=1e-5, atol=0.0)

    def with_history(self, law: Law) -> bool:
        """Whether the clause must also hold after many calls with other rows than those of the clause."""
        return True

    @cached_property
    def worn(self) -> tuple[str | None, nn.Module]:
        """The part after many calls with the same rows, and the witness of a call that gave another result or slope.

        Each call has a backward pass if that runs code of the part, else one in ten.
        """
        part, (leaf, rows) = duplicate(self.target), self.as_trained(self.small)
        call_of = self.repeated(rows)
        every = _CALLS_OF_AN_EPOCH
        if leaf is not None and runs_code_backwards(
            lambda outputs: self.called(duplicate(self.target), with_outputs(rows, outputs)), leaf
        ):
            every = 1
        with torch.set_grad_enabled(leaf is not None):
            first = call_of(part)
            slope, first = _slope(first, leaf), first.detach()
            for call in range(2, self.steps + 1):
                if call % _CALLS_OF_AN_EPOCH == 0:
                    part.eval().train()
                result = call_of(part)
                if not self.alike(first, result):
                    return f"{_off(first, result)} on call {call}", part
                if call % every == 0 and not self.alike(slope, later := _slope(result, leaf)):
                    return f"slope {_off(slope, later)} in a log-prob, on call {call}", part
        return None, part

    @property
    def _when_worn(self) -> str:
        return f"after {self.steps:,} calls"

    @cached_property
    def later(self) -> list[tuple[str, PartCase]]:
        """Cases of the part with other parameters, and after many calls or steps if these have changed it."""
        cases = [(f"with {words}", self.of(part, EXAMPLES)) for words, part in pushed(self.target)]
        witness, worn = self.worn
        if witness is None and state_of(worn) != state_of(duplicate(self.target)):
            cases.append((self._when_worn, self.of(worn, EXAMPLES)))
        cases += self.lived()
        for _, case in cases:
            case.steps = _CALLS_LATER
        return cases

    def now_and_later(self, law: Law) -> str | None:
        """The witness of a clause for the part as it is, else as it may be later in training."""
        if (witness := self.witness(law)) is not None:
            return witness
        later = [(words, case) for words, case in self.later if words != self._when_worn or self.with_history(law)]
        found = ((words, case.witness(law)) for words, case in later)
        return next((f"{witness}, {words}" for words, witness in found if witness is not None), None)

    def clause(self, law: Law, **details: Any) -> Clause:
        return super().clause(law, **({"check": lambda: self.now_and_later(law)} | details))

    def changes(self) -> str | None:
        """Where the part returns something else after many calls, in another state of training, or as a copy."""
        for when, first, result, slack in self._elsewhere():
            if result.shape != first.shape or not bool(
                ((result.double() - first.double()).abs() <= slack * (1e-9 + first.double().abs().max())).all()
            ):
                return f"{_off(first, result)} {when}"
        return self.worn[0]

    def _elsewhere(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """States in words, what the part returns, and returns in each, and the relative difference that is allowed."""
        other, (leaf, rows) = self.drawn(2), self.as_trained(self.small)
        first = self.called(duplicate(self.target), rows)
        slope, first = _slope(first, leaf), first.detach()
        if leaf is not None:
            yield "if its input has no gradient", first, self.called(duplicate(self.target), self.small), 1e-5
        rounded = _ROUNDED if multiplies_matrices(lambda: self.called(duplicate(self.target), rows)) else 0.0
        for state in STATES:
            part, slack = duplicate(self.target), max(1e-5, state.constants, rounded * state.rounds)
            self.called(part, rows)  # a running mean has a value in evaluation only after a step
            with state.entered(part):
                result = self.called(part, rows)
                later = _slope(result, leaf) if leaf is not None and state.gradient else None
            yield state.name, first, result.detach().clone(), slack
            if later is not None:
                yield f"for its slope in a log-prob, {state.name}", slope, later, slack
        used = duplicate(self.target)
        for step in (rows, other):
            self.called(used, step)
        validated = duplicate(used).eval()
        self.called(validated, other)
        again = self.called(duplicate(used), rows).detach()
        new = self.target if self.origin is None else self.origin
        for words, part in (("after a validation", validated.train()), *copies(used, new)):
            yield f"{words}, after two other calls", again, self.called(part, rows).detach(), 1e-5

    def device(self) -> str | None:
        """What of the part would stay behind on another device, in words; else None."""
        rows = self.small
        witness = on_another_device(duplicate(self.target), lambda part: self.called(part, _moved(rows)))
        return witness and f"on another device, {witness}"


def _slope(value: Tensor, leaf: Tensor | None) -> Tensor:
    """The gradient of the sum of ``value``; zeros if it has none, and no numbers without a leaf."""
    if leaf is None or not value.requires_grad:
        return value.new_zeros(0 if leaf is None else leaf.shape)
    (slope,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope


def _off(first: Tensor, later: Tensor) -> str:
    if first.shape != later.shape:
        return f"shape {tuple(first.shape)}, {tuple(later.shape)}"
    first, later = first.detach(), later.detach()
    place = int((first.double() - later.double()).abs().nan_to_num(nan=torch.inf).argmax())
    return "{}, {}".format(*pair(float(first.flatten()[place]), float(later.flatten()[place])))


def _moved(rows: LogProbBatch) -> LogProbBatch:
    """The rows on the other device."""
    moved: dict[str, Any] = {
        name: value.to(DEVICE) for name, value in vars(rows).items() if isinstance(value, Tensor | Labels)
    }
    routing = rows.routing and Routing(rows.routing.probability.to(DEVICE), rows.routing.chosen.to(DEVICE))
    return replace(rows, **moved, routing=routing)
