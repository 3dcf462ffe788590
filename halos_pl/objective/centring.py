"""Whether a learned reward has to be centred."""

from __future__ import annotations

from halos_pl.objective.baselines import Centring
from halos_pl.objective.halo import HALO, Objective


def senseless_clamp(objective: Objective) -> str | None:
    """Why a reference point should not be clamped at 0, in one line; None if it is not, or may be.

    Only the log-ratio of policy and reference has a mean that estimates a KL divergence, which is never negative.
    """
    for term in objective.modules():
        if isinstance(term, HALO) and term.reward.needs.scalar and getattr(term.reference_point, "clamp", False):
            name, reward = type(term.reference_point).__name__, type(term.reward).__name__
            return f"{name} clamps its mean at 0, but the mean of {reward} may be negative; set its clamp to false"
    return None


def needs_centring(objective: Objective) -> str | None:
    """Why the rewards of an objective should be centred, in one line; None if they need not be.

    A reference point that compares prompts reads the part of the reward that preferences leave open.
    """
    if any(isinstance(module, Centring) and module.weight > 0 for module in objective.modules()):
        return None
    for term in objective.modules():
        if isinstance(term, HALO) and term.reward.needs.scalar and not term.reference_point.within_prompt:
            reward, reference_point = type(term.reward).__name__, type(term.reference_point).__name__
            return (
                f"preferences determine the reward {reward} only up to a function of the prompt, but the reference"
                f" point {reference_point} compares different prompts; add {{class_path: Centring}} to"
                " model.extra_terms, with a weight above 0, or choose PairedCompletion"
            )
    return None
