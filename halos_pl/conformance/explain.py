"""What each clause of the suite means, an example that fails it, and how to mend one's own code.

``halos check --explain CLAUSE`` prints these texts. A clause without one fails the tests, and so does an example that
passes its clause.
"""

from __future__ import annotations

import difflib
import textwrap
from dataclasses import dataclass

from halos_pl.conformance import feedback, objective, reference_point, reward, value_function

#: Where the clauses of each kind of target are listed, in the order of the definition.
CLAUSES: dict[str, tuple[str, ...]] = {
    "ValueFunction": value_function.CLAUSES,
    "Reward": reward.CLAUSES,
    "ReferencePoint": reference_point.CLAUSES,
    "Feedback": feedback.CLAUSES,
    "HALO": objective.CLAUSES,
}


@dataclass(frozen=True)
class Explanation:
    """One clause in words.

    Attributes:
        means: what the clause demands.
        example: the body of a class that fails it; the class extends the clause's kind of target.
        cure: what to change where it fails.
    """

    means: str
    example: str
    cure: str


EXPLANATIONS: dict[str, Explanation] = {
    # -- value functions ------------------------------------------------------------------------------------------
    "shape": Explanation(
        "v returns a value for each outcome: a tensor of the shape and dtype of u.",
        """
        def forward(self, u):
            return torch.sigmoid(u).mean()
        """,
        "Work elementwise: no sum, mean, squeeze or reshape. Make constants with u.new_tensor(...), so that they keep"
        " the dtype of u.",
    ),
    "elementwise": Explanation(
        "The value of an outcome depends on that outcome alone, not on the other rows, the batch size or the position.",
        """
        def forward(self, u):
            return torch.sigmoid(u - u.mean())
        """,
        "Remove statistics of the batch such as u.mean(), u.max() or softmax. What outcomes are compared with is the"
        " job of the reference point; a scale is a constant.",
    ),
    "deterministic": Explanation(
        "The same outcome has the same value on every call, in training and evaluation, with and without gradient.",
        """
        def forward(self, u):
            return torch.sigmoid(u + 0.01 * torch.randn_like(u))
        """,
        "Remove random draws, counters, running statistics, and branches on self.training or torch.is_grad_enabled().",
    ),
    "no_in_place_change": Explanation(
        "v leaves its input unchanged: the objective still needs u afterwards.",
        """
        def forward(self, u):
            u.detach().clamp_(-1, 1)
            return torch.sigmoid(u)
        """,
        "Use the operation without the trailing underscore (clamp, not clamp_), or work on u.clone().",
    ),
    "finite": Explanation(
        "Values and gradients are finite numbers for every |u| up to 10,000 nats.",
        """
        def forward(self, u):
            return torch.log(torch.sigmoid(u))
        """,
        "Use the stable form: F.logsigmoid(u) for log(sigmoid(u)), torch.log1p, torch.expm1, F.softplus. Under"
        " torch.where both branches must be finite, since the gradient of the unused one is multiplied by 0, and"
        " 0 * inf is NaN.",
    ),
    "precision": Explanation(
        "In float32 and bfloat16 the values and slopes agree with those in float64 up to rounding.",
        """
        def forward(self, u):
            return (1e4 + torch.tanh(u)) - 1e4
        """,
        "Avoid differences of large, nearly equal numbers (torch.expm1(x) instead of exp(x) - 1), casts to another"
        " dtype, and constants that depend on the dtype. Rounding to float32 inside is reported, with that reason.",
    ),
    "non_decreasing": Explanation(
        "A better outcome is never valued less than a worse one: v'(u) >= 0 everywhere, and v never jumps down.",
        """
        def forward(self, u):
            return torch.sin(u)
        """,
        "Check the sign of each term and of each parameter that may be negative. Where v would turn, let it saturate"
        " instead, with clamp, sigmoid or tanh.",
    ),
    "concave_on_gains": Explanation(
        "Each further gain counts for less: on u > 0 the slope of v never grows, and v never jumps.",
        """
        def forward(self, u):
            return torch.where(u > 0, u.square() + u, u)
        """,
        "Use a form whose slope shrinks or stays: sigmoid, log1p, 1 - exp(-u), a power of at most 1, or a straight"
        " line. A kink may only bend down.",
    ),
    "gradient": Explanation(
        "Autograd's slope is that of the values (finite differences), also at u = 0, where every run starts.",
        """
        def forward(self, u):
            return torch.sigmoid(u).detach() + 0.5 * (u - u.detach())
        """,
        "Remove detach, item, round and no_grad from the way of u. At a kink return one of the two slopes:"
        " sqrt(|u|), for example, has an infinite one at 0, and NaN under autograd.",
    ),
    "undesirable_non_decreasing": Explanation(
        "Under `reflect_undesirable: true` undesirable rows are valued by -v(-u), which must not fall either."
        " Required of an objective that reflects; of a value function alone it is only reported.",
        """
        def forward(self, u):
            return torch.sin(u)
        """,
        "Let v rise on losses (u < 0) as well; it is the same v, seen in a mirror. Or read undesirable rows as `same`.",
    ),
    "undesirable_concave_on_gains": Explanation(
        "Under `reflect_undesirable: true` undesirable rows are valued by -v(-u), whose slope must not grow on u > 0:"
        " v is convex on losses. Required of an objective that reflects; only reported of a value function alone.",
        """
        def forward(self, u):
            return F.logsigmoid(u)
        """,
        "Use an S-shaped v (sigmoid, tanh, Kahneman and Tversky's power function), or set"
        " model.reflect_undesirable to false.",
    ),
    # -- rewards --------------------------------------------------------------------------------------------------
    "reward_shape": Explanation(
        "The reward is one number for each row, [n], or one for each token, [n, T], in the dtype of the log-probs.",
        """
        needs = Needs(reference=True)

        def forward(self, rows):
            return (rows.policy_logps - rows.reference_logps).sum(dim=1, keepdim=True)
        """,
        "Sum over tokens with sum(dim=1), without keepdim or squeeze, and do not cast.",
    ),
    "reward_zero_at_reference": Explanation(
        "Where the policy equals the reference model, the reward is 0. ICML 2024 only; arXiv v1 allows any reward.",
        """
        def forward(self, rows):
            return rows.policy_logps.sum(dim=1)
        """,
        "Subtract rows.reference_logps (with needs = Needs(reference=True)), and remove offsets, margins and bonuses: a"
        " constant of the loss is model.loss_offset. For a loss without reference model, --definition v1.",
    ),
    "reward_linear": Explanation(
        "The reward is l * log(pi_theta / pi_ref) with one factor l > 0 a row, which does not depend on the policy."
        " ICML 2024 only; arXiv v1 allows any reward.",
        """
        needs = Needs(reference=True)

        def forward(self, rows):
            return (rows.policy_logps - rows.reference_logps).sum(dim=1).clamp(-5, 5)
        """,
        "Keep the log-ratio linear, such as divided by the length, and move clamps, squares and saturation into the"
        " value function.",
    ),
    "reward_of_its_row": Explanation(
        "The reward of a row depends on that row alone: not on the rows beside it, on earlier calls, or on evaluation.",
        """
        needs = Needs(reference=True)

        def forward(self, rows):
            ratio = (rows.policy_logps - rows.reference_logps).sum(dim=1)
            return ratio / len(rows)
        """,
        "Remove statistics of the batch, counters and branches on self.training. What rows are compared with is the job"
        " of the reference point; how much they count, that of the feedback.",
    ),
    "reward_padding": Explanation(
        "More padding does not change the reward, and a reward of tokens is finite on padding.",
        """
        needs = Needs(reference=True)

        def forward(self, rows):
            return (rows.policy_logps - rows.reference_logps).mean(dim=1)
        """,
        "Log-probs of padding are 0, so sums may run over it, but nothing else: divide by rows.mask.sum(dim=1), and"
        " take the last token by the mask, not by the last column.",
    ),
    # -- reference points -----------------------------------------------------------------------------------------
    "reference_in_range": Explanation(
        "z0 is a mean of rewards, E_Q[r], so it lies between the least and the largest reward that it depends on; and"
        " it is not always each row's own reward.",
        """
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(2 * MeanOverRanks(rewards[rows.labels.train]).mean)
        """,
        "Weight rewards by weights of at least 0 that sum to 1, without factor or offset. A clamp such as KTO's max(0,"
        " z0) fails by intent; it is expected of MismatchedKL itself, and of your own class under expected_failures.",
    ),
    "reference_shift_equivariant": Explanation(
        "If all rewards are c nats higher, z0 is c nats higher, so that outcomes stay the same.",
        """
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(MeanOverRanks(rewards[rows.labels.train]).mean.clamp(min=0))
        """,
        "Use a location of the rewards (mean, median, quantile, trimmed mean) without clamp, factor or non-linear"
        " function. A running mean must start from the first estimate, not from 0.",
    ),
    "reference_permutation_equivariant": Explanation(
        "The order of the rows does not matter: each row's z0 is the same in any order.",
        """
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train][0].detach())
        """,
        "Do not pair rows by their place: rows.labels.pair names a pair's other row, rows.labels.group the rows of a"
        " prompt, rows.labels.mismatched the mismatched ones.",
    ),
    "reference_detached": Explanation(
        'A reference point of scope "step" passes no gradient on to the rewards or the policy.',
        """
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train].mean())
        """,
        "Call .detach() on what you average, as in rewards.detach(). In training the rewards come without gradient, but"
        " rows.policy_logps need not, and the clause gives both a gradient. MeanOverRanks and sum_over_ranks detach by"
        ' themselves. If z0 is meant to carry a gradient, as in DPO, it is read off each row: scope = "row".',
    ),
    "reference_split": Explanation(
        "z0 is the same on two ranks as on one and in micro-batches as at once, and reads only the rows that `needs`"
        " asks for. Of an objective, the losses of the parts also sum to the loss of the step.",
        """
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train].detach().mean())
        """,
        "Reduce over ranks before dividing: MeanOverRanks(values).estimate() (halos_pl.objective.reference_points), or"
        " sum_over_ranks for sums and counts. A median, trimmed mean or rank needs all values:"
        " gather_over_ranks(values)[0]. Both are in halos_pl.distributed; every rank must call them equally often, also"
        " one without rows. Name what you read in needs: mismatched=True for mismatched rows, step_rewards=True for the"
        " rewards of the step, whole_step=True where these carry a gradient.",
    ),
    "reference_finite": Explanation(
        "z0 is an Estimate of a finite number for every row, from a step of one row to rewards of 10,000 nats.",
        """
        needs = Needs(step_rewards=True)

        def forward(self, rewards, rows):
            return Estimate(rewards[rows.labels.train].detach().exp().mean().log())
        """,
        "Mind empty selections (count.clamp(min=1)), the spread of a single row, and exp: torch.logsumexp does not"
        " overflow.",
    ),
    # -- feedback -------------------------------------------------------------------------------------------------
    "feedback_sign": Explanation(
        "The sign of each row is -1 (desirable: raising its value lowers the loss) or +1.",
        """
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, 1.0, 0.0)
            return Judgement(sign, rows.labels.train.float(), rows.labels.train.sum().float())
        """,
        "Return torch.where(rows.labels.desirable, -1.0, 1.0), for mismatched rows too. How much a row counts is its"
        " weight.",
    ),
    "feedback_weight": Explanation(
        "Weights are at least 0, exactly 0 for mismatched rows, and above 0 for some row of some step.",
        """
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            return Judgement(sign, torch.ones(len(rows)), rows.labels.train.sum().float())
        """,
        "Multiply weights by rows.labels.train, which is False for mismatched rows. A row that pulls the other way"
        " has the other sign, not a negative weight.",
    ),
    "feedback_independent_of_theta": Explanation(
        "Sign, weight and denominator do not depend on what the policy says, and carry no gradient.",
        """
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            weight = rows.policy_logps.detach().sum(dim=1).exp() * rows.labels.train
            return Judgement(sign, weight, rows.labels.train.sum().float())
        """,
        "Use labels, scores, masks and reference_logps only; .detach() removes the gradient, not the dependence. What"
        " follows the policy belongs into the value function.",
    ),
    "feedback_deterministic": Explanation(
        "The same rows are judged alike on every call, in training and in evaluation.",
        """
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            return Judgement(sign, torch.rand(len(rows)) * rows.labels.train, rows.labels.train.sum().float())
        """,
        "Remove random draws, counters, running averages and branches on self.training. Random changes of labels are a"
        " transform of the data (data.transforms).",
    ),
    "feedback_split": Explanation(
        "A row is judged alike in any order, beside any padding and on any rank, and the ranks' denominators add up to"
        " that of the step.",
        """
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            return Judgement(sign, rows.labels.train.float(), torch.tensor(1.0))
        """,
        "Return as denominator a sum over this rank's rows, such as rows.labels.train.sum().float(), and no mean or"
        " constant."
        " Weights that count the step's rows reduce these counts with halos_pl.distributed.sum_over_ranks first.",
    ),
    "feedback_finite": Explanation(
        "Signs, weights and denominator are finite, and the denominator is a scalar above 0 where a row counts.",
        """
        def forward(self, rows):
            sign = torch.where(rows.labels.desirable, -1.0, 1.0)
            weight = rows.labels.train / (rows.mask.sum(dim=1) - 1)
            return Judgement(sign, weight, rows.labels.train.sum().float())
        """,
        "Mind divisions by counts that may be 0 (clamp(min=1)), such as those of a class that a step lacks, and rows of"
        " one token. Return the denominator as a tensor without dimensions.",
    ),
    # -- objectives -----------------------------------------------------------------------------------------------
    "identity": Explanation(
        "The loss is the sum of w * a * v(r - z0) over the rows, divided by the denominator, up to a constant: equal"
        " changes of the loss and an equal gradient. A loss that is not made of the four parts fails as well.",
        """
        def compute_loss(self, rows, context):
            result = super().compute_loss(rows, context)
            return dataclasses.replace(result, loss=result.loss.square())
        """,
        "Express the change as a part: a transform of the outcome is a value function, a weight is feedback, an offset"
        " is the reference point. A further term (an SFT loss, say) goes into model.extra_terms, which makes the loss a"
        " composite.",
    ),
    "one_value_function": Explanation(
        "The value function that the objective shows acts on desirable and on undesirable rows.",
        """
        def compute_loss(self, rows, context):
            u = self.reward(rows) - context.reference_point
            value = torch.where(context.sign < 0, self.value_function(u), torch.tanh(u))
            loss = (context.weight * context.sign * value).sum() / context.denominator
            return dataclasses.replace(super().compute_loss(rows, context), loss=loss)
        """,
        "Use one value function. What distinguishes the classes is their weight (lambda_desirable, lambda_undesirable)"
        " and reflect_undesirable; what distinguishes gains from losses is the shape of v"
        " (LossAverse).",
    ),
}


def kind_of(clause: str) -> str:
    """The name of the class whose clause it is."""
    return next(kind for kind, clauses in CLAUSES.items() if clause in clauses)


def code(clause: str) -> str:
    """The example of a clause as the source of a class ``Example``."""
    body = textwrap.indent(textwrap.dedent(EXPLANATIONS[clause].example).strip(), "    ")
    return f"class Example({kind_of(clause)}):\n{body}"


def listed() -> str:
    """All clauses by kind, each with the first sentence of what it means."""
    lines = []
    for kind, clauses in CLAUSES.items():
        lines += ["", f"{kind}:"]
        width = max(map(len, clauses))
        lines += [f"  {name:<{width}}  {EXPLANATIONS[name].means.partition(': ')[0].rstrip('.')}" for name in clauses]
    return "\n".join([*lines[1:], "", "halos check --explain CLAUSE shows an example of failing it, and the cure."])


def explain(name: str) -> str:
    """What a clause means, an example of failing it, and the cure.

    Args:
        name: of the clause; the term in front of it, in a report on a sum, does not matter.

    Raises:
        ValueError: naming the clauses that are like it, where there is no such clause.
    """
    clause = name.rpartition(".")[2]
    if clause not in EXPLANATIONS:
        known = [known for clauses in CLAUSES.values() for known in clauses]
        near = difflib.get_close_matches(clause, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"no clause is named {name!r}{hint} (halos check --explain lists all of them)")
    it = EXPLANATIONS[clause]
    wrapped = {
        title: textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        for title, text in (("means", it.means), ("cure", it.cure))
    }
    return (
        f"{clause}, a clause of a {kind_of(clause)}\n\nIt means\n{wrapped['means']}\n\nThis fails it\n"
        f"{textwrap.indent(code(clause), '  ')}\n\nThe cure\n{wrapped['cure']}"
    )
