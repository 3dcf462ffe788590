"""Records operations of torch on tensors without numbers: code cannot look at what it is not given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halos_pl.proof import lowering
from halos_pl.proof.algebra import NoRuleError
from halos_pl.proof.program import Program

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_RANDOM = ("rand", "bernoulli", "dropout", "normal", "uniform", "multinomial", "poisson", "exponential", "geometric")
_LOOKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item", "unique", "_unique2")
_CREATE = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}
_FILL = {"full_like": 1, "new_full": 2}  # and the place of what it is filled with
_EMPTY = {"empty_like", "new_empty", "new_empty_strided"}
_SAME = {"clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous"}
_MOVES = {
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice"),
    *("select", "as_strided", "unbind", "split", "split_with_sizes", "chunk", "cat", "stack", "flip", "roll", "repeat"),
    *("movedim", "narrow", "diagonal", "unfold", "repeat_interleave", "broadcast_to", "flatten", "tile"),
}
_NUMBERS = (torch.float32, torch.float64)
_WHOLE = (torch.int32, torch.int64)
# Rules of whole numbers: these may leave the range of their dtype, those cannot.
_WHOLE_GROWS = {"add", "sub", "rsub", "mul", "neg", "abs", "sum", "prod", "cumsum", "square", "floor_divide"}
_WHOLE_STAYS = {
    *("sign", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "amax", "amin", "max", "min", "where", "relu"),
    *("masked_fill", "index", "gather", "take", "index_select", "floor", "ceil", "trunc", "round", "remainder"),
    *("fmod", "sort"),
}
_INDEXED = {"index", "gather", "take", "index_select"}
_COUNTS = {"bucketize", "searchsorted"}
_LOGICAL = {"logical_and", "logical_or", "logical_not", "any", "all", "lt", "le", "gt", "ge", "eq", "ne"}
_BITWISE = {"bitwise_and", "bitwise_or", "bitwise_not"}


class UntraceableError(ValueError):
    """v cannot be recorded; the message says where and why."""


refusals: list[UntraceableError] = []  # also those that the code of v caught


def _line(frames: Iterator[tuple[str, int]]) -> str:
    """``file:line`` of the first frame outside torch and this package."""
    name, line = next((frame for frame in frames if not frame[0].startswith((*_SKIPPED, "<"))), ("", 0))
    return f"{Path(name).name}:{line}" if name else "an unknown line"


def _running() -> Iterator[tuple[str, int]]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]


def refused(why: str, at: TracebackType | None = None) -> UntraceableError:
    """The error that names the line that is running, or that raised an error with the traceback ``at``."""
    raised = []
    while at is not None:
        raised.append((at.tb_frame.f_code.co_filename, at.tb_lineno))
        at = at.tb_next
    error = UntraceableError(f"cannot be traced at {_line(iter(raised[::-1]) if raised else _running())}: {why}")
    refusals.append(error)
    return error


def _looked(name: str) -> Callable[..., NoReturn]:
    def looked(*_: Any, **__: Any) -> NoReturn:
        raise refused(f"the code depends on the value of a tensor, by {name}")

    return looked


class Recorded(Tensor):
    """A tensor that has a shape and a dtype but no numbers.

    Attributes:
        nodes: the node of each element, int64; views of the tensor are views of it. None if there is no rule for them.
    """

    nodes: Tensor | None

    @staticmethod
    def __new__(cls, nodes: Tensor, dtype: torch.dtype, requires_grad: bool = False, known: bool = True) -> Recorded:
        """A tensor of the shape and strides of ``nodes``."""
        self = Tensor._make_wrapper_subclass(
            cls,
            nodes.shape,
            strides=nodes.stride(),
            storage_offset=nodes.storage_offset(),
            dtype=dtype,
            requires_grad=requires_grad,
        )
        self.nodes = nodes if known else None
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise refused(f"{func} runs after the recording")


for _name in ("tolist", "numpy", "__array__", "data_ptr", "storage", "untyped_storage", "_typed_storage", "__dlpack__",
              "__reduce_ex__", "__deepcopy__", "__hash__", "apply_", "map_", "map2_", "__repr__",
              "__format__"):  # fmt: skip
    setattr(Recorded, _name, _looked(_name))


class Recorder(TorchDispatchMode):
    """Runs operations without inputs as usual, and records the others.

    Args:
        originals: learnable tensors whose place recorded ones have taken.
    """

    def __init__(self, originals: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = Program()
        self._originals = {x.untyped_storage().data_ptr() for x in originals}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: skipping it means importing it, which takes long."""
        return False

    def nodes_of(self, x: Tensor) -> Tensor:
        """Nodes of the elements of a tensor; constants for one that does not depend on inputs."""
        if isinstance(x, Recorded):
            if x.nodes is None:
                raise refused("which of several numbers is the largest or smallest is used")
            return x.nodes
        if x.is_complex():
            raise refused("complex numbers have no rules")
        flat = x.detach().reshape(-1)
        single = x.dtype == torch.float32  # its shortest decimals
        values = [float(str(value)) for value in flat.numpy()] if single else flat.tolist()
        if not all(abs(value) < float("inf") for value in values):
            raise refused("a constant is infinite or not a number")
        ids = [self.program.constant(int(v) if isinstance(v, bool) else v) for v in values]
        return torch.tensor(ids, dtype=torch.int64).view(x.shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = _tensors((args, kwargs))
        if any(word in name for word in _RANDOM):
            raise refused(f"{name} is random")
        for x in tensors:
            if not isinstance(x, Recorded) and self._originals and x.untyped_storage().data_ptr() in self._originals:
                raise refused("a learnable parameter is used that is no attribute of its module")
        if not any(isinstance(x, Recorded) for x in tensors):
            return func(*args, **kwargs)
        if func.namespace != "aten":
            raise refused(f"no rule for {func.namespace}::{name}")
        if torch.is_inference_mode_enabled() and func._can_decompose():  # autograd would have decomposed it
            with self:
                return func.decompose(*args, **kwargs)
        if name in _LOOKS:
            raise refused("the code depends on the value of a tensor")
        changes = func._schema.is_mutable
        if changes and not (name.endswith("_") and not name.endswith("__") and isinstance(args[0], Recorded)):
            raise refused(
                f"{name} writes what depends on u into a tensor that does not; zeros_like(u) makes one that does"
            )
        with torch.utils._python_dispatch._disable_current_modes():
            try:
                fill = 0 if name in _INDEXED else 1  # a place that exists, and no division of whole numbers by 0
                like = partial(_like, fill=fill)
                out = func(*_mapped(like, args), **_mapped(like, kwargs))
            except Exception as error:
                raise refused(f"{name}: {' '.join(str(error).split())[:120]}") from error
            if changes:
                return self._changed(name[:-1], args, kwargs)
            return self._recorded(func, name, args, kwargs, out)

    def _changed(self, name: str, args: Any, kwargs: Any) -> Any:
        """The first argument, whose elements are replaced, also in its views."""
        target = args[0]
        if name == "copy":
            result = self._converted(self.nodes_of(args[1]), args[1].dtype, target.dtype)
        elif name in ("fill", "zero"):
            value = self._lifted(args[1]) if name == "fill" else 0
            value = value if isinstance(value, Tensor) else torch.tensor(self.program.constant(value))
            result = self._converted(value, torch.float64, target.dtype)
        elif name in _MOVES | _SAME:
            raise refused(f"no rule for {name}_")
        else:
            result = self._lowered(name, args, kwargs, target.dtype)
        self.nodes_of(target).copy_(result)
        return target

    def _recorded(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        outs = list(out) if isinstance(out, list | tuple) else [out]
        if name in _CREATE or name in _FILL or name in _EMPTY:
            value = self._lifted(args[_FILL[name]]) if name in _FILL else _CREATE.get(name, 0)
            if name in _EMPTY:
                value = torch.tensor(self.program.node("unwritten"))
            value = value if isinstance(value, Tensor) else torch.tensor(self.program.constant(value))
            results = [self._converted(value, torch.float64, out.dtype).expand(out.shape).clone()]
        elif name in _SAME:
            nodes = self.nodes_of(args[0])
            results = [nodes.clone() if "clone" in name or "copy" in name else nodes]
        elif name == "_to_copy":
            results = [self._converted(self.nodes_of(args[0]), args[0].dtype, out.dtype).clone()]
        elif name in _MOVES:
            moved = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            joined = isinstance(args[0], list | tuple)
            others = _tensors((args[1:], kwargs))
            if others or (not joined and any(x.dtype != args[0].dtype for x in outs)):
                raise refused(f"no rule for {func}")
            for x in moved:
                self._require_dtype(x.dtype)
            moved_nodes = [self.nodes_of(x) for x in moved]
            found = func(moved_nodes if joined else moved_nodes[0], *args[1:], **kwargs)
            results = list(found) if isinstance(found, list | tuple) else [found]
        else:
            found = self._lowered(name, args, kwargs, outs[0].dtype)
            results = list(found) if isinstance(found, list | tuple) else [found.expand(out.shape)]
        wrapped = [
            Recorded(results[i] if i < len(results) else torch.zeros(x.shape, dtype=torch.int64), x.dtype,
                     known=i < len(results))
            for i, x in enumerate(outs)
        ]  # fmt: skip
        return type(out)(wrapped) if type(out) in (list, tuple) else tuple(wrapped) if len(outs) > 1 else wrapped[0]

    def _lowered(self, name: str, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
        """The nodes of an operation's result, which is of a dtype."""
        before = {x.dtype for x in _tensors((args, kwargs))}
        for each in (*before, dtype):
            self._require_dtype(each)
        if name in _BITWISE and {*before, dtype} != {torch.bool}:
            raise refused(f"no rule for {name} of whole numbers")
        if dtype in _WHOLE and name not in _COUNTS:
            of = args[0].dtype if name in _INDEXED else None
            floats = {of} if of is not None else before
            if name not in _WHOLE_GROWS | _WHOLE_STAYS or not floats.isdisjoint(_NUMBERS):
                raise refused(f"no rule for {name} with a result of dtype {dtype}")
        if any(x.dtype == torch.bool for x in self._indices(name, args)):
            raise refused("the code depends on the value of a tensor")
        try:
            result = lowering.lower(
                self.program, name, self._lifted(list(args)), {k: self._lifted(x) for k, x in kwargs.items()}
            )
            if dtype in _WHOLE and name in _WHOLE_GROWS:
                result = lowering.within(self.program, result)
            if dtype == torch.bool and name not in _LOGICAL | _BITWISE:
                result = lowering.truth(self.program, result)
        except NoRuleError as error:
            raise refused(str(error)) from error
        except TypeError as error:
            raise refused(f"no rule for {name} with these arguments") from error
        return result

    @staticmethod
    def _indices(name: str, args: Any) -> list[Tensor]:
        return _tensors(args[1:]) if name == "index" else []

    def _require_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in (*_NUMBERS, *_WHOLE, torch.bool):
            raise refused(
                f"{dtype} is another dtype than float32, float64, int32, int64 and bool".replace("torch.", "")
            )

    def _converted(self, nodes: Tensor, before: torch.dtype, after: torch.dtype) -> Tensor:
        """Numbers of one dtype in another."""
        self._require_dtype(before)
        self._require_dtype(after)
        if after == torch.bool and before != torch.bool:
            return lowering.truth(self.program, nodes)
        if after in _WHOLE and before in _NUMBERS:
            return lowering.within(self.program, lowering.whole(self.program, nodes))
        return nodes

    def _lifted(self, args: Any) -> Any:
        if isinstance(args, Tensor):
            return self.nodes_of(args)
        return type(args)(map(self._lifted, args)) if isinstance(args, list | tuple) else args


def _tensors(args: Any) -> list[Tensor]:
    """The tensors among the arguments of an operation, which are nested in lists, tuples and dictionaries at most."""
    if isinstance(args, Tensor):
        return [args]
    items = args.values() if isinstance(args, dict) else args if isinstance(args, list | tuple) else ()
    return [x for item in items for x in _tensors(item)]


def _mapped(function: Callable[[Tensor], Tensor], args: Any) -> Any:
    """The arguments of an operation with other tensors."""
    if isinstance(args, Tensor):
        return function(args)
    if isinstance(args, dict):
        return {name: _mapped(function, item) for name, item in args.items()}
    return type(args)(_mapped(function, item) for item in args) if isinstance(args, list | tuple) else args


def _like(x: Tensor, fill: int) -> Tensor:
    """A tensor of the same kind, for the shape and dtype of a result; meta tensors would import torch's compiler."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(fill)
