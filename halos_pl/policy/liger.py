"""Liger's Triton kernels for the layers of a model: normalisation, rotary positions and gated feed-forward parts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from halos_pl.policy.architecture import base_model
from halos_pl.policy.spec import ModelError

_SETTING = "model.policy.liger is true, but"


def check_liger(device: torch.device) -> None:
    """Refuses Liger's kernels where they cannot run, before anything is loaded.

    Args:
        device: Device that the model will run on.

    Raises:
        ModelError: if that is not a GPU, or liger-kernel is not installed.
    """
    if device.type != "cuda":
        raise ModelError(
            f"{_SETTING} its Triton kernels run only on a GPU, and this model runs on {device.type}; set it to false"
        )
    if find_spec("liger_kernel") is None:
        raise ModelError(f"{_SETTING} liger-kernel is not installed; run pip install 'halos_pl[liger]'")


def apply_liger(model: nn.Module) -> None:
    """Replaces the layers' normalisation, rotary positions and feed-forward parts by Liger's kernels, in place.

    Its losses are left out: log-probs come from ``halos_pl.policy.head``, which keeps no logits either. The function
    for rotary positions is that of the whole architecture, so other models of the same type in this process use it too.

    Args:
        model: Causal language model of transformers on a GPU, or a peft model around one.

    Raises:
        ModelError: as in :func:`check_liger`, or if Liger has no kernels for the model's architecture.
    """
    base = base_model(model)
    check_liger(base.device)
    try:
        # transformers itself calls these two names in its integration, which only logs what it cannot apply.
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # Triton may find no driver or compiler
        raise ModelError(
            f"{_SETTING} liger-kernel cannot be imported ({type(error).__name__}: {error}); set it to false"
        ) from error
    kind: Any = base.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"{_SETTING} Liger has no kernels for models of type {kind}; set it to false")
    _apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
