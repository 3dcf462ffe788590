"""The metrics of ``halos evaluate``: units, meaning and direction."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric.

    Attributes:
        unit: the items that it is measured on: ``pairs``, ``rows``, ``examples`` (pairs or single rows), ``prompts``,
            or ``questions`` of a benchmark. Rows with the same prompt count as one example, since they are not
            independent: the n of a metric is a number of prompts.
        meaning: the quantity whose mean is reported, with its unit.
        higher_is_better: whether higher is better; None if neither direction is.
    """

    unit: str
    meaning: str
    higher_is_better: bool | None

    @property
    def counted(self) -> str:
        """What its n counts."""
        return "question" if self.unit == "questions" else "prompt"


METRICS = {
    "reward_accuracy": Metric("pairs", "share of pairs whose chosen completion has the higher reward", True),
    "reward_margin": Metric("pairs", "reward of the chosen minus that of the rejected completion, nats", True),
    "policy_accuracy": Metric(
        "pairs", "share of pairs whose chosen completion has the higher log-prob under the policy itself", True
    ),
    "brier": Metric(
        "pairs", "squared error of sigmoid(beta * margin) as the probability that the chosen one wins", False
    ),
    "reward_auroc": Metric("examples", "share of undesirable rows with a lower reward than a desirable one", True),
    "nll_desirable": Metric("rows", "negative log-prob of desirable completions, nats per token", False),
    "nll_undesirable": Metric("rows", "negative log-prob of undesirable completions, nats per token", None),
    "displacement": Metric(
        "rows", "log-prob of desirable completions under the policy minus that under the reference, nats", None
    ),
    "kl_held_out": Metric(
        "examples", "KL from the reference along held-out completions, nats, exact at each token", None
    ),
    "kl": Metric(
        "prompts", "KL from the reference along the policy's answers as sampled, nats, exact at each token", None
    ),
    "length": Metric("prompts", "tokens per answer", None),
    "finished": Metric("prompts", "share of answers that the model ended itself", None),
    "rule": Metric("prompts", "share of answers that meet the rule", True),
    "judge": Metric(
        "prompts",
        "share of answers that the judge prefers to those of the reference; a tie counts half",
        True,
    ),
    "win_rate": Metric(
        "prompts", "share of answers that the judge at the endpoint prefers, in both orders; a tie counts half", True
    ),
    "grade": Metric("prompts", "grade by the judge at the endpoint, on its own scale", True),
}
#: Metrics that compare with a reference model.
COMPARING = ("reward_accuracy", "reward_margin", "brier", "reward_auroc", "displacement", "kl_held_out", "kl")
#: Metrics that lie between 0 and 1.
SHARES = frozenset(name for name, metric in METRICS.items() if metric.meaning.startswith("share"))
#: Positive metrics without an upper bound: arms are compared by ratios, on the log scale.
RATIOS = frozenset({"kl", "kl_held_out", "length"})
#: Negative log-probs per token; their exponentials are perplexities.
PER_TOKEN = frozenset(name for name, metric in METRICS.items() if metric.meaning.endswith("nats per token"))
#: Metrics that a user's function computes, and the arguments that name it as ``file.py:function``.
CODE = ("rule", "judge")
#: Metrics of a judge at an endpoint, which may abstain: examples that some runs lack are left out of comparisons.
BY_JUDGE = ("win_rate", "grade")


def metric_of(name: str) -> Metric:
    """The metric called ``name``; any name outside :data:`METRICS` is a benchmark, whose questions score 0 to 1."""
    return METRICS.get(name) or Metric("questions", f"share of {name} questions answered correctly", True)


def is_share(name: str) -> bool:
    """Whether a metric lies between 0 and 1."""
    return name in SHARES or name not in METRICS
