"""The clause that v is the same function at any time: in every mode, after any calls, at any hour, as a copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from halos_pl.conformance.backward import alike_graphs, runs_code_backwards
from halos_pl.conformance.clause import explained
from halos_pl.conformance.curve import called, in_pieces, value_and_slope
from halos_pl.conformance.rounding import sums
from halos_pl.conformance.states import STATES, State, copies, pushed, twins
from halos_pl.conformance.switches import multiplies_matrices
from halos_pl.conformance.value_case import FIRST, ValueFunctionCase, varied_outcomes
from halos_pl.conformance.witness import number, pair

# A run of this many steps calls v as often, with batches of some of these sizes.
MANY_CALLS = 5000
_ROWS = (1, 2, 3, 8, 16, 32, 33, 64)
_CALLS_AT_ONCE = 100
_CALLS_OF_A_BACKWARD = 10
# By how many rounding errors of v's intermediate results two results may differ: torch's kernels depend on the size of
# a batch and the place in it.
_ROUNDINGS = 4
_CLOSE = 8  # rounding errors of v itself, which are always allowed


def difference_of(
    case: ValueFunctionCase,
    one: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    u: Tensor,
    eps: float | None = None,
    constants: float = 0.0,
) -> str | None:
    """Where two results for the same outcomes differ by more than the order of operations explains; else None.

    Args:
        case: v, whose intermediate results may be larger than its values.
        one: values and slopes, [n].
        other: likewise, as they should be the same.
        u: the outcomes, nats, [n].
        eps: relative rounding error of one operation; default: that of the dtype of ``u``.
        constants: relative rounding error of factors inside v.
    """
    pairs, close = tuple(zip(one, other, strict=True)), _CLOSE * torch.finfo(u.dtype).eps
    if all(torch.equal(a, b) or torch.allclose(a, b, rtol=close, atol=0.0) for a, b in pairs):  # almost every call
        return None
    eps = eps or torch.finfo(u.dtype).eps
    value = max(256 * eps, constants) * (one[0].abs() + (u * one[1]).abs()).double()
    # Slopes may cancel inside v, so they only have to agree in half of their digits.
    mean = one[1][one[1].isfinite()].abs().double().sum() / max(len(u), 1)
    slope = max(eps, constants) ** 0.5 * (one[1].abs().double() + mean)
    for name, a, b, most in (("v", one[0], other[0], value), ("v'", one[1], other[1], slope)):
        wrong = ~((a - b).abs() <= most + torch.finfo(torch.float32).tiny)
        wrong &= (a != b) & ~(a.isnan() & b.isnan())
        if name == "v" and bool(wrong.any()):
            most = most + _ROUNDINGS * eps * sums(case.fresh(), u.double())
            wrong &= ~((a - b).abs() <= most)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            return f"{name}({number(float(u[at]))}) = {{}}, {{}} as row {at + 1} of {len(u)}".format(
                *pair(float(a[at]), float(b[at]))
            )
    return None


@explained(
    example="""
        def forward(self, u):
            return torch.sigmoid(u + 0.01 * torch.randn_like(u))
        """,
    cure="""Remove random draws, counters, caches, running statistics, and branches on self.training, the clock,
    torch.is_grad_enabled(), torch.is_autocast_enabled() or the default dtype.""",
)
def deterministic(case: ValueFunctionCase) -> str | None:
    """The same outcome has the same value on every call.

    In training, evaluation, inference mode and autocast, with and without gradient, with another default dtype, later,
    after 5,000 calls (and as many backward passes, if these run code of v), after calls with similar outcomes and
    between these and their backward pass, in a deep copy, in a copy that has loaded its state_dict, and in one that is
    constructed anew and then loads it. In autocast, matrix products may round. After an optimizer has moved its
    parameters, v is what they now say.
    """
    if found := _since_the_first_call(case):
        return found
    for dtype in (torch.float64, torch.float32):
        for witness in (_at_minus_zero, _on_each_call, _in_each_state, _of_copies, _after_similar_outcomes):
            if found := witness(case, dtype):
                return found if dtype == torch.float64 else f"{found}, in float32"
    return _after_a_step(case) or _built_anew(case) or _after_many_calls(case)


def _since_the_first_call(case: ValueFunctionCase) -> str | None:
    """Compares with the call before all others: copies may share what a class, module or closure keeps."""
    if case.first_call is None:
        return None
    difference = difference_of(case, case.first_call, value_and_slope(case.fresh(), FIRST), FIRST)
    return difference and f"{difference}; the second is after calls of other copies"


def _at_minus_zero(case: ValueFunctionCase, dtype: torch.dtype) -> str | None:
    """0 and -0 are one outcome: at the start of a run, a reflected row has the latter."""
    zero = torch.zeros(1).to(dtype)
    both = zip(("v", "v'"), value_and_slope(case.fresh(), zero), value_and_slope(case.fresh(), -zero), strict=True)
    for name, plus, minus in both:
        if plus != minus and bool(plus.isfinite() & minus.isfinite()):  # else another clause reports it
            return f"{name}(0) = {number(float(plus))}, {name}(-0) = {number(float(minus))}"
    return None


def _on_each_call(case: ValueFunctionCase, dtype: torch.dtype) -> str | None:
    """Calls one copy again and again: with one batch, then with another, with a large one, and with the first again."""
    for n, count in ((1, 120), (64, 14), (257, 4)):
        u, other = varied_outcomes(n).to(dtype), (varied_outcomes(n) * 0.7 + 0.3).to(dtype)
        large = varied_outcomes(min(5003, case.largest_batch)).to(dtype)
        first, v = value_and_slope(case.fresh(), u), case.fresh()
        for call in range(1, count + 1):
            if difference := difference_of(case, first, value_and_slope(v, u), u):
                return f"{difference}; the second is on call {call}"
        for batch, words in ((other, "other outcomes"), (large, "other outcomes"), (u, f"{len(large)} outcomes")):
            if difference := difference_of(
                case, value_and_slope(case.fresh(), batch), value_and_slope(v, batch), batch
            ):
                return f"{difference}; the second is after calls with {words}"
    return None


def _in_each_state(case: ValueFunctionCase, dtype: torch.dtype) -> str | None:
    """Calls a copy in each state, at once and after a call in training, and then in training.

    The backward pass is in the state too, or after it, as that of a forward pass in autocast.
    """
    u = varied_outcomes(64).to(dtype)
    expected = value_and_slope(case.fresh(), u)
    for trained in (False, True):
        for state in STATES:
            v = case.fresh()
            if trained:
                value_and_slope(v, u)
            with state.entered(v):
                # Without gradient the slope that is expected.
                value, slope = called(v, u) if state.gradient else (v(u.clone()).detach(), lambda: expected[1])
                inside = None if trained else slope()
            result = (value, slope() if inside is None else inside)
            if difference := difference_of(case, expected, result, u, _rounding(case, state), state.constants):
                return f"{difference}; the second is {state.name}{', its backward pass after that' if trained else ''}"
            if value.is_inference() and not trained:
                continue  # what v keeps from inference mode has no gradient, and training comes before validation
            if difference := difference_of(case, expected, value_and_slope(v, u), u):
                return f"{difference}; the second is in training, after a call {state.name}"
    return None


def _rounding(case: ValueFunctionCase, state: State) -> float | None:
    """The rounding error of one operation in the state, if it is another than outside of it."""
    return torch.finfo(torch.bfloat16).eps if state.rounds and _multiplies_matrices(case) else None


def _multiplies_matrices(case: ValueFunctionCase) -> bool:
    return multiplies_matrices(lambda: case.fresh()(torch.tensor([0.5, -0.5])))


def _of_copies(case: ValueFunctionCase, dtype: torch.dtype) -> str | None:
    u = varied_outcomes(64).to(dtype)
    expected = value_and_slope(case.fresh(), u)
    for words, v in copies(case.fresh()):
        if difference := difference_of(case, expected, value_and_slope(v, u), u):
            return f"{difference}; the second is {words}"
    return None


def _after_a_step(case: ValueFunctionCase) -> str | None:
    """Moves the learnable parameters of a copy that has been called, as an optimizer does."""
    u = varied_outcomes(64)
    for words, moved in pushed(case.target):
        expected, v = value_and_slope(moved, u), case.fresh()
        value_and_slope(v, u)
        with torch.no_grad():
            for parameter, now in zip(v.parameters(), moved.parameters(), strict=True):
                parameter.copy_(now)
        if difference := difference_of(case, expected, value_and_slope(v, u), u):
            return f"{difference}; the second is of a copy that was called before, with {words}"
    return None


def _similar(u: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Batches that a cache may take for ``u``: in some respect they are the same."""
    yield "in another order", u.flip(0)
    yield "in another order", torch.cat([u[:1], u[1:-1].flip(0), u[-1:]])
    yield "in another order", u.sort().values
    yield "with the opposite sign", -u
    yield "of which one is another", torch.cat([u[:7], u[7:8] + 0.25, u[8:]])
    yield "with the same sum", torch.cat([u[:5], u[5:6] + 0.5, u[6:7] - 0.5, u[7:]])
    yield "that differ by a millionth", u * (1 + 1e-6)
    yield "with the same largest and smallest", torch.where((u == u.max()) | (u == u.min()), u, 0.5 * u)


def _after_similar_outcomes(case: ValueFunctionCase, dtype: torch.dtype) -> str | None:
    """A cache whose key misses something returns the values of an earlier batch."""
    u = varied_outcomes(64).to(dtype)
    alone = value_and_slope(case.fresh(), u)
    for words, other in _similar(u):
        expected, v = value_and_slope(case.fresh(), other), case.fresh()
        (value, slope), (value_of_other, slope_of_other) = called(v, u), called(v, other)
        if difference := difference_of(case, alone, (value, slope()), u):
            return f"{difference}; the second is with another call before its backward pass, of outcomes {words}"
        if difference := difference_of(case, expected, (value_of_other, slope_of_other()), other):
            return f"{difference}; the second is after a call with outcomes {words}"
    # The same tensor with other contents, as a buffer that is filled anew has the same address.
    expected, v, buffer = value_and_slope(case.fresh(), -0.7 * u), case.fresh(), u.clone()
    with torch.no_grad():
        v(buffer)
        buffer.copy_(-0.7 * u)
        result = v(buffer).clone()
    difference = difference_of(case, expected, (result, expected[1]), buffer)
    return difference and f"{difference}; the second is after a call with other outcomes in the same memory"


def _built_anew(case: ValueFunctionCase) -> str | None:
    """Two that are constructed alike, the second of which loads the state_dict of the first, as a resumed run does."""
    if (both := twins(case.target)) is None:
        return None
    u = varied_outcomes(64)
    try:
        first = value_and_slope(both[0], u)
    except Exception:  # such as of a class that is complete only after it was constructed
        return None
    difference = difference_of(case, first, value_and_slope(both[1], u), u)
    return difference and f"{difference}; the second is constructed anew and has loaded the state_dict of the first"


def _after_many_calls(case: ValueFunctionCase) -> str | None:
    """Calls one copy as often as a long run does, each time with other outcomes, and with a backward pass.

    A backward pass that is all torch's own changes nothing, so then only some calls have one.
    """
    most = max(2, case.affordable // MANY_CALLS)
    sizes = [min(n, most) for n in (_ROWS * _CALLS_AT_ONCE)[:_CALLS_AT_ONCE]]
    outcomes = varied_outcomes(MANY_CALLS // _CALLS_AT_ONCE * sum(sizes)).float()
    value, slope = in_pieces(case.fresh(), outcomes)
    v, every_call = case.fresh(), runs_code_backwards(case.fresh(), outcomes[:3])
    call_of = torch.arange(_CALLS_AT_ONCE).repeat_interleave(torch.tensor(sizes))
    every = zip(*(x.split(sum(sizes)) for x in (outcomes, value, slope)), strict=True)
    for at, (u, *expected) in enumerate(every):
        v.eval().train()  # as after each validation of a run
        chosen = torch.ones(_CALLS_AT_ONCE, dtype=torch.bool)

        def in_calls(u: Tensor) -> Tensor:
            batches: Any = torch.split_with_sizes_copy(u, sizes)  # type: ignore[func-returns-value]
            values = [v(batch) for batch in batches]
            if not every_call and alike_graphs(values):
                chosen[torch.arange(_CALLS_AT_ONCE) % _CALLS_OF_A_BACKWARD != at % _CALLS_OF_A_BACKWARD] = False  # noqa: B023
            return torch.cat([x if kept else x.detach() for x, kept in zip(values, chosen.tolist(), strict=True)])  # noqa: B023

        found, back = value_and_slope(in_calls, u)
        back = torch.where(chosen[call_of], back, expected[1])
        if difference := difference_of(case, (expected[0], expected[1]), (found, back), u):
            first = 1 + at * _CALLS_AT_ONCE
            return f"{difference} in calls {first:,} to {first + _CALLS_AT_ONCE - 1:,}; the first is on a first call"
    v(varied_outcomes(min(2**18, case.largest_batch)).float())
    many = varied_outcomes(64).float()
    difference = difference_of(case, value_and_slope(case.fresh(), many), value_and_slope(v, many), many)
    return difference and f"{difference}; the second is after {MANY_CALLS} calls and a large batch"
