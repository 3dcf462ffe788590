"""The losses of the last two years, written out as in ``formulas``; importing this file registers them there.

Some are published as a gradient: a number without gradient times log pi. Their formulas here have that gradient, and
its integral as their value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import e, exp, expm1, gamma, log

import torch
from formulas import BETA, LOSSES, Shares, Step, Weights, advantage, every_second_step, loss, over_rows, sigma, some
from torch import Tensor
from torch.nn.functional import logsigmoid

#: The losses of ``formulas``.
OLDER = frozenset(LOSSES)


def bad_rows(step: Step, of_rows: Tensor) -> Tensor:
    """Sum over the undesirable rows, divided by the number of all rows."""
    return of_rows[step.train & ~step.desirable].sum() / step.train.sum()


@loss("npo", data="rows")
def npo(step: Step) -> Tensor:
    """Zhang et al. 2024, eq. 3; desirable rows count in the mean only."""
    return bad_rows(step, 2 / BETA * torch.log(1 + torch.exp(step.r) ** BETA))


@loss("simnpo", data="rows", uses_reference=False)
def simnpo(step: Step) -> Tensor:
    """Fan et al. 2024, eq. 5, beta = .1, gamma = 0."""
    return bad_rows(step, -2 / BETA * logsigmoid(-BETA * step.logp / step.length))


@loss("kto_surprisal", data="rows", uses_reference=False)
def kto_surprisal(step: Step) -> Tensor:
    mean = step.logp / step.length
    u = BETA * (mean - mean[step.mismatched].detach().mean())
    return over_rows(step, u, lambda u: 1 - sigma(u), lambda u: 1 - sigma(-u))


# -- pairs -----------------------------------------------------------------------------------------------------


@loss("tpo", data="triples", uses_reference=False)
def tpo(step: Step) -> Tensor:
    """Saeidi et al. 2024, beta = .01; the likelihood is a mean over the tokens of the gold answers, as in TRL."""
    of_gold = step.policy[step.gold].sum() / step.length[step.gold].sum()
    return -logsigmoid(0.01 * step.margin(step.logp)).mean() - of_gold


@loss("simper", uses_reference=False)
def simper(step: Step) -> Tensor:
    """Xiao et al. 2025, eq. 7."""
    return -step.margin(torch.exp(step.logp / step.length)).mean()


@loss(
    "repo",
    uses_reference=False,
    reaches={
        "inside": some(lambda s: s.margin(s.logp / s.length) < 0.4),
        "beyond the margin": some(lambda s: s.margin(s.logp / s.length) > 0.6),
    },
)
def repo(step: Step) -> Tensor:
    """Wu et al. 2025, eq. 6, gamma = .5."""
    return torch.relu(0.5 - step.margin(step.logp / step.length)).mean()


@loss("mpo")
def mpo(step: Step) -> Tensor:
    """Wang et al. 2024, eq. 5, with weights .8, .2 and 1."""
    chosen, rejected = step.chosen_and_rejected(BETA * step.r)
    preference, quality = -logsigmoid(chosen - rejected), -logsigmoid(chosen) - logsigmoid(-rejected)
    return (0.8 * preference + 0.2 * quality).mean() + step.nll_per_token(step.desirable)


@loss("dpo_sigmoid")
def dpo_sigmoid(step: Step) -> Tensor:
    return -sigma(BETA * step.margin(step.r)).mean()


@loss("alphapo", uses_reference=False)
def alphapo(step: Step) -> Tensor:
    """Gupta et al. 2025, eq. 6, alpha = .25, beta = 2, gamma = 1."""
    p = torch.exp(step.logp / step.length)
    return -logsigmoid(2 * step.margin((1 - p**-0.25) / 0.25) - 1).mean()


@loss("ld_dpo", reaches={"a longer chosen completion": some(lambda s: s.margin(s.length) > 0)})
def ld_dpo(step: Step) -> Tensor:
    """Liu et al. 2024, eq. 10, alpha = .5, in policy and reference."""
    ratios = step.token_ratio
    short = torch.minimum(step.length, step.length[step.pair])[:, None]
    place = torch.arange(ratios.shape[1])[None, :]
    shared = torch.where(place < short, ratios, 0).sum(1)
    return -logsigmoid(BETA * step.margin(0.5 * step.r + 0.5 * shared)).mean()


@loss("alpha_dpo")
def alpha_dpo(step: Step) -> Tensor:
    """Wu et al. 2025, eq. 12, beta = 2.5, gamma = .3, alpha = .05, normalised over the pairs of the step."""
    gap = step.margin(step.r / step.length).detach()
    alike = len(gap) == 1 or bool((gap == 0).all())
    z = torch.zeros_like(gap) if alike else (gap - gap.mean()) / gap.std()
    return -logsigmoid(2.5 * (step.margin(step.logp / step.length) - 0.3 - 0.05 * z)).mean()


@loss("gamma_po", uses_reference=False, idle=("iterations",))  # it has converged
def gamma_po(step: Step) -> Tensor:
    """Sun et al. 2025, eq. 8, beta = 2, a mean margin of .5 nats, tau = 10: 20 multiplicative steps."""
    gap = 2 * step.margin(step.logp / step.length)
    n, total = len(gap), 2 * 0.5
    p = torch.full_like(gap, 1 / n).detach()
    for _ in range(20):
        slope = total * n / (1 + torch.exp(gap.detach() - total * n * p)) / n + 10 * (1 + torch.log(n * p))
        p = p * torch.exp(-0.05 * slope)
        p = p / p.sum()
    return -logsigmoid(gap - total * n * p).mean()


@loss("wpo", faint=True)
def wpo(step: Step) -> Tensor:
    """Zhou et al. 2024, eq. 2."""
    chosen, rejected = step.chosen_and_rejected(torch.exp(step.logp / step.length).detach())
    return -(chosen * rejected * logsigmoid(BETA * step.margin(step.r))).mean()


@loss("beta_dpo", has_history=True)
def beta_dpo(step: Step, past: Sequence[Step]) -> Tensor:
    """Wu et al. 2024, eq. 8, alpha = .6; the running mean has momentum .9, starts from 0 and includes this step."""
    average = 0.0
    for each in [*past, step]:
        gap = each.margin(each.r).detach().mean()
        average = 0.9 * average + 0.1 * gap
    return -logsigmoid(BETA * (1 + 0.6 * (gap - average)).clamp(min=0.01) * step.margin(step.r)).mean()


# -- scores ----------------------------------------------------------------------------------------------------


def past_policies(weights: Sequence[Weights]) -> Shares:
    """A third of the start and the mean of the two last of the policies after steps 0, 0, 2, 4, ..."""
    past = [weights[0], weights[0], *weights[2::2]]
    return [(0.3333, weights[0]), *((0.6667 / 2, each) for each in past[-2:])]


@loss("mnpo", reference=past_policies)
def mnpo(step: Step) -> Tensor:
    """arXiv 2509.23102, eta = .0075."""
    return (step.margin(step.r) - 1 / (2 * 0.0075)).square().mean()


@loss("rebel", data="scored_pairs", idle=("label_smoothing",))  # the square is the same from both sides
def rebel(step: Step) -> Tensor:
    """Gao et al. 2024, eq. 6, eta = 1."""
    return (step.margin(step.r) - step.margin(step.score)).square().mean()


@loss("madpo", data="scored_pairs")
def madpo(step: Step) -> Tensor:
    """Rho 2025: c from 2 to .5, tau = 2, lambda = 1."""
    h = step.margin(step.score)
    c = 0.5 + 1.5 / (1 + 1 / 0.5 * torch.exp(h.abs() - 2))
    weight = torch.where(h > -2, sigma(c * h) / sigma(h), 1.0)
    return -(weight * logsigmoid(BETA * step.margin(step.r))).mean()


def by_prompt(step: Step, of_group: Callable[[Tensor], Tensor]) -> Tensor:
    """The numbers that ``of_group`` gives the rows of each prompt, from their positions; [n], 0 for mismatched rows."""
    found = torch.zeros_like(step.r)
    for prompt in step.prompt[step.train].unique():
        group = ((step.prompt == prompt) & step.train).nonzero().squeeze(1)
        found = found.index_put((group,), of_group(group))
    return found


@loss("dro", data="scored")
def dro(step: Step) -> Tensor:
    """Richemond et al. 2024, eq. 4, tau = 1, with the mean score of a prompt as its value."""
    value = by_prompt(step, lambda group: step.score[group].mean().expand(len(group)))
    return (step.score - value - step.r)[step.train].square().mean() / 2


@loss("astar_po", data="scored")
def astar_po(step: Step) -> Tensor:
    """Brantley et al. 2025, eq. 3 and 4, beta_1 = .5, beta_2 = .1."""
    value = by_prompt(step, lambda group: 0.5 * torch.exp(step.score[group] / 0.5).mean().log().expand(len(group)))
    return (BETA * step.r - (step.score - value))[step.train].square().mean()


@loss("qrpo", data="scored")
def qrpo(step: Step) -> Tensor:
    """Matrenok et al. 2025, eq. 12: quantiles among the prompt's rows, ties in the middle."""

    def quantile(group: Tensor) -> Tensor:
        score = step.score[group]
        return torch.stack([((score < s).double() + 0.5 * (score == s).double()).mean() for s in score])

    z = BETA * expm1(1 / BETA)
    return (by_prompt(step, quantile) - BETA * log(z) - BETA * step.r)[step.train].square().mean()


@loss("infonca", data="scored")
def infonca(step: Step) -> Tensor:
    """Chen et al. 2024, eq. 6: the cross-entropy of two softmaxes, mean over prompts."""

    def cross(group: Tensor) -> Tensor:
        return -step.score[group].softmax(0) * (BETA * step.r[group]).log_softmax(0)

    return by_prompt(step, cross).sum() / len(step.prompt[step.train].unique())


@loss("plackett_luce", data="scored")
def plackett_luce(step: Step) -> Tensor:
    """Rafailov et al. 2023, appendix A.3: each row against those of no higher score; mean over prompts."""

    def ranked(group: Tensor) -> Tensor:
        score, r = step.score[group], BETA * step.r[group]
        return torch.stack([torch.logsumexp(r[score <= s], 0) - x for s, x in zip(score, r, strict=True)])

    return by_prompt(step, ranked).sum() / len(step.prompt[step.train].unique())


# -- advantages, per completion or per token -------------------------------------------------------------------


def both_signs(step: Step, good: Tensor, bad: Tensor) -> Tensor:
    """-A times ``good`` for rows of positive advantage and ``bad`` for the others; [n] or [n, T]."""
    a = advantage(step)
    a = a if good.dim() == 1 else a[:, None]
    return -a * torch.where(a > 0, good, bad)


def over_tokens(step: Step, of_tokens: Tensor) -> Tensor:
    return of_tokens[step.mask & step.train[:, None]].sum() / step.length[step.train].sum()


def gspo_rows(step: Step) -> Tensor:
    ratio = torch.exp(step.r / step.length)
    return both_signs(step, ratio.clamp(max=1.0004), ratio.clamp(min=0.9997))


@loss("gspo", data="groups")
def gspo(step: Step) -> Tensor:
    """Zheng et al. 2025, eq. 5."""
    return gspo_rows(step)[step.train].mean()


@loss("luspo", data="groups")
def luspo(step: Step) -> Tensor:
    return (gspo_rows(step) * step.length)[step.train].mean()


@loss("gmpo", data="groups")
def gmpo(step: Step) -> Tensor:
    """Zhao et al. 2025, eq. 4: tokens clamped at e^.4 or e^-.4 before the geometric mean."""
    high, low = (
        bounded.sum(1) / step.length for bounded in (step.token_ratio.clamp(max=0.4), step.token_ratio.clamp(min=-0.4))
    )
    return both_signs(step, torch.exp(high), torch.exp(low))[step.train].mean()


@loss("sapo", data="groups")
def sapo(step: Step) -> Tensor:
    """Gao et al. 2025, eq. 5, temperatures 1 and 1.05: a mean over rows of means over tokens."""
    ratio = torch.exp(step.token_ratio)
    good, bad = (4 / t * sigma(t * (ratio - 1)) for t in (1.0, 1.05))
    of_rows = torch.where(step.mask, both_signs(step, good, bad), 0).sum(1) / step.length
    return of_rows[step.train].mean()


def surrogate(weight: Tensor, log_prob: Tensor, integral: Tensor) -> Tensor:
    """The gradient of ``weight`` (constant) times ``log_prob``, with the value of the integral of ``weight``."""
    moving = weight.detach() * log_prob
    return integral.detach() + moving - moving.detach()


def capped(ratio: Tensor, cap: float) -> Tensor:
    """The integral of min(e^u, cap) at u = log ratio."""
    return torch.where(ratio < cap, ratio, cap * torch.log(e * ratio / cap))


@loss("cispo", data="groups")
def cispo(step: Step) -> Tensor:
    """MiniMax 2025, eq. 4, with the ratio capped at 5."""
    ratio = torch.exp(step.token_ratio)
    of_tokens = surrogate(ratio.clamp(max=5.0), step.policy, capped(ratio, 5.0))
    return over_tokens(step, both_signs(step, of_tokens, of_tokens))


@loss("vespo", data="groups")
def vespo(step: Step) -> Tensor:
    """Shen et al. 2026: e^lambda w^k e^(-lambda w), per completion; divided by the number of tokens."""
    w = torch.exp(step.r)

    def of(k: float, rate: float) -> Tensor:
        start = torch.special.gammainc(torch.tensor(k).double(), torch.tensor(rate).double())
        below = torch.special.gammainc(torch.full_like(w, k), rate * w.detach()) - start
        return surrogate(exp(rate) * w**k * torch.exp(-rate * w), step.logp, exp(rate) * rate**-k * gamma(k) * below)

    return both_signs(step, of(2.0, 3.0), of(3.0, 2.0))[step.train].sum() / step.length[step.train].sum()


@loss("dppo_tv", data="groups")
def dppo_tv(step: Step) -> Tensor:
    """Qi et al. 2026: tokens whose probability moved by at most .2 in the direction of the advantage."""
    ratio, moved = torch.exp(step.token_ratio), step.policy.exp() - step.reference.exp()
    sides = []
    for sign in (1, -1):
        free = sign * moved <= 0.2
        held = torch.where(free, ratio, (step.reference.exp() + sign * 0.2).clamp(min=0) / step.reference.exp())
        sides.append(surrogate(ratio.clamp(max=20.0) * free, step.policy, capped(held, 20.0)))
    return over_tokens(step, both_signs(step, *sides))


def hard_clip(step: Step, ratio: Tensor) -> Tensor:
    return both_signs(step, ratio.clamp(max=1.2), ratio.clamp(min=0.8))


_BEYOND_THE_CLIP = (  # where the ratio is clipped already
    "value_function.init_args.high",
    "extra_terms.0.init_args.value_function.init_args.low",
)


@loss("humanline_grpo", data="groups", reference=every_second_step(1.0), idle=_BEYOND_THE_CLIP)
def humanline_grpo(step: Step) -> Tensor:
    """Token log-ratios within (-1, 1.5), then PPO's clip; .04 on the KL estimate."""
    ratio = step.token_ratio
    penalty = torch.exp(-ratio) + ratio - 1
    return over_tokens(step, hard_clip(step, torch.exp(ratio.clamp(-1.0, 1.5))) + 0.04 * penalty)


@loss("fipo", data="groups")
def fipo(step: Step) -> Tensor:
    """arXiv 2603.19835: half-life 32 tokens, weights within [1, 1.2]."""
    ahead = torch.zeros_like(step.token_ratio)
    running = torch.zeros(len(step.r), dtype=torch.float64)
    for t in reversed(range(ahead.shape[1])):
        running = 2 ** (-1 / 32) * running + torch.where(step.mask[:, t], step.token_ratio[:, t].detach(), 0.0)
        ahead[:, t] = running
    return over_tokens(step, ahead.exp().clamp(1.0, 1.2) * hard_clip(step, torch.exp(step.token_ratio)))


@loss(
    "real",
    data="groups",
    reaches={"several of one class": lambda step: bool((of_one_class(step) > 1).any())},
)
def real(step: Step) -> Tensor:
    """arXiv 2602.05630, tau = .5: a prompt at a time; without both classes, a prompt has no loss."""
    prompts = step.prompt[step.train].unique()
    total = torch.zeros((), dtype=step.policy.dtype)
    for prompt in prompts:
        good, bad = (step.train & (step.prompt == prompt) & side for side in (step.desirable, ~step.desirable))
        if good.any() and bad.any():
            s = step.r / step.length / 0.5
            total = total + torch.log1p(torch.exp(-s[good]).sum()) + torch.log1p(torch.exp(s[bad]).sum())
    return total / len(prompts)


def of_one_class(step: Step) -> Tensor:
    """Number of rows of the prompt and class of each row, [n]."""
    same = (step.prompt[:, None] == step.prompt) & (step.desirable[:, None] == step.desirable) & step.train
    return same.sum(1)
