"""States in which a part must be the same function, and parameters that an optimizer may reach.

A part is called in many states during training: in validation, without gradient, hours later, after a checkpoint was
loaded. Its result must be the same in each. A clause of any kind of part uses them so::

    expected = call(case.fresh())                        # in training, on the CPU, with gradient
    for state in STATES:                                 # modes, default dtypes, autocast, clocks
        part = case.fresh()
        with state.entered(part):
            result = call(part)                          # compare; state.gradient says whether it can have a gradient
        call(part)                                       # compare again: the state must leave nothing behind
    for words, part in copies(case.target):              # a deep copy, and one with the weights of a state_dict
        call(part)                                       # compare
    for words, part in pushed(case.target):              # each learnable parameter far up and far down
        call(part)                                       # nothing to compare with: the clause must hold as before
``state.rounds`` marks the state (autocast) in which a matrix product may be rounded to bfloat16.
"""

from __future__ import annotations

import datetime
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import date as true_date
from datetime import datetime as true_datetime
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from halos_pl.conformance.duplicate import duplicate

T = TypeVar("T", bound=nn.Module)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class State:
    """A state in which a part may be called.

    Attributes:
        name: the state, in words that complete "the value is ...".
        entered: context of the state for a part; leaving it restores what was before.
        gradient: whether results have a gradient in it.
        rounds: whether matrix products may be rounded to bfloat16 in it.
        constants: relative rounding error of constants, which have the default dtype: ``torch.where(rows, 1.0, 0.7)``.
    """

    name: str
    entered: Callable[[nn.Module], AbstractContextManager[Any]]
    gradient: bool = True
    rounds: bool = False
    constants: float = 0.0


@contextmanager
def _in_evaluation(part: nn.Module) -> Iterator[None]:
    part.eval()
    try:
        yield
    finally:
        part.train()


@contextmanager
def _in_validation(part: nn.Module) -> Iterator[None]:
    """As Lightning validates: in evaluation mode and inference mode."""
    with _in_evaluation(part), torch.inference_mode():
        yield


@contextmanager
def _in_autocast(dtype: torch.dtype, part: nn.Module) -> Iterator[None]:
    """As in mixed precision on a CPU or GPU: code may ask about either, also where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with torch.autocast("cpu", dtype):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@contextmanager
def _with_deterministic_algorithms(part: nn.Module) -> Iterator[None]:
    """As with ``trainer.deterministic: true``, without the compiler that ``use_deterministic_algorithms`` loads."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@contextmanager
def _default_dtype(dtype: torch.dtype, part: nn.Module) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _moved_clocks(seconds: float) -> dict[int, Any]:
    """What replaces each function and class that tells the time, by its id."""
    shift = datetime.timedelta(seconds=seconds)

    class Date(true_date):
        @classmethod
        def today(cls) -> Any:
            return (true_datetime.now() + shift).date()

    class Datetime(true_datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return true_datetime.now(tz) + shift

        @classmethod
        def utcnow(cls) -> Any:
            return true_datetime.now(datetime.UTC).replace(tzinfo=None) + shift

        @classmethod
        def today(cls) -> Any:
            return true_datetime.now() + shift

    now = time.time
    moved: dict[int, Any] = {id(true_date): Date, id(true_datetime): Datetime}
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        for original, unit in ((getattr(time, name), 1), (getattr(time, f"{name}_ns"), 10**9)):
            moved[id(original)] = lambda original=original, unit=unit: original() + type(unit)(seconds * unit)
    for name in ("localtime", "gmtime", "ctime"):
        original = getattr(time, name)
        moved[id(original)] = lambda at=None, original=original: original(now() + seconds if at is None else at)
    local = time.localtime
    for name in ("strftime", "asctime"):  # the time comes last, after a format
        original, given = getattr(time, name), int(name == "strftime")
        moved[id(original)] = lambda *args, original=original, given=given: original(
            *args, *([local(now() + seconds)] if len(args) == given else [])
        )
    for name, unit in (("clock_gettime", 1), ("clock_gettime_ns", 10**9)):
        if original := getattr(time, name, None):  # Unix has it
            moved[id(original)] = lambda clock, original=original, unit=unit: (
                original(clock) + type(unit)(seconds * unit)
            )
    return moved


@contextmanager
def _later(part: nn.Module, seconds: float) -> Iterator[None]:
    """Moves the clocks of ``time`` and ``datetime``, also where ``part`` or its Python modules have names for them."""
    classes = {cls for module in part.modules() for cls in type(module).__mro__}
    names = {"time", "datetime", *(cls.__module__ for cls in classes if not cls.__module__.startswith("torch"))}
    moved, before = _moved_clocks(seconds), []
    for space in [*(vars(sys.modules[name]) for name in names & sys.modules.keys()), *map(vars, part.modules())]:
        before += [(space, key, value) for key, value in space.items() if id(value) in moved]
    try:
        for space, key, value in before:
            space[key] = moved[id(value)]
        yield
    finally:
        for space, key, value in before:
            space[key] = value


# Seconds by unit; odd multiples too, for what changes to and fro.
_LATER = {
    "s": (1, (0.5, 1, 61, 301)),
    "min": (60, (7, 30)),
    "h": (3600, (1, 3, 6, 12, 18)),
    "d": (86_400, (1, 2, 3, 4, 5, 6, 30, 91, 365, 3650)),
}
CLOCKS = tuple(
    State(f"{n:g} {unit} later", partial(_later, seconds=n * seconds + 1e-3))
    for unit, (seconds, numbers) in _LATER.items()
    for n in numbers
)
STATES = (
    State("in evaluation", _in_evaluation),
    State("without gradient", lambda part: torch.no_grad(), gradient=False),
    State("in inference mode", lambda part: torch.inference_mode(), gradient=False),
    State("in validation (evaluation and inference mode)", _in_validation, gradient=False),
    State("in autocast to bfloat16", partial(_in_autocast, torch.bfloat16), rounds=True),
    State("in autocast to float16", partial(_in_autocast, torch.float16), rounds=True),
    State("with deterministic algorithms", _with_deterministic_algorithms),
    *(
        State(f"with {name} as the default dtype", partial(_default_dtype, getattr(torch, name)), constants=error)
        for name, error in (("bfloat16", torch.finfo(torch.bfloat16).eps), ("float64", torch.finfo(torch.float32).eps))
    ),
    *CLOCKS,
)


def copies(part: T, new: T | None = None) -> Iterator[tuple[str, T]]:
    """A deep copy, and one whose parameters and buffers have moved and that has loaded the state_dict of the part.

    Parts that hold what cannot be copied, such as a lock, have no deep copy.

    Args:
        part: the part; it stays as it is.
        new: what a copy of loads the state_dict, such as the part before its first call; default: the part.

    Yields:
        words that complete "the value is ...", and the part in training mode.
    """
    try:
        deep = deepcopy(part).train()
    except (TypeError, RuntimeError):
        deep = None
    if deep is not None:
        yield "of a deep copy", deep
    reloaded, saved = duplicate(part if new is None else new), duplicate(part).state_dict()
    with torch.no_grad():
        for tensor in reloaded.state_dict().values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.add_(1)
    reloaded.load_state_dict(saved)
    yield "of a copy that has loaded its state_dict", reloaded


def twins(part: T) -> tuple[T, T] | None:
    """Two parts that are constructed alike, the second of which has loaded the state_dict of the first.

    Arguments without a default are the part's attributes of the same name.

    Returns:
        Both in training mode; None if the part's class cannot be constructed so.
    """
    cls = type(part)
    try:
        needed = [
            p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.kind in _NAMED
        ]
        arguments = {name: getattr(part, name) for name in needed}
        first, second = cls(**arguments).train(), cls(**arguments).train()
        second.load_state_dict(first.state_dict())
    except (Exception, SystemExit):
        return None
    return first, second


def _at(name: str, parameter: Tensor) -> str:
    return f"{name} = {float(parameter.detach()):.4g}" if parameter.numel() == 1 else f"{name} moved"


def pushed(part: T, *, draws: int = 2, most: int = 40) -> Iterator[tuple[str, T]]:
    """Copies whose learnable parameters an optimizer has moved: each one far both ways, and all of them at random.

    A parameter p of any shape moves by 1 + 2|p| and by 8 + 8|p|, up and down, as a whole; then, if it has several
    elements or the part several parameters, every element by a random share of the larger distance.

    Args:
        part: the part; it stays as it is.
        draws: number of random moves.
        most: maximum number of moves of single parameters; of a larger number, evenly spaced ones.

    Yields:
        words that complete "with ...", and the copy in training mode. Nothing for a part without learnable parameters.
    """
    names = [name for name, parameter in part.named_parameters() if parameter.requires_grad and parameter.numel()]
    moves = [(name, sign, *far) for name in names for sign in (-1, 1) for far in ((1, 2), (8, 8))]
    for name, sign, least, share in moves[:: -(-len(moves) // most) or 1]:
        copy = duplicate(part)
        parameter = dict(copy.named_parameters())[name]
        with torch.no_grad():
            parameter.add_(sign * (least + share * parameter.abs()))
        yield f"{_at(name, parameter)}, which an optimizer may reach", copy
    if sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad) < 2:
        return
    draw = torch.Generator().manual_seed(0)
    for _ in range(draws):
        copy = duplicate(part)
        with torch.no_grad():
            for free in (p for p in copy.parameters() if p.requires_grad):
                free.add_((2 * torch.rand(free.shape, generator=draw) - 1).to(free) * 8 * (1 + free.abs()))
        yield "all learnable parameters moved, as an optimizer may move them", copy
