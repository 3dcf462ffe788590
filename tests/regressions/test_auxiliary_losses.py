"""An auxiliary loss that a model's config asks for is not ignored in silence: trl#1544."""

from __future__ import annotations

import warnings

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from halos_pl.policy.limits import warn_of_ignored_losses

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


def test_the_loss_of_a_router_is_named():
    def made(**options):
        return MixtralForCausalLM(MixtralConfig(num_key_value_heads=1, num_local_experts=2, **SMALL, **options))

    with pytest.warns(UserWarning, match=r"output_router_logits true, router_aux_loss_coef 0\.02"):
        warn_of_ignored_losses(made(output_router_logits=True, router_aux_loss_coef=0.02))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ignored_losses(made(output_router_logits=False))
        warn_of_ignored_losses(made(output_router_logits=True, router_aux_loss_coef=0.0))
