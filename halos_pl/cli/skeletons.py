"""Texts that ``halos new`` writes. CLASS is replaced by the class, MODULE by the file name without suffix."""

_VALUE_FUNCTION = '''"""CLASS: a value function."""

from __future__ import annotations

import torch
from torch import Tensor

from value_functions.base import ValueFunction


class CLASS(ValueFunction):
    """v(u) = tanh(beta * u).

    Args:
        beta: slope at u = 0, 1 / nats.

    Raises:
        ValueError: if beta is not positive.
    """

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"CLASS: beta is {beta}; it must be positive")
        self.beta = beta

    def forward(self, u: Tensor) -> Tensor:
        # u = r - z0 in nats, any shape. Return the value of each element, in the same shape and dtype.
        # A HALO needs v non-decreasing everywhere, and concave where u > 0.
        return torch.tanh(self.beta * u)
'''

_REWARD = '''"""CLASS: a reward."""

from __future__ import annotations

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.rewards import Reward


class CLASS(Reward):
    """r = scale * sum over the completion's tokens of log pi_theta / pi_ref.

    Args:
        scale: l(y) of the definition, the same for all completions; above 0.

    Raises:
        ValueError: if scale is not positive.
    """

    # What data and models must provide; see Needs.
    needs = Needs(reference=True)

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"CLASS: scale is {scale}; it must be positive")
        self.scale = scale

    def forward(self, rows: LogProbBatch) -> Tensor:
        # Log-probs of the tokens are [n, T], 0 in padding. Return nats: [n], or [n, T] for a reward of each token.
        if rows.reference_logps is None:
            raise ValueError("CLASS needs the log-probs of a reference model")
        return self.scale * (rows.policy_logps - rows.reference_logps).sum(dim=1)
'''

_REFERENCE_POINT = '''"""CLASS: a reference point."""

from __future__ import annotations

from torch import Tensor

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.reference_points.base import Estimate, MeanOverRanks, ReferencePoint


class CLASS(ReferencePoint):
    """z0 = mean reward of the step's rows (without mismatched ones), over all ranks."""

    # "step": one estimate per optimizer step, without gradient. "row": one per row, with gradient.
    scope = "step"
    # What must be computed before forward is called; see Needs. Here: the rewards of the step's rows.
    needs = Needs(step_rewards=True)

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Estimate:
        # rewards: [n], nats. rows.labels: which rows are desirable or mismatched, and which form a pair.
        # Add up sums and counts over ranks, never means: ranks may have different numbers of rows.
        return MeanOverRanks(rewards[rows.labels.train]).estimate()
'''

_FEEDBACK = '''"""CLASS: feedback."""

from __future__ import annotations

import torch

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.objective.feedback import Feedback, Judgement


class CLASS(Feedback):
    """Binary feedback per row; undesirable rows count ``undesirable_weight`` times.

    Args:
        undesirable_weight: lambda_U, at least 0.

    Raises:
        ValueError: if the weight is negative.
    """

    # What the data must provide; see Needs.
    needs = Needs(undesirable=True)

    def __init__(self, *, undesirable_weight: float = 1.0) -> None:
        super().__init__()
        if not undesirable_weight >= 0:
            raise ValueError(f"CLASS: undesirable_weight is {undesirable_weight}; it must be at least 0")
        self.undesirable_weight = undesirable_weight

    def forward(self, rows: LogProbBatch) -> Judgement:
        # Use only labels, never log-probs: sign and weight must not depend on the policy.
        labels = rows.labels
        ones = torch.ones_like(labels.desirable, dtype=torch.float32)
        return Judgement(
            sign=torch.where(labels.desirable, -ones, ones),  # -1: a higher value lowers the loss
            weight=torch.where(labels.desirable, ones, self.undesirable_weight * ones) * labels.train,
            denominator=labels.train.sum().float(),  # on this rank; the loss is divided by the sum over ranks
        )
'''

_OBJECTIVE = """\
# MODULE: KTO with another value function. Describe the loss, its source and its verdict here.
# halos objectives --show kto prints an example; halos check --explain lists the clauses of the definition.
model:
  reward: {class_path: LogRatio, init_args: {length_normalised: false}} # r, in nats
  reference_point: {class_path: MismatchedKL, init_args: {clamp: true}} # z0, which r is compared with
  value_function: {class_path: Tanh, init_args: {beta: 0.1}} # v(r - z0)
  feedback: {class_path: Binary, init_args: {lambda_desirable: 1.0, lambda_undesirable: 1.0, denominator: rows}}
  reflect_undesirable: true # an undesirable row has the value -v(-u); false: +v(u)
  loss_offset: 0.0 # added to the loss of each row; it has no gradient
  extra_terms: null # such as [{class_path: NLL, init_args: {weight: 0.1}}]
  reference_model: null
data: {one_completion_per_prompt: false, control_tokens: null}
"""

_POLICY_WEIGHT = '''"""CLASS: a policy weight."""

from __future__ import annotations

from torch import Tensor

from halos_pl.batch import LogProbBatch
from halos_pl.objective.policy_weights import PolicyWeight


class CLASS(PolicyWeight):
    """w = 1 / (1 + rate * |r|): a row counts less, the further the policy has moved on it.

    Args:
        rate: how fast the weight falls, 1 / nats; at least 0.

    Raises:
        ValueError: if rate is negative.
    """

    # "loss": the number multiplies the row's weight. "outcome": it multiplies u = r - z0.
    acts_on = "loss"

    def __init__(self, *, rate: float = 0.1) -> None:
        super().__init__()
        if not rate >= 0:
            raise ValueError(f"CLASS: rate is {rate}; it must be at least 0")
        self.rate = rate

    def forward(self, rewards: Tensor, rows: LogProbBatch) -> Tensor:
        # rewards: [n] in nats, without gradient; [n, T] with a reward for each token. Return numbers of that shape, at
        # least 0. What the weight remembers from step to step belongs in get_extra_state.
        return 1 / (1 + self.rate * rewards.abs())
'''

_WEIGHTED = """\
# MODULE: DPO with the policy weight CLASS. Describe the loss and its source here. It is a composite, not a HALO: its
# weights depend on the policy.
model:
  reward: null
  reference_point: null
  value_function: null
  feedback: null
  reflect_undesirable: null
  loss_offset: 0.0
  extra_terms:
    - class_path: PolicyWeighted
      init_args:
        policy_weight: {class_path: CLASS, init_args: {rate: 0.1}}
        halo: # the HALO to which the weight applies
          class_path: HALO
          init_args:
            reward: {class_path: LogRatio, init_args: {length_normalised: false}}
            reference_point: PairedCompletion
            value_function: {class_path: LogSigmoid, init_args: {beta: 0.1}}
            feedback: {class_path: Pairwise, init_args: {label_smoothing: 0.0}}
            reflect_undesirable: false
            loss_offset: 0.0
  reference_model: null
data: {one_completion_per_prompt: false, control_tokens: null}
"""

_TEST = '''"""CLASS passes the clauses of the definition for its kind."""

from MODULE import CLASS

from halos_pl.conformance import parametrize_with_checks


@parametrize_with_checks([CLASS()])
def test_it_can_be_part_of_a_halo(check):
    check()
'''

_TEST_WEIGHT = '''"""DPO with CLASS passes the clauses of a policy weight and its HALO."""

from MODULE import CLASS

from halos_pl import load_objective
from halos_pl.conformance import parametrize_with_checks
from halos_pl.objective.policy_weighted import PolicyWeighted


@parametrize_with_checks([PolicyWeighted(halo=load_objective("dpo"), policy_weight=CLASS())])
def test_it_can_weight_a_halo(check):
    check()
'''

_TEST_OBJECTIVE = '''"""MODULE.yaml is a human-aware loss."""

from pathlib import Path

from halos_pl.conformance import check_halo


def test_it_is_a_halo():
    assert check_halo(Path(__file__).with_name("MODULE.yaml")).verdict == "halo"
'''

#: The files of each kind: first the part or loss itself.
SKELETONS = {
    "value_function": {"MODULE.py": _VALUE_FUNCTION, "test_MODULE.py": _TEST},
    "reward": {"MODULE.py": _REWARD, "test_MODULE.py": _TEST},
    "reference_point": {"MODULE.py": _REFERENCE_POINT, "test_MODULE.py": _TEST},
    "feedback": {"MODULE.py": _FEEDBACK, "test_MODULE.py": _TEST},
    "policy_weight": {"MODULE.py": _POLICY_WEIGHT, "test_MODULE.py": _TEST_WEIGHT, "MODULE.yaml": _WEIGHTED},
    "objective": {"MODULE.yaml": _OBJECTIVE, "test_MODULE.py": _TEST_OBJECTIVE},
}
