"""Each operation of torch as an expression of real numbers, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from halos_pl.proof.algebra import HALF, Algebra, NoRuleError
from halos_pl.proof.program import Program


def whole(program: Program, ids: Tensor) -> Tensor:
    """Numbers without their fraction, as a conversion to an integer dtype gives them."""
    return _each(Algebra(program).trunc, ids)


def truth(program: Program, ids: Tensor) -> Tensor:
    """1 where a number is not 0, else 0."""
    return _each(Algebra(program).truth, ids)


def within(program: Program, ids: Tensor) -> Tensor:
    """Whole numbers, which must be in the range of their dtype."""
    return _each(lambda x: x if program.is_small(x) else program.node("within", x), ids)


def _each(rule: Callable[..., int], *ids: Any) -> Tensor:
    """``rule`` for each element of the operands, which are broadcast."""
    same = torch.broadcast_tensors(*ids)
    columns = [x.reshape(-1).tolist() for x in same]
    return torch.tensor([rule(*row) for row in zip(*columns, strict=True)], dtype=torch.int64).view(same[0].shape)


def _elementwise(a: Algebra) -> dict[str, Callable[..., int]]:
    """Rules that take the nodes of their tensor operands; numbers become constants."""
    p = a.p
    one, minus, hundredth = a.c(1), a.c(-1), a.c(Fraction("0.01"))
    return {
        "add": lambda x, y, alpha=one: p.add(x, p.mul(alpha, y)),
        "sub": lambda x, y, alpha=one: p.sub(x, p.mul(alpha, y)),
        "rsub": lambda x, y, alpha=one: p.sub(y, p.mul(alpha, x)),
        "mul": p.mul,
        "div": p.div,
        "true_divide": p.div,
        "neg": p.negative,
        "reciprocal": lambda x: p.div(one, x),
        "square": a.square,
        "pow": p.pow,
        "sqrt": a.root,
        "rsqrt": lambda x: p.div(one, a.root(x)),
        "exp": a.exp,
        "exp2": lambda x: p.pow(a.c(2), x),
        "expm1": a.expm1,
        "special_expm1": a.expm1,
        "log": lambda x: a.f("log", x),
        "log2": lambda x: p.div(a.f("log", x), a.f("log", a.c(2))),
        "log10": lambda x: p.div(a.f("log", x), a.f("log", a.c(10))),
        "log1p": a.log1p,
        "sigmoid": lambda x: a.f("sigmoid", x),
        "log_sigmoid_forward": a.log_sigmoid,
        "tanh": a.tanh,
        "atan": lambda x: a.f("atan", x),
        "asin": a.asin,
        "acos": lambda x: p.sub(a.times(HALF, a.c(math.pi)), a.asin(x)),
        "erf": lambda x: a.f("erf", x),
        "erfc": lambda x: p.sub(one, a.f("erf", x)),
        "special_erfcx": a.erfcx,
        "special_ndtr": a.ndtr,
        "special_log_ndtr": lambda x: a.f("log_ndtr", x),
        "atan2": a.atan2,
        "floor": a.floor,
        "ceil": lambda x: p.negative(a.floor(p.negative(x))),
        "trunc": a.trunc,
        "round": a.round,
        "frac": lambda x: p.sub(x, a.trunc(x)),
        "remainder": a.remainder,
        "fmod": a.fmod,
        "copysign": a.copysign,
        "floor_divide": lambda x, y: a.floor(p.div(x, y)),
        "sin": lambda x: a.f("sin", x),
        "cos": lambda x: a.f("cos", x),
        "asinh": a.asinh,
        "atanh": a.atanh,
        "sinh": lambda x: a.cosh(x, -1),
        "cosh": a.cosh,
        "logit": lambda x: a.f("log", p.div(x, p.sub(one, x))),
        "abs": a.abs,
        "sign": a.sign,
        "sgn": a.sign,
        "relu": lambda x: a.clamp(x, a.c(0)),
        "relu6": a.relu6,
        "leaky_relu": lambda x, slope=hundredth: p.choose("less", x, p.mul(slope, x), x),
        "elu": lambda x, alpha=one, scale=one, input_scale=one: a.elu(x, alpha, scale, input_scale),
        "celu": lambda x, alpha=one: a.elu(x, alpha, one, p.div(one, alpha)),
        "silu": lambda x: p.mul(x, a.f("sigmoid", x)),
        "mish": lambda x: p.mul(x, a.tanh(a.f("softplus", x))),
        "hardsigmoid": lambda x: p.div(a.relu6(p.add(x, a.c(3))), a.c(6)),
        "hardswish": lambda x: p.mul(x, p.div(a.relu6(p.add(x, a.c(3))), a.c(6))),
        "hardtanh": lambda x, low=minus, high=one: a.clamp(x, low, high),
        "threshold": lambda x, threshold, value: p.choose("at_most", p.sub(x, threshold), value, x),
        "minimum": a.least,
        "fmin": a.least,
        "maximum": a.greatest,
        "fmax": a.greatest,
        "where": a.where,
        "masked_fill": lambda x, mask, value: a.where(mask, value, x),
        "logaddexp": a.logaddexp,
        "addcmul": lambda x, y, z, value=one: p.add(x, p.mul(value, p.mul(y, z))),
        "addcdiv": lambda x, y, z, value=one: p.add(x, p.mul(value, p.div(y, z))),
        "lerp": lambda x, y, weight: p.add(x, p.mul(weight, p.sub(y, x))),
        "hypot": lambda x, y: a.root(p.add(a.square(x), a.square(y))),
        "xlogy": lambda x, y: p.mul(x, a.f("log", y)),
        "special_xlog1py": lambda x, y: p.mul(x, a.log1p(y)),
        "heaviside": lambda x, y: p.choose("less", x, a.c(0), p.choose("equal", x, y, one)),
        "logical_and": lambda x, y: p.mul(a.truth(x), a.truth(y)),
        "bitwise_and": lambda x, y: p.mul(a.truth(x), a.truth(y)),
        "logical_or": lambda x, y: a.greatest(a.truth(x), a.truth(y)),
        "bitwise_or": lambda x, y: a.greatest(a.truth(x), a.truth(y)),
        "logical_not": lambda x: p.sub(one, a.truth(x)),
        "bitwise_not": lambda x: p.sub(one, a.truth(x)),
    }


def _reduced(rule: Callable[[list[int]], int], ids: Tensor, dims: Any, keep: bool) -> Tensor:
    """``rule`` for the elements along some dimensions."""
    dims = list(range(ids.dim())) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % ids.dim() for d in dims] if ids.dim() else []
    kept = [d for d in range(ids.dim()) if d not in dims]
    moved = ids.permute(*kept, *dims).reshape([ids.shape[d] for d in kept] + [-1])
    rows = moved.reshape(-1, moved.shape[-1]).tolist()
    shape = [1 if d in dims else ids.shape[d] for d in range(ids.dim())] if keep else [ids.shape[d] for d in kept]
    return torch.tensor([rule(row) for row in rows], dtype=torch.int64).view(shape)


def _reduction(a: Algebra, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    ids, dims = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
    keep = bool(kwargs.get("keepdim", args[2] if len(args) > 2 else False))
    if name == "cumsum" and isinstance(dims, int):
        return torch.stack(
            [_reduced(a.total, ids.narrow(dims, 0, i + 1), dims, False) for i in range(ids.shape[dims])], dims
        )
    rules: dict[str, Callable[[list[int]], int]] = {
        "sum": a.total,
        "mean": a.mean,
        "prod": a.product,
        "amax": lambda xs: a.extreme(xs, a.greatest),
        "amin": lambda xs: a.extreme(xs, a.least),
        "max": lambda xs: a.extreme(xs, a.greatest),
        "min": lambda xs: a.extreme(xs, a.least),
        "any": lambda xs: a.extreme([a.truth(x) for x in xs], a.greatest),
        "all": lambda xs: a.product([a.truth(x) for x in xs]),
        "logsumexp": lambda xs: a.logaddexp(*xs) if len(xs) == 2 else a.f("log", a.total([a.exp(x) for x in xs])),
    }
    result = _reduced(rules[name], ids, dims, keep)
    return (result,) if name in ("max", "min") and dims is not None else result


def _rows(rule: Callable[[list[int]], list[int]], ids: Tensor, dim: int) -> Tensor:
    """Each row of elements along a dimension replaced by what ``rule`` makes of it."""
    moved = (ids if ids.dim() else ids[None]).movedim(dim, -1)
    rows = [rule(row) for row in moved.reshape(-1, moved.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.int64).view(moved.shape).movedim(-1, dim).reshape(ids.shape).contiguous()


def _sorted(a: Algebra, ids: Tensor, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    """The values alone: which of them is where depends on numbers."""
    values = _rows(a.ascending, ids, dim)
    return (torch.flip(values, [dim]) if descending and ids.dim() else values,)


def _loss(a: Algebra, name: str, x: Tensor, target: Tensor, reduction: int = 1, width: float = 1.0) -> Tensor:
    """A loss of two tensors; ``reduction`` 0 is none, 1 the mean and 2 the sum, ``width`` is delta or beta."""
    w = a.c(width)
    rules: dict[str, Callable[[int], int]] = {
        "mse_loss": a.square,
        "huber_loss": lambda d: a.huber(d, w),
        "smooth_l1_loss": lambda d: a.smooth_l1(d, w),
    }
    each = _each(lambda x, y: rules[name](a.p.sub(x, y)), x, target)
    return each if reduction == 0 else _reduced({1: a.mean, 2: a.total}[reduction], each, None, False)


def _bucket(a: Algebra, name: str, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
    """The number of boundaries below (``right``: or at) each element."""
    if name == "searchsorted":
        knots, ids = args[0], args[1]
        right = kwargs.get("side") == "right" or kwargs.get("right", args[3] if len(args) > 3 else False)
    else:
        ids, knots = args[0], args[1]
        right = kwargs.get("right", args[3] if len(args) > 3 else False)
    if kwargs.get("sorter") is not None:
        raise NoRuleError(f"no rule for {name} with a sorter")
    if knots.dim() != 1:
        raise NoRuleError(f"{name} with one row of boundaries for each outcome")
    return _each(lambda x: a.count(x, knots.tolist(), bool(right)), ids)


def _indexed(a: Algebra, name: str, args: list[Any]) -> Tensor:
    """Entries of a table at indices that may depend on u."""
    if name == "index":
        table, indices = args[0], args[1]
        if len(indices) != 1 or table.dim() != 1:
            raise NoRuleError("index of more than one dimension")
        index = indices[0]
    elif name == "take":
        table, index = args[0].reshape(-1), args[1]
    elif name == "gather":
        table, dim, index = args[0], args[1], args[2]
        if dim % table.dim() != table.dim() - 1:
            raise NoRuleError("gather along another dimension than the last")
        if table.dim() > 1:
            rows = [
                _each(lambda i, row=row: a.p.node("lookup", i, *row), ids)
                for row, ids in zip(
                    table.reshape(-1, table.shape[-1]).tolist(), index.reshape(-1, index.shape[-1]), strict=True
                )
            ]
            return torch.stack(rows).view(index.shape)
    else:
        table, index = args[0], args[2]
    entries = table.tolist()
    if table.dim() != 1:
        raise NoRuleError(f"{name} of a table with more than one dimension")

    def entry(i: int) -> int:
        at = a.p.value(i)
        return a.p.node("lookup", i, *entries) if at is None else int(entries[int(at)])

    return _each(entry, index)


def _matrix(a: Algebra, name: str, args: list[Any]) -> Tensor:
    added = args.pop(0) if name == "addmm" else None
    x, y = args[0], args[1]
    left = x[None] if x.dim() == 1 else x
    right = y[:, None] if y.dim() == 1 else y
    rows = [[a.total([a.p.mul(i, j) for i, j in zip(row, column, strict=True)]) for column in right.t().tolist()]
            for row in left.tolist()]  # fmt: skip
    out = torch.tensor(rows, dtype=torch.int64)
    out = out[:, 0] if y.dim() == 1 else out
    out = out[0] if x.dim() == 1 else out
    return out if added is None else _each(a.p.add, added, out)


def lower(program: Program, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The nodes of an operation's result.

    Args:
        program: receives the nodes.
        name: the operation's name in ``torch.ops.aten``.
        args, kwargs: its arguments, with int64 tensors of nodes in the place of tensors.

    Raises:
        NoRuleError: the operation has no rule.
    """
    a = Algebra(program)

    def node(x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else torch.tensor(program.constant(x), dtype=torch.int64)

    kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "layout", "device", "pin_memory")}
    if name in ("sum", "mean", "prod", "amax", "amin", "any", "all", "logsumexp", "cumsum", "max", "min"):
        return _reduction(a, name, args, kwargs)
    if name in ("_softmax", "_log_softmax"):
        return _rows(a.softmax if name == "_softmax" else a.log_softmax, args[0], args[1])
    if name == "sort":
        return _sorted(a, *args, **kwargs)
    if name in ("mse_loss", "huber_loss", "smooth_l1_loss"):
        return _loss(a, name, *args, **kwargs)
    if name in ("bucketize", "searchsorted"):
        return _bucket(a, name, args, kwargs)
    if name in ("index", "gather", "index_select", "take", "embedding"):
        return _indexed(a, name, [args[0], 0, args[1]] if name == "embedding" else args)
    if name in ("mm", "mv", "dot", "addmm") and not kwargs:
        return _matrix(a, name, args)
    if name in ("clamp", "clamp_min", "clamp_max"):
        keys = {"clamp": ["low", "high"], "clamp_min": ["low"], "clamp_max": ["high"]}[name]
        bounds = dict(zip(keys, args[1:], strict=False)) | {
            {"min": "low", "max": "high"}[key]: value for key, value in kwargs.items()
        }
        kept = {k: b for k, b in bounds.items() if b is not None and not (isinstance(b, float) and math.isinf(b))}
        return _each(lambda x, *bs: a.clamp(x, **dict(zip(kept, bs, strict=True))), args[0], *map(node, kept.values()))
    if name == "softplus":
        beta, threshold = list(args[1:]) + [1, 20][len(args) - 1 :]
        return _each(lambda x, b: a.softplus(x, b, float(threshold)), args[0], node(beta))
    if name == "gelu":
        return _each(lambda x: a.gelu(x, kwargs.get("approximate", "none")), args[0])
    if name in ("lt", "le", "gt", "ge", "eq", "ne"):
        return _each(lambda x, y: a.compare(name, x, y), node(args[0]), node(args[1]))
    rule = _elementwise(a).get(name)
    rounding = kwargs.pop("rounding_mode", None)
    if rule is None or kwargs.pop("decimals", 0):
        raise NoRuleError(f"no rule for {name}")
    if rounding is not None:
        quotient = _each(a.p.div, node(args[0]), node(args[1]))
        return _each({"floor": a.floor, "trunc": a.trunc}[rounding], quotient)
    keys = list(kwargs)
    tensors = [node(x) for x in args] + [node(kwargs[key]) for key in keys]
    count = len(args)
    result = _each(lambda *xs: rule(*xs[:count], **dict(zip(keys, xs[count:], strict=True))), *tensors)
    return (result,) if name == "log_sigmoid_forward" else result
