"""Reference models that follow the policy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from halos_pl.batch import TokenBatch
from halos_pl.policy.loading import ModelSpec, load_reference
from halos_pl.policy.reference import NAME, ReferenceModel, match, tensors_of
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.sharding import is_sharded, whole

#: Weights by name.
Weights = dict[str, Tensor]


class MovingReference(ReferenceModel):
    """A copy of the policy, with its adapter if it has one, whose trained weights are replaced during training."""

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        self._policy = policy
        self._moving = {name for name, p in policy.model.named_parameters() if p.requires_grad}
        of_files = load_reference(spec, policy.sharding) if policy.sharding and spec else None
        copy = policy.copy() if of_files is None else policy.beside(of_files, NAME)
        self._scorer = copy.eval().requires_grad_(False)

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        match(self._scorer, self._policy, tensors_of)
        yield self._scorer

    @abstractmethod
    def follow(self, step: int) -> None:
        """Moves the reference after optimizer step ``step``, counted from 1."""

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._scorer.model.named_parameters() if name in self._moving)

    def _of_policy(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's trained weights: this rank's shards if the reference is sharded too, otherwise whole."""
        sharded = is_sharded(self._scorer.model)
        trained = ((name, p.detach()) for name, p in self._policy.model.named_parameters() if name in self._moving)
        return ((name, p if sharded else whole(p)) for name, p in trained)

    @torch.no_grad()
    def _set(self, weights: Weights) -> None:
        for name, parameter in self._parameters():
            if is_sharded(self._scorer.model):
                parameter.copy_(weights[name])  # in place: FSDP gathers this memory, not a tensor that replaces it
            else:
                parameter.data = weights[name].to(parameter)

    def _check_names(self, state: Weights, names: set[str]) -> None:
        """Refuses the weights of another reference.

        Raises:
            ValueError: they do not have these names.
        """
        if state.keys() != names:
            raise ValueError(
                f"the checkpoint does not contain the weights of this {type(self).__name__}; resume with the config"
                " that it was trained with"
            )


class SyncedCopy(MovingReference):
    """A copy of the policy that follows it: every few steps, reference = mix * policy + (1 - mix) * reference.

    ``mix=1`` replaces the reference, as in online and humanline alignment; a smaller one is the soft update of TR-DPO
    (Gorbatovski et al. 2024, section 3). Only trained weights move; they are saved in checkpoints.

    Args:
        every: number of optimizer steps between two updates.
        mix: share of the policy, in (0, 1].

    Raises:
        ValueError: a number is outside its range.
    """

    def __init__(self, *, every: int, mix: float = 1.0) -> None:
        if every < 1 or not 0 < mix <= 1:
            raise ValueError(
                f"SyncedCopy: every is {every} and mix is {mix}; every must be at least 1, and mix in (0, 1]"
            )
        self.every, self.mix = every, float(mix)

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        super().bind(policy, spec, stored=stored)
        self._exact: Weights = {}  # in float32, as half precision would lose small updates

    @torch.no_grad()
    def follow(self, step: int) -> None:
        if step % self.every:
            return
        parameters = dict(self._parameters())
        for name, target in self._of_policy():
            before = self._exact.get(name, parameters[name].data).to(target.device).float()
            self._exact[name] = before.lerp(target.float(), self.mix)
        self._set(self._exact)

    def state(self) -> Weights:
        return {name: self._exact.get(name, p.detach()) for name, p in self._parameters()}

    def restore(self, state: Weights) -> None:
        self._check_names(state, self._moving)
        self._exact = {name: values.float() for name, values in state.items()}
        self._set(state)


class PastPolicies(MovingReference):
    """Several earlier policies: log pi_ref = start * log pi_0 + (1 - start) * mean of log pi_j over the last ``keep``.

    pi_0 is the policy before training, and the pi_j are the policies after every ``every`` optimizer steps. While there
    are fewer than ``keep``, pi_0 stands for the rest. These are the opponents of MNPO, with equal weights lambda_j.
    Each of the models scores every batch. They take the memory of a copy of the policy and of ``keep`` more copies of
    its trained weights, which are saved in checkpoints.

    The probabilities of this reference do not sum to 1. So an objective that needs the KL divergence over the whole
    vocabulary is refused, and the divergence that a test step reports is that from pi_0.

    Args:
        every: number of optimizer steps between two snapshots.
        keep: number of snapshots, at least 1.
        start: share of the policy before training, in [0, 1).

    Raises:
        ValueError: a number is outside its range.
    """

    one_model = False

    def __init__(self, *, every: int, keep: int, start: float) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"PastPolicies: every is {every} and keep is {keep}; both must be at least 1")
        if not 0 <= start < 1:
            raise ValueError(f"PastPolicies: start is {start}; it must be at least 0 and below 1")
        self.every, self.keep, self.start = every, keep, float(start)

    def bind(self, policy: Scorer, spec: ModelSpec | None, *, stored: bool = False) -> None:
        super().bind(policy, spec, stored=stored)
        self._first: Weights = {name: p.detach().clone() for name, p in self._parameters()}
        self._snapshots = [self._first] * self.keep

    @contextmanager
    def scoring(self) -> Iterator[Scorer]:
        """The policy before training."""
        with self._holding(self._first) as scorer:
            yield scorer

    @contextmanager
    def _holding(self, weights: Weights) -> Iterator[Scorer]:
        with super().scoring() as scorer:
            self._set(weights)
            if not is_sharded(scorer.model):  # they are kept on the policy's device, in its dtype
                weights.update((name, p.detach()) for name, p in self._parameters())
            yield scorer

    @torch.no_grad()
    def logps(self, batch: TokenBatch) -> Tensor:
        self.rows_computed += len(batch)
        with self.scoring() as scorer:
            first: Tensor = scorer(batch)
        logps = first
        for weights in self._snapshots:
            if weights is not self._first:
                with self._holding(weights) as scorer:
                    # From differences, so that the reference of an unchanged policy has exactly its log-probs.
                    logps = logps + (1 - self.start) / self.keep * (scorer(batch) - first)
        return logps

    def follow(self, step: int) -> None:
        if step % self.every == 0:
            newest = {name: p.clone() for name, p in self._of_policy()}
            self._snapshots = [*self._snapshots[1:], newest]

    def state(self) -> Weights:
        return {f"{i}.{name}": p for i, weights in enumerate(self._snapshots) for name, p in weights.items()}

    def restore(self, state: Weights) -> None:
        self._check_names(state, {f"{i}.{name}" for i in range(self.keep) for name in self._moving})
        self._snapshots = [{name: state[f"{i}.{name}"] for name in self._moving} for i in range(self.keep)]
