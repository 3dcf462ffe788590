"""The loss of every file in ``experiments/objectives``, written out from the papers in plain torch.

Nothing here knows the package under test: a formula sees log-probs of tokens and who is who, states its constants
itself and returns a number. Names: r is the log-ratio of policy and reference summed over a completion's tokens,
l the log-probability summed over them, a bar the mean over them, w the chosen and l the rejected row of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BETA = 0.1


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step.

    Attributes:
        policy: float64 [n, T], log-prob of each completion token, with gradient; 0 beyond a row's end.
        reference: the same under the reference model.
        mask: bool [n, T], True on completion tokens.
        desirable: bool [n].
        pair: long [n], the row of the pair's other completion; -1 where rows are not paired.
        mismatched: bool [n], rows (x_i, y_j) of mismatched prompt and completion.
        prompt: long [n], equal for rows that answer the same prompt.
        scalar: float64 [n], the number that a linear head gives each row.
        score: float64 [n], the score of each row; 1 if desirable and 0 if not, where the data have none.
        gold: bool [n], gold answers.
    """

    policy: Tensor
    reference: Tensor
    mask: Tensor
    desirable: Tensor
    pair: Tensor
    mismatched: Tensor
    prompt: Tensor
    scalar: Tensor
    score: Tensor
    gold: Tensor

    @property
    def train(self) -> Tensor:
        return ~(self.mismatched | self.gold)

    @property
    def length(self) -> Tensor:
        return self.mask.sum(1)

    @property
    def token_ratio(self) -> Tensor:
        """log pi_theta / pi_ref of each token, [n, T]."""
        return self.policy - self.reference

    @property
    def r(self) -> Tensor:
        return self.token_ratio.sum(1)

    @property
    def logp(self) -> Tensor:
        return self.policy.sum(1)

    def chosen_and_rejected(self, of_rows: Tensor) -> tuple[Tensor, Tensor]:
        """[pairs] and [pairs]: ``of_rows`` of the chosen rows and of their paired completions."""
        chosen = (self.desirable & self.train).nonzero().squeeze(1)
        return of_rows[chosen], of_rows[self.pair[chosen]]

    def margin(self, of_rows: Tensor) -> Tensor:
        chosen, rejected = self.chosen_and_rejected(of_rows)
        return chosen - rejected

    def nll_per_token(self, rows: Tensor) -> Tensor:
        """Mean of -log p over all completion tokens of the rows ``rows`` (bool [n])."""
        rows = rows & self.train
        return -self.policy[rows].sum() / self.length[rows].sum()


Formula = Callable[[Step, Sequence[Step]], Tensor]
Question = Callable[[Step], bool]
Weights = dict[str, Tensor]
Shares = list[tuple[float, Weights]]


@dataclass(frozen=True)
class Loss:
    """A formula and what a run to be compared with it takes.

    Attributes:
        of: the loss of a step, given the steps before it.
        data: what one example of a step is: ``rows``, ``pairs`` or ``groups`` (all rows of a prompt); ``scored`` groups
            and ``scored_pairs`` have scores, and ``triples`` are pairs with a gold answer.
        reference: the policy's weights at each step so far (the first are the start, the last those of this
            step) to the reference's, or to several with their shares in log pi_ref; left out, the start's.
        reaches: cases that must occur within a run, or the run has not tested them.
        uses_reference: False where the loss is the same whatever the reference model says.
        has_history: the formula takes the steps before this one.
        control: the texts between the prompt and a desirable or an undesirable completion.
        imitates: only desirable rows are trained on.
        idle: settings of its file that do not change it, by name or dotted place.
        faint: rows weigh as much as the policy's probability of them, which is small in an untrained model.
    """

    of: Formula
    data: str
    reference: Callable[[Sequence[Weights]], Weights | Shares] = lambda weights: weights[0]
    reaches: dict[str, Question] = field(default_factory=dict)
    uses_reference: bool = True
    has_history: bool = False
    control: tuple[str, str] | None = None
    imitates: bool = False
    faint: bool = False
    idle: tuple[str, ...] = ()

    def references(self, weights: Sequence[Weights]) -> Shares:
        """Each model of the reference and its share, at a step as for ``reference``."""
        found = self.reference(weights)
        return found if isinstance(found, list) else [(1.0, found)]


LOSSES: dict[str, Loss] = {}


def loss(*names: str, data: str = "pairs", **more: object) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a formula of one step under the names of its objective files."""

    def register(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        of: Formula = formula if more.get("has_history") else lambda step, _: formula(step)
        for name in names:
            assert name not in LOSSES, name
            LOSSES[name] = Loss(of, data, **more)  # type: ignore[arg-type]
        return formula

    return register


def sigma(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def some(of: Callable[[Step], Tensor]) -> Question:
    return lambda step: bool(of(step).any())


# -- reward models ---------------------------------------------------------------------------------------------


@loss("bradley_terry", uses_reference=False)
def bradley_terry(step: Step) -> Tensor:
    """Ouyang et al. 2022, eq. 1, for two answers of a prompt."""
    return -logsigmoid(step.margin(step.scalar)).mean()


# -- KTO and its arms: rows by themselves, against z0 ---------------------------------------------------------


def kl(step: Step, of_rows: Tensor) -> Tensor:
    """Mean over the mismatched rows, not below 0, without gradient."""
    return of_rows[step.mismatched].detach().mean().clamp(min=0)


def over_rows(step: Step, u: Tensor, desirable: Callable[[Tensor], Tensor], undesirable: Callable) -> Tensor:
    """Mean over the step's rows of one function of u = r - z0 for desirable rows, another for undesirable ones."""
    good, bad = u[step.train & step.desirable], u[step.train & ~step.desirable]
    return torch.cat([desirable(good), undesirable(bad)]).mean()


KTO_REACHES = {
    "z0 above 0": lambda step: bool(kl(step, step.r) > 1e-2),
    "z0 clamped": lambda step: bool(step.r[step.mismatched].mean() < -1e-2),
}


@loss("kto", "kto_one_y_per_x", data="rows", reaches=KTO_REACHES)
def kto(step: Step) -> Tensor:
    """Ethayarajh et al., ICML 2024, eq. 8, lambda_D = lambda_U = 1."""
    u = BETA * (step.r - kl(step, step.r))
    return over_rows(step, u, lambda u: 1 - sigma(u), lambda u: 1 - sigma(-u))


@loss("kto_log_sigmoid", data="rows")
def kto_log_sigmoid(step: Step) -> Tensor:
    u = BETA * (step.r - kl(step, step.r))
    return over_rows(step, u, lambda u: -logsigmoid(u), lambda u: -logsigmoid(-u))


@loss("kto_identity", data="rows")
def kto_identity(step: Step) -> Tensor:
    u = BETA * (step.r - kl(step, step.r))
    return over_rows(step, u, lambda u: -u, lambda u: u)


@loss("kto_kahneman_tversky", data="rows")
def kto_kahneman_tversky(step: Step) -> Tensor:
    """x^.88 for gains, -2.25 (-x)^.88 for losses, smoothed at 0 by 1e-3 on either side; at 0 the slope of gains."""

    def value(x: Tensor) -> Tensor:
        size = (x.abs() + 1e-3) ** 0.88 - 1e-3**0.88
        # |x| has no slope at 0 in torch; the first step has nothing but zeros.
        gain = (torch.where(x >= 0, x, 0) + 1e-3) ** 0.88 - 1e-3**0.88
        return torch.where(x >= 0, gain, -2.25 * size)

    u = BETA * (step.r - kl(step, step.r))
    return over_rows(step, u, lambda u: -value(u), lambda u: -value(-u))


@loss("kto_no_reference_model", data="rows", uses_reference=False)
def kto_no_reference_model(step: Step) -> Tensor:
    u = BETA * (step.logp - step.logp[step.mismatched].detach().mean())
    return over_rows(step, u, lambda u: 1 - sigma(u), lambda u: 1 - sigma(-u))


@loss("kto_zero_reference", "apo_zero_unpaired", data="rows")
def kto_zero_reference(step: Step) -> Tensor:
    """D'Oosterlinck et al. 2024, eq. 7, on rows instead of pairs, is KTO with z0 = 0."""
    return over_rows(step, BETA * step.r, lambda u: 1 - sigma(u), sigma)


@loss("bco", data="rows", has_history=True)
def bco(step: Step, past: Sequence[Step]) -> Tensor:
    """Jung et al. 2024, section 4: the shift is the mean of all rows' rewards so far, this step's included."""
    delta = torch.cat([s.r[s.train].detach() for s in [*past, step]]).mean()
    return over_rows(step, BETA * (step.r - delta), lambda u: -logsigmoid(u), lambda u: -logsigmoid(-u))


# -- DPO and what compares the two completions of a pair -------------------------------------------------------


@loss("dpo")
def dpo(step: Step) -> Tensor:
    """Rafailov et al. 2023, eq. 7."""
    return -logsigmoid(BETA * step.margin(step.r)).mean()


@loss("dpo_length_normalised")
def dpo_length_normalised(step: Step) -> Tensor:
    return -logsigmoid(BETA * step.margin(step.r / step.length)).mean()


@loss("cdpo")
def cdpo(step: Step) -> Tensor:
    """Mitchell 2023, epsilon = .1."""
    x = BETA * step.margin(step.r)
    return (-0.9 * logsigmoid(x) - 0.1 * logsigmoid(-x)).mean()


@loss("robust_dpo")
def robust_dpo(step: Step) -> Tensor:
    """Chowdhury et al. 2024, eq. 12, epsilon = .1."""
    x = BETA * step.margin(step.r)
    return ((-0.9 * logsigmoid(x) + 0.1 * logsigmoid(-x)) / 0.8).mean()


@loss(
    "hinge",
    reaches={
        "inside": some(lambda s: BETA * s.margin(s.r) < 0.9),
        "beyond the margin": some(lambda s: BETA * s.margin(s.r) > 1.1),
    },
)
def hinge(step: Step) -> Tensor:
    """RSO, Liu et al. 2023, eq. 10."""
    return torch.relu(1 - BETA * step.margin(step.r)).mean()


@loss("ipo")
def ipo(step: Step) -> Tensor:
    """Azar et al. 2023, eq. 17, tau = .1."""
    return (step.margin(step.r) - 1 / (2 * 0.1)).square().mean()


@loss("ipo_length_normalised")
def ipo_length_normalised(step: Step) -> Tensor:
    return (step.margin(step.r / step.length) - 1 / (2 * 0.1)).square().mean()


@loss("exo_pair")
def exo_pair(step: Step) -> Tensor:
    """Ji et al. 2024, eq. 16, epsilon = .001: KL of (sigma(x), sigma(-x)) from (1 - epsilon, epsilon)."""
    x = BETA * step.margin(step.r)
    return (sigma(x) * (logsigmoid(x) - log(1 - 1e-3)) + sigma(-x) * (logsigmoid(-x) - log(1e-3))).mean()


@loss("discopop")
def discopop(step: Step) -> Tensor:
    """Lu et al. 2024, eq. 5, tau = .05: a blend of the logistic and the exponential loss."""
    x = BETA * step.margin(step.r)
    blend = sigma(x / 0.05)
    return (-(1 - blend) * logsigmoid(x) + blend * torch.exp(-x)).mean()


@loss("dpo_forward_kl")
def dpo_forward_kl(step: Step) -> Tensor:
    """Wang et al. 2023: f'(t) of forward KL, -1 / t."""
    return -logsigmoid(BETA * step.margin(-torch.exp(-step.r))).mean()


@loss("dpo_jensen_shannon")
def dpo_jensen_shannon(step: Step) -> Tensor:
    """Wang et al. 2023: f'(t) of Jensen-Shannon, log(2t / (1 + t))."""
    return -logsigmoid(BETA * step.margin(logsigmoid(step.r))).mean()


@loss("dpo_alpha")
def dpo_alpha(step: Step) -> Tensor:
    """Wang et al. 2023: f'(t) of the alpha-divergence, alpha = .5, without its constants: t^(alpha-1) / (alpha-1)."""
    return -logsigmoid(BETA * step.margin(torch.exp(-0.5 * step.r) / -0.5)).mean()


@loss("aot")
def aot(step: Step) -> Tensor:
    """Melnyk et al. 2024, paired: sorted margins of the policy against sorted margins of the reference."""
    policy, _ = step.margin(step.policy.sum(1)).sort()
    reference, _ = step.margin(step.reference.sum(1)).sort()
    return -logsigmoid(BETA * (policy - reference)).mean()


@loss("aot_unpaired")
def aot_unpaired(step: Step) -> Tensor:
    """Melnyk et al. 2024, unpaired: sorted rewards of chosen rows against sorted rewards of rejected ones."""
    chosen, rejected = step.chosen_and_rejected(step.r)
    return -logsigmoid(BETA * (chosen.sort().values - rejected.sort().values)).mean()


# -- pairs whose completions are judged one by one, against 0 --------------------------------------------------


@loss("bco_pair")
def bco_pair(step: Step) -> Tensor:
    chosen, rejected = step.chosen_and_rejected(BETA * step.r)
    return (-logsigmoid(chosen) - logsigmoid(-rejected)).mean()


@loss("nca_pair")
def nca_pair(step: Step) -> Tensor:
    """Chen et al. 2024, eq. 9, for two completions of rewards 1 and 0."""
    chosen, rejected = step.chosen_and_rejected(BETA * step.r)
    return (-logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)).mean()


@loss("apo_zero")
def apo_zero(step: Step) -> Tensor:
    """D'Oosterlinck et al. 2024, eq. 7."""
    chosen, rejected = step.chosen_and_rejected(BETA * step.r)
    return (1 - sigma(chosen) + sigma(rejected)).mean()


@loss("apo_down")
def apo_down(step: Step) -> Tensor:
    """D'Oosterlinck et al. 2024, eq. 8."""
    chosen, rejected = step.chosen_and_rejected(BETA * step.r)
    return (sigma(chosen) + 1 - sigma(chosen - rejected)).mean()


@loss("sppo_hard")
def sppo_hard(step: Step) -> Tensor:
    """Wu et al. 2024, eq. 4.7, with P = 1 for the chosen and 0 for the rejected one."""
    chosen, rejected = step.chosen_and_rejected(step.r)
    return ((chosen - 0.5 / BETA).square() + (rejected + 0.5 / BETA).square()).mean()


# -- without a reference model ---------------------------------------------------------------------------------


@loss(
    "slic",
    uses_reference=False,
    reaches={
        "inside": some(lambda s: s.margin(s.logp) < 0.9),
        "beyond the margin": some(lambda s: s.margin(s.logp) > 1.1),
    },
)
def slic(step: Step) -> Tensor:
    """Zhao et al. 2023, eq. 1, delta = 1, with the regulariser -log p(chosen) at .1."""
    chosen, rejected = step.chosen_and_rejected(step.logp)
    return (torch.relu(1 - chosen + rejected) - 0.1 * chosen).mean()


@loss("simpo", uses_reference=False)
def simpo(step: Step) -> Tensor:
    """Meng et al. 2024, eq. 6, beta = 2, gamma = 1."""
    return -logsigmoid(2 * step.margin(step.logp / step.length) - 1).mean()


@loss("cpo", uses_reference=False)
def cpo(step: Step) -> Tensor:
    """Xu et al. 2024, eq. 3 and 5."""
    return -logsigmoid(BETA * step.margin(step.logp)).mean() + step.nll_per_token(step.desirable)


@loss("cpo_simpo", uses_reference=False)
def cpo_simpo(step: Step) -> Tensor:
    return simpo(step) + step.nll_per_token(step.desirable)


@loss("orpo", uses_reference=False)
def orpo(step: Step) -> Tensor:
    """Hong et al. 2024, eq. 6, lambda = .1."""
    p = torch.exp(step.logp / step.length)
    ratio = step.margin(torch.log(p / (1 - p)))
    return step.nll_per_token(step.desirable) - 0.1 * logsigmoid(ratio).mean()


@loss("sft", data="rows", uses_reference=False, imitates=True)
def sft(step: Step) -> Tensor:
    return step.nll_per_token(step.desirable)


@loss("csft", data="rows", uses_reference=False, control=("<|good|>", "<|bad|>"))
def csft(step: Step) -> Tensor:
    return step.nll_per_token(torch.ones_like(step.desirable))


@loss("unlikelihood", data="rows", uses_reference=False)
def unlikelihood(step: Step) -> Tensor:
    """Welleck et al. 2019, eq. 4, on the undesirable completions, beside the likelihood of the desirable ones."""
    bad = step.mask & (step.train & ~step.desirable)[:, None]
    return step.nll_per_token(step.desirable) - torch.log(1 - torch.exp(step.policy[bad])).mean()


# -- tokens as outcomes ----------------------------------------------------------------------------------------


def clipped(step: Step, advantage: Tensor) -> Tensor:
    """-min(A p, A clip(p, .8, 1.2)) with p = pi_theta / pi_ref of each token, mean over the tokens of all rows."""
    ratio = torch.exp(step.token_ratio)
    a = advantage[:, None].expand_as(ratio)
    of_tokens = -torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2))
    return of_tokens[step.mask & step.train[:, None]].mean()


def tokens_beyond(clip: float, desirable: bool) -> Question:
    def found(step: Step) -> bool:
        rows = step.train & (step.desirable == desirable)
        ratios = torch.exp(step.token_ratio[rows])[step.mask[rows]]
        return bool((ratios > clip).any() if clip > 1 else (ratios < clip).any())

    return found


CLIP_REACHES = {
    f"a token of a row that is {'' if good else 'un'}desirable {'above' if clip > 1 else 'below'} {clip}": (
        tokens_beyond(clip, good)
    )
    for good in (True, False)
    for clip in (0.8, 1.2)
}


@loss("ppo_clip", data="rows", reaches=CLIP_REACHES)
def ppo_clip(step: Step) -> Tensor:
    """Schulman et al. 2017, eq. 7, with A = 1 for desirable rows and -1 for undesirable ones."""
    return clipped(step, torch.where(step.desirable, 1.0, -1.0))


def advantage(step: Step) -> Tensor:
    """(s - mean) / (standard deviation + .01) among the rows of a prompt."""
    score, found = step.score, torch.zeros_like(step.score)
    for prompt in step.prompt.unique():
        group = (step.prompt == prompt) & step.train
        found[group] = (score[group] - score[group].mean()) / (score[group].std(correction=0) + 0.01)
    return found


@loss(
    "grpo",
    data="groups",
    reaches={
        **CLIP_REACHES,
        "a group of one class": some(lambda s: advantage(s) == 0),
        "a group of unequal classes": some(lambda s: advantage(s) > 1.2),
    },
)
def grpo(step: Step) -> Tensor:
    """Shao et al. 2024, eq. 3 and 4, offline: the reference is the old policy, .04 on the KL estimate."""
    ratio = step.token_ratio[step.mask & step.train[:, None]]
    return clipped(step, advantage(step)) + 0.04 * (torch.exp(-ratio) + ratio - 1).mean()


# -- references that move --------------------------------------------------------------------------------------


def every_second_step(mix: float) -> Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]:
    """After optimizer steps 2, 4, ...: reference = mix * policy + (1 - mix) * reference."""

    def follow(weights: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        reference = weights[0]
        for done in range(2, len(weights), 2):
            reference = {name: mix * weights[done][name] + (1 - mix) * reference[name] for name in reference}
        return reference

    return follow


def human(step: Step) -> Tensor:
    """Each token's log-ratio kept within (-1, 1.5), summed."""
    return step.token_ratio.clamp(-1.0, 1.5).sum(1)


HUMANLINE_REACHES = {
    "a token below -1": some(lambda s: s.token_ratio < -1),
    "a token above 1.5": some(lambda s: s.token_ratio > 1.5),
}


@loss("humanline_dpo", reference=every_second_step(1.0), reaches=HUMANLINE_REACHES)
def humanline_dpo(step: Step) -> Tensor:
    return -logsigmoid(BETA * step.margin(human(step))).mean()


@loss("humanline_kto", data="rows", reference=every_second_step(1.0), reaches=HUMANLINE_REACHES | KTO_REACHES)
def humanline_kto(step: Step) -> Tensor:
    u = BETA * (human(step) - kl(step, human(step)))
    return over_rows(step, u, lambda u: 1 - sigma(u), lambda u: 1 - sigma(-u))


loss("tr_dpo", reference=every_second_step(0.6))(dpo)
