"""Losses that a model's config asks for beside the one that is trained."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from halos_pl.policy.loading import base_model

#: Of a mixture of experts: whether the router's loss is wanted, and what it is multiplied with.
_ROUTER = "output_router_logits"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "z_loss_coefficient")


def warn_of_ignored_losses(model: nn.Module) -> None:
    """Says which auxiliary losses transformers would add in training, and an objective does not.

    Such as the load balancing of experts (Fedus et al. 2022, "Switch transformers", eq. 4).
    """
    config = base_model(model).config.get_text_config()
    found = [name for name in _COEFFICIENTS if getattr(config, name, None)]
    if not getattr(config, _ROUTER, False):
        found = [name for name in found if name.startswith("z_")]  # this one is added whether or not it is asked for
    if found:
        named = ", ".join(f"{name} {getattr(config, name):g}" for name in found)
        asked = f"{_ROUTER} true, " if getattr(config, _ROUTER, False) else ""
        rank_zero_warn(
            f"halos: the model's config asks for an auxiliary loss ({asked}{named}), which is not added: only the"
            " objective is trained. Watch the load of the experts, or train few steps at a small learning rate"
        )
