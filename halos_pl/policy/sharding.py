"""Models whose weights are sharded over the ranks by torch's ``fully_shard`` (FSDP2).

A pass gathers the weights of one block at a time; the embedding, the last norm and the head are gathered for the whole
pass. Every block of a pass is a collective operation, so **all ranks must make the same passes in the same order**.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from transformers.distributed.configuration_utils import DistributedConfig

from halos_pl.policy.architecture import base_model, block_names

T = TypeVar("T")


@dataclass(frozen=True)
class Sharding:
    """How models are spread over the ranks.

    Attributes:
        shards: number of ranks that share the weights of a model.
        replicas: number of such groups; gradients are averaged over all of them.
        device: type of the ranks' devices.
        half: whether weights are gathered in bfloat16 and their gradients reduced in float32.
        stored_half: whether they are also stored in bfloat16.
        reshard: whether the weights of a block are freed after its forward pass, and gathered again for its backward
            pass. If not, a pass holds all of them.
        whole_reference: whether each rank holds the whole reference model, so that it need not be gathered.
    """

    shards: int
    replicas: int = 1
    device: str = "cpu"
    half: bool = False
    stored_half: bool = False
    reshard: bool = True
    whole_reference: bool = False

    @property
    def by_loader(self) -> bool:
        """Whether transformers can shard a model while loading it: only over several devices of the best kind."""
        return self.shards * self.replicas > 1 and torch._C._get_accelerator().type == self.device

    @property
    def policy(self) -> MixedPrecisionPolicy:
        """The dtypes of gathered weights and of reduced gradients."""
        if not self.half:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def distributed_config(self, model: nn.Module) -> DistributedConfig:
        """The setting with which transformers loads the model: each rank reads its slice of the files.

        Args:
            model: the model on the meta device.
        """
        blocks = {re.sub(r"\.\d+(?=\.|$)", ".*", name): "free_full_weight" for name in block_names(model)}
        return DistributedConfig(
            fsdp_size=self.shards, dp_replicate_size=self.replicas, fsdp_mixed_precision=self.half, fsdp_plan=blocks
        )

    def mesh(self) -> DeviceMesh:
        """The mesh of all ranks."""
        if self.replicas == 1:
            return init_device_mesh(self.device, (self.shards,), mesh_dim_names=("shard",))
        return init_device_mesh(self.device, (self.replicas, self.shards), mesh_dim_names=("replicate", "shard"))


def _run(self: nn.Module, function: Callable[[], Any]) -> Any:
    parts: Any = self.outside_blocks
    for part in parts:
        part.unshard()  # also the head, whose forward method is not called
    return function()


def shard(model: nn.Module, sharding: Sharding, ignored: Iterable[nn.Parameter] = ()) -> nn.Module:
    """Makes a model ready for :func:`run`; shards one that each rank holds whole.

    Args:
        model: a causal language model of transformers, equal on all ranks.
        sharding: how to shard it.
        ignored: parameters that each rank keeps whole.
    """
    if not isinstance(model, FSDPModule):
        options: Any = {"mesh": sharding.mesh(), "mp_policy": sharding.policy, "ignored_params": set(ignored)}
        for name in block_names(model):
            fully_shard(model.get_submodule(name), reshard_after_forward=sharding.reshard, **options)
        fully_shard(model, **options)
    elif not sharding.reshard:
        model.set_reshard_after_forward(False)
    sharded: Any = model
    blocks = tuple(f"{name}." for name in block_names(model))
    sharded.outside_blocks = [
        part
        for name, part in model.named_modules()
        if name and isinstance(part, FSDPModule) and not f"{name}.".startswith(blocks)
    ]
    sharded.gathered_dtype = sharding.policy.param_dtype
    sharded.run = MethodType(_run, sharded)
    register_fsdp_forward_method(sharded, "run")
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model are sharded over the ranks."""
    return isinstance(base_model(model), FSDPModule)


def run(model: nn.Module, function: Callable[[], T]) -> T:
    """Calls ``function`` as a forward pass of ``model``: its weights outside the blocks are gathered meanwhile.

    Args:
        model: a causal language model, sharded or not.
        function: a closure that does not call ``model`` itself, but parts of it. It has no arguments, as FSDP would
            copy those that are containers of tensors.
    """
    result: T = base_model(model).run(function) if is_sharded(model) else function()
    return result


def reshard(model: nn.Module) -> None:
    """Frees the gathered weights of a sharded model after a pass without gradient.

    No backward pass frees those outside the blocks, and after the next optimizer step they would be stale.
    """
    for part in base_model(model).modules() if is_sharded(model) else ():
        if isinstance(part, FSDPModule):
            part.reshard()


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module before ``fully_shard`` gave it one of its own."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, FSDPModule) else kind


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Lets peft see the weights of a sharded model with their whole shapes, without their values.

    peft takes a hybrid mesh for tensor parallelism, and would make an adapter that fits a shard.
    """
    sharded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in sharded:
        empty = torch.empty((), dtype=parameter.dtype, device=parameter.device)
        module._parameters[name] = nn.Parameter(empty.expand(parameter.shape), parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            parameter.requires_grad_(bool(getattr(module, name).requires_grad))
            module._parameters[name] = parameter


def gathered_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which a model's weights enter a pass."""
    dtype: torch.dtype = getattr(base_model(model), "gathered_dtype", None) or next(model.parameters()).dtype
    return dtype


# -- tensors --------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all ranks; a collective operation for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def meeting() -> Iterator[None]:
    """Inside this context, tensors can be sharded, also before the ranks have met.

    This process is then one of two ranks of which the other does not exist, and collective operations do nothing.
    """
    if dist.is_initialized():
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_shard(tensor: Tensor) -> Tensor:
    """A sharded tensor of which this rank has ``tensor``."""
    mesh = init_device_mesh(tensor.device.type, (dist.get_world_size(),))
    return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)


def by_kind(tensors: Iterable[T]) -> list[list[T]]:
    """The sharded tensors and the others, without empty lists: torch's operations on many tensors take one kind."""
    kinds: tuple[list[T], list[T]] = [], []
    for tensor in tensors:
        kinds[not isinstance(tensor, DTensor)].append(tensor)
    return [kind for kind in kinds if kind]


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, sharded or not; the same on all ranks."""
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in by_kind(gradients) or [[]]]
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


def average_plain_gradients(parameters: Iterable[Tensor]) -> None:
    """Averages over all ranks the gradients of parameters that are not sharded, as FSDP does for those that are."""
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    if not plain:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in plain]
    flat = torch.cat([g.flatten().float() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, gradient, average in zip(plain, gradients, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = gradient.copy_(average.view_as(gradient))


def most_over_ranks(*numbers: int) -> list[int]:
    """The largest of each number over all ranks; all ranks must call it.

    The strategy has a group for tensors on the CPU, so that no rank waits for its device.
    """
    most = torch.tensor(numbers)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [int(number) for number in most.tolist()]


def equalize(tensors: Iterable[Tensor]) -> None:
    """Copies tensors that are not sharded from rank 0 to the others."""
    for tensor in tensors:
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.detach(), 0)
