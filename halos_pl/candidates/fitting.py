"""Fits policies over candidates to votes with the package's own objectives, all seeds and rates in one batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from halos_pl.batch import Needs
from halos_pl.candidates.policy import Candidates
from halos_pl.candidates.reference_point import CandidateRows
from halos_pl.candidates.votes import Votes
from halos_pl.labels import Labels
from halos_pl.objective.halo import Objective, Result

#: Needs that no policy over candidates can meet, and what to do instead.
UNMET = {
    "mismatched": "completions of other prompts have probability 0 here; set reference_point to CandidateKL",
    "exact_kl": "set reference_point to CandidateKL, which is exact",
    "samples": "set reference_point to CandidateKL, which needs no samples",
    "routing": "there are no experts",
    "scores": "votes have no scores",
    "scalar": "there is no scalar head",
    "gold": "votes compare completions, and nobody compared a gold answer",
}
#: Most numbers in one tensor of all fits, which then stays in the processor's cache; more fits are done in turn.
MOST = 1 << 20


@dataclass(frozen=True)
class Fitted:
    """Policies after the last step.

    Attributes:
        theta: float [rates, fits, d].
        loss: float [rates, fits], the loss before the last step.
    """

    theta: Tensor
    loss: Tensor


def refuse(objective: Objective) -> None:
    """Refuses objectives that need what candidates do not have.

    Raises:
        ValueError: names the need and what to do.
    """
    for name in (field.name for field in fields(Needs)):
        if name in UNMET and getattr(objective.needs, name):
            raise ValueError(f"the objective needs {name}, which candidates do not have: {UNMET[name]}")
    v = getattr(objective.halo, "value_function", None)
    if v is not None and v(u := torch.linspace(-1, 1, 5)).shape != u.shape:
        raise ValueError(f"the value function {type(v).__name__} returns another shape than that of its argument")
    whole, parts = (_of_tokens(copy.deepcopy(objective), tokens) for tokens in (1, 2))
    if not torch.allclose(whole, parts, rtol=1e-9, atol=1e-12):
        raise ValueError(
            "the objective's loss depends on the number of tokens of a completion, but a candidate counts as a single"
            " token: leave out length_normalised, rewards per token and denominators of tokens"
        )


def _of_tokens(objective: Objective, tokens: int) -> Tensor:
    """The loss of two pairs of which one row of each class has ``tokens`` tokens; no log-prob depends on it."""
    logps = torch.tensor([[-1.0, -2.5], [-4.0, -0.5], [-3.0, -1.5], [-0.7, -2.2]], dtype=torch.float64)
    columns = logps.T[:, :, None].expand(2, 4, tokens).clone()
    mask = (torch.arange(tokens) == 0).repeat(4, 1)
    mask[[0, 3]] = True
    columns = torch.where(mask, columns / mask.sum(dim=1, keepdim=True), 0.0)
    place = torch.arange(4)
    labels = Labels(desirable=place % 2 == 0, pair=place ^ 1, group=place // 2)
    kl = logps.new_full((4,), 0.1)
    result: Result = objective(CandidateRows(columns[0], columns[1], mask, labels, prompt_kl=kl))
    return result.loss


def losses(objective: Objective | Sequence[Objective], candidates: Candidates, theta: Tensor, votes: Votes) -> Tensor:
    """The loss of each fit, float [fits], with the gradient of ``theta``.

    Args:
        objective: one for all fits, which are then computed at once; or one per fit, computed in turn.
        candidates: the policy's candidates.
        theta: float [fits, d].
        votes: of as many fits.
    """
    logps = candidates.logps(theta)
    group = votes.rows % candidates.prompts
    columns = (
        logps.flatten(1).gather(1, votes.rows),
        candidates.reference_logps.flatten()[votes.rows],
        candidates.kl(logps).gather(1, group),
        group,
    )

    def loss(judge: Objective, policy: Tensor, reference: Tensor, kl: Tensor, group: Tensor) -> Tensor:
        result: Result = judge(
            CandidateRows(
                policy_logps=policy[:, None],
                reference_logps=reference[:, None],
                mask=torch.ones(len(votes.desirable), 1, dtype=torch.bool),
                labels=votes.labels(group),
                prompt_kl=kl,
            )
        )
        return result.loss

    if isinstance(objective, Objective):
        every: Tensor = torch.vmap(lambda *of_fit: loss(objective, *of_fit))(*columns)
        return every
    return torch.stack([loss(judge, *of_fit) for judge, *of_fit in zip(objective, *columns, strict=True)])


def _at_once(objective: Objective, candidates: Candidates, votes: Votes) -> bool:
    """Whether torch can compute all fits of an objective at once: it has no state, and only takes vectorised steps."""
    if next(objective.buffers(), None) is not None or next(objective.parameters(), None) is not None:
        return False
    theta = candidates.reference_logps.new_zeros(1, candidates.dimension)
    try:
        losses(copy.deepcopy(objective), candidates, theta, Votes(votes.rows[:1], votes.desirable, votes.pair))
    except RuntimeError:  # of vmap; the objective's own come back without it
        return False
    return True


def fit(objective: Objective, candidates: Candidates, votes: Votes, *, rates: Sequence[float], steps: int) -> Fitted:
    """Trains a policy from pi_ref for each fit and learning rate: Adam on all of a fit's rows at once.

    A fit does not depend on the others.

    Args:
        objective: the loss; each fit gets a copy if it has a state.
        candidates: the policy's candidates.
        votes: rows of each fit.
        rates: learning rates.
        steps: number of steps.

    Raises:
        ValueError: the objective needs what candidates do not have (:data:`UNMET`), ``rates`` are empty or not above 0,
            or ``steps`` is below 1.
    """
    refuse(objective)
    if not rates or not all(rate > 0 for rate in rates) or steps < 1:
        raise ValueError(f"rates are {list(rates)} and steps {steps}; give rates above 0 and at least 1 step")
    largest = max(candidates.reference_logps.numel(), candidates.dimension, len(votes.desirable))
    size = max(1, MOST // (largest * len(rates)))
    at_once = _at_once(objective, candidates, votes)
    parts = [
        _fit(objective, candidates, Votes(rows, votes.desirable, votes.pair), rates, steps, at_once)
        for rows in votes.rows.split(size)
    ]
    return Fitted(torch.cat([part.theta for part in parts], 1), torch.cat([part.loss for part in parts], 1))


def _fit(
    objective: Objective, candidates: Candidates, votes: Votes, rates: Sequence[float], steps: int, at_once: bool
) -> Fitted:
    fits = len(votes.rows)
    every = Votes(votes.rows.repeat(len(rates), 1), votes.desirable, votes.pair)
    judges = objective if at_once else [copy.deepcopy(objective) for _ in every.rows]
    zero = candidates.reference_logps.new_zeros(fits, candidates.dimension)
    thetas = [zero.clone().requires_grad_() for _ in rates]
    optimizer = torch.optim.Adam([{"params": [theta], "lr": rate} for theta, rate in zip(thetas, rates, strict=True)])
    for _ in range(steps):
        loss = losses(judges, candidates, torch.cat(thetas), every)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return Fitted(torch.stack(thetas).detach(), loss.detach().view(len(rates), fits))
