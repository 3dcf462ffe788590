"""The strategy for models that do not fit on one device: Lightning's model parallelism over torch's FSDP2."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry

from halos_pl.policy.sharding import Sharding
from halos_pl.training.sharded_checkpoint import FolderCheckpoints


class GatheredHalf(Precision):
    """``bf16-mixed`` of sharded models: float32 weights are gathered in bfloat16, so autocast has nothing to do.

    Autocast would keep the rounded weights of all layers for the backward pass, which FSDP could not free.
    """

    precision: Any = "bf16-mixed"


def check_replicas(replicas: int, world_size: int) -> None:
    """Refuses a number of replicas over which the ranks cannot be divided.

    Args:
        replicas: Number of groups of ranks, each of which holds one sharded copy of the models.
        world_size: Number of ranks.

    Raises:
        ValueError: naming both numbers.
    """
    if replicas < 1 or world_size % replicas:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"trainer.strategy.init_args.replicas is {replicas}, but it must divide the number of ranks, {world_size}"
            f" (trainer.devices times trainer.num_nodes): {', '.join(map(str, divisors))}"
        )


class ShardedStrategy(FolderCheckpoints, ModelParallelStrategy):
    """Shards weights, gradients and optimizer state of the policy, and the reference, over all ranks (FSDP2).

    The step and its result are those of a single device. A checkpoint is a folder to which all ranks write.

    Args:
        replicas: number of groups of ranks that each hold all weights (hybrid sharding, HSDP). With one per node, only
            gradients travel between nodes.
        reference: ``sharded``: over the ranks, like the policy; ``whole``: on each rank, which saves its traffic if
            it is small.
        reshard_after_forward: whether to free the weights of a block after its forward pass; if not, a rank holds all
            weights during a step, which saves a third of the traffic.
        process_group_backend: backend of torch.distributed; default: NCCL on GPUs, with gloo for tensors on the CPU.
        timeout: longest time that a rank waits for the others.

    Raises:
        ValueError: if an option is invalid, or ``replicas`` does not divide the number of ranks.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        replicas: int = 1,
        reference: Literal["sharded", "whole"] = "sharded",
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout)
        if not isinstance(replicas, int) or replicas < 1:
            raise ValueError(f"replicas is {replicas}; it must be a whole number from 1")
        if reference not in ("sharded", "whole"):
            raise ValueError(f"reference is {reference!r}; it must be sharded or whole")
        self.replicas, self.reference, self.reshard_after_forward = replicas, reference, reshard_after_forward

    def setup_environment(self) -> None:
        ranks = self._data_parallel_size = self.num_nodes * self.num_processes
        check_replicas(self.replicas, ranks)
        if str(self.precision_plugin.precision).startswith("16"):
            raise ValueError(
                f"trainer.precision is {self.precision_plugin.precision}, whose loss scale fsdp2 does not support;"
                " choose bf16-mixed or bf16-true"
            )
        if isinstance(self.precision_plugin, MixedPrecision):
            self._precision_plugin = GatheredHalf()
        super().setup_environment()
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # transformers chooses its device by it; SLURM does not set it

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of this rank and of all; also known before the ranks have met, as a study checks its arms then."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    @property
    def sharding(self) -> Sharding:
        """How models are sharded."""
        return Sharding(
            shards=self.world_size // self.replicas,
            replicas=self.replicas,
            device=self.root_device.type,
            half=str(self.precision_plugin.precision).startswith("bf16"),
            stored_half=self.precision_plugin.precision == "bf16-true",
            reshard=self.reshard_after_forward,
            whole_reference=self.reference == "whole",
        )


StrategyRegistry.register(
    ShardedStrategy.strategy_name, ShardedStrategy, description="Fully sharded data parallelism (torch's FSDP2)"
)
