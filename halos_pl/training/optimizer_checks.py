"""Refuses optimizers that could not train the model, or whose state a checkpoint could not contain."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from halos_pl.policy.sharding import as_shard, meeting
from halos_pl.training.checkpoint_tree import split
from halos_pl.training.optim import make_optimizer, shown

_ALTERNATIVES = "choose AdamW, or trainer.strategy ddp"


def check_optimizer(
    make: Callable[[list[nn.Parameter]], Optimizer],
    device: torch.device,
    *,
    vectors: bool,
    sharded: bool = False,
    folders: bool = False,
    closure: bool = True,
) -> None:
    """Refuses, before data and model are loaded, an optimizer that could not train the model or be saved.

    The optimizer is made for a matrix and a vector of zeros, and takes a step along a gradient of 0.

    Args:
        make: makes the optimizer from the trained parameters.
        device: device of the parameters.
        vectors: whether vectors are trained too, such as the weights of norms; under LoRA there are only matrices.
        sharded: whether the parameters are sharded over the ranks.
        folders: whether checkpoints are folders, as those of fsdp2.
        closure: whether its step has to call a closure, as in each precision without a loss scale.

    Raises:
        ValueError: naming the setting and the way out.
    """
    with meeting() if sharded else nullcontext():
        # Optimizers with 8-bit states keep those of small parameters in 32 bits.
        zeros = [torch.zeros(shape, device=device) for shape in ((64, 64), (2,))]
        parameters = [nn.Parameter(as_shard(values) if sharded else values) for values in zeros]
        matrices = parameters[:1]
        optimizer = make_optimizer(make, matrices)
        if vectors:
            try:
                optimizer = make(parameters)
            except ValueError as error:  # as with Muon
                raise ValueError(
                    f"model.optimizer: {error}. A whole model has vectors too, such as the weights of its norms; with"
                    " model.policy.lora only matrices are trained"
                ) from error
        _check_groups(optimizer)
        if closure:
            _check_closure(optimizer)
        called = _try_step(optimizer, parameters, sharded)
        if closure and called is False:
            raise _without_closure(optimizer, "does not call its closure")
        if folders:
            _check_saved(optimizer)


def _check_groups(optimizer: Any) -> None:
    """Refuses settings that are not finite, and a missing learning rate."""
    for group in optimizer.param_groups:
        for name, value in group.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if name != "params" and any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
                raise ValueError(f"model.optimizer.init_args.{name} is {shown(value)}; it must be finite")
        if not isinstance(lr := group.get("lr"), float | int | Tensor):
            raise ValueError(
                f"model.optimizer: {type(optimizer).__name__} has no learning rate (lr is {shown(lr)}), but"
                " model.lr_schedule needs one; set model.optimizer.init_args.lr to a number"
            )


def _check_closure(optimizer: Any) -> None:
    """Refuses an optimizer whose step takes no closure."""
    try:
        inspect.signature(optimizer.step).bind(closure=None)
    except TypeError as error:
        raise _without_closure(optimizer, "takes no argument closure") from error
    except ValueError:  # a function without a signature
        pass


def _without_closure(optimizer: Any, why: str) -> ValueError:
    return ValueError(
        f"model.optimizer: {type(optimizer).__name__}.step {why}, which computes the loss and the gradients of a step;"
        " define step(self, closure=None), and call closure() before the weights are changed"
    )


def _try_step(optimizer: Any, parameters: list[nn.Parameter], sharded: bool) -> bool | None:
    """Refuses an optimizer that cannot take a step along a gradient of 0.

    Returns:
        Whether it has called its closure; None if its step has failed.
    """
    device = parameters[0].device
    calls: list[Tensor] = []

    def closure() -> Tensor:
        calls.append(torch.zeros((), device=device))
        return calls[-1]

    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with rng, torch.compiler.set_stance("force_eager"):  # torchao would compile it for a minute
            optimizer.step(closure)
        return bool(calls)
    except RuntimeError as error:  # as with SparseAdam, whose gradients are sparse
        why = str(error).partition("\n")[0]
        if sharded:
            fused = any(group.get("fused") for group in optimizer.param_groups)
            cure = "set model.optimizer.init_args.fused to false" if fused else _ALTERNATIVES
            raise ValueError(
                f"model.optimizer: {type(optimizer).__name__} cannot step on weights that fsdp2 shards"
                f" ({re.split(r'[,;.] |[.]$', why)[0]}); {cure}"
            ) from error
        if not isinstance(error, NotImplementedError):
            raise ValueError(f"model.optimizer: {type(optimizer).__name__} cannot take a step: {why}") from error
    except Exception:  # other errors may be due to the zeros
        pass
    return None


def _check_saved(optimizer: Any) -> None:
    """Refuses an optimizer whose state a folder cannot contain, such as one of 8 bits, which torchao packs per rank."""
    try:
        split({"optimizer_states": [optimizer.state_dict()]})
    except ValueError as error:
        raise ValueError(
            f"model.optimizer: {type(optimizer).__name__} keeps a state that the checkpoint of a sharded run cannot"
            f" contain ({str(error).partition(', ')[0]}); {_ALTERNATIVES}"
        ) from error
