"""Several LoRA adapters, trained one on top of the other, as one adapter of their common base."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from peft import LoraConfig, PeftType, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from halos_pl.policy.adapters import BELOW
from halos_pl.policy.architecture import without_adapter
from halos_pl.policy.spec import ModelError

Weights = dict[str, Tensor]


def combine(model: Any, adapters: list[tuple[Any, Weights]], policy: Any) -> Any:
    """One adapter on ``model`` that is the sum of several LoRA adapters, applied in turn.

    W + s1 B1 A1 + s2 B2 A2 is W + [s1 B1, s2 B2] [A1; A2]. Layers with a lower rank are padded with zeros, so that all
    layers have the same rank and scale.

    Args:
        model: base model of all adapters.
        adapters: peft's configuration and the weights of each adapter; the last one was trained.
        policy: trained peft model; the earlier adapters are merged into its base.

    Returns:
        A peft model, with the weights of ``policy`` to within rounding.

    Raises:
        ModelError: the sum differs from ``policy``, because one of them is not a plain LoRA adapter.
    """
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for config, weights in adapters:
        for name, (a, b) in _factors(config, weights).items():
            factors.setdefault(name, []).append((a, b))
    stacked = {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
        for name, pairs in factors.items()
    }
    rank = max(a.shape[0] for a, _ in stacked.values())
    weights = {}
    for name, (a, b) in stacked.items():
        embedding = isinstance(model.get_submodule(name), nn.Embedding)
        keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        spare = rank - a.shape[0]
        weights[f"{BELOW}{name}.{keys[0]}"] = nn.functional.pad(a, (0, 0, 0, spare))
        weights[f"{BELOW}{name}.{keys[1]}"] = nn.functional.pad(b, (0, spare))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=_short(model, set(stacked)), task_type="CAUSAL_LM", inference_mode=True
    )
    combined: Any = get_peft_model(model, config)
    try:
        result: Any = set_peft_model_state_dict(combined, weights)
    except RuntimeError as error:  # sizes
        raise ModelError("one of them belongs to layers of another size, as after resizing the vocabulary") from error
    if result.unexpected_keys:
        raise ModelError(f"the adapters do not fit the model: {result.unexpected_keys[0]}")
    _check_sum(combined, policy)
    return combined


def _factors(config: Any, weights: Weights) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer, with the scale multiplied into B.

    Raises:
        ModelError: the adapter has other weights too.
    """
    if getattr(config, "use_dora", False):
        raise ModelError("one of them is a DoRA adapter, which also rescales the weights of its base")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        if key.endswith(".base_layer.weight"):
            continue  # peft also saves the adapted embedding or head; _check_sum finds a difference
        match = re.fullmatch(re.escape(BELOW) + r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
        if config.peft_type != PeftType.LORA or match is None:
            raise ModelError(f"one of type {PeftType(config.peft_type).value} contains {key.removeprefix(BELOW)}")
        parts.setdefault(match[1], {})[match[2]] = value.float()
    factors = {}
    for name, part in parts.items():
        rank = part["A"].shape[0]
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
        factors[name] = (part["A"], part["B"] * (alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    return factors


def _short(model: nn.Module, names: set[str]) -> list[str]:
    """The last parts of ``names`` if they match the same layers, for a readable config."""
    short = {name.rpartition(".")[2] for name in names}
    matches = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if matches == names else names)


@torch.no_grad()
def _check_sum(combined: Any, policy: Any) -> None:
    """Compares the adapted weights of two peft models, which finds anything else that an adapter changes."""

    def weight(model: Any, name: str) -> Tensor:
        place, _, what = name.rpartition(".")
        layer = model.get_base_model().get_submodule(place)
        value: Tensor = getattr(without_adapter(layer), what).float()
        adapted = isinstance(layer, LoraLayer) and what == "weight"
        return value + layer.get_delta_weight("default").float() if adapted else value

    rounding = max(5e-6, 4 * torch.finfo(next(policy.parameters()).dtype).eps)
    for name, _ in policy.get_base_model().named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        theirs, ours = weight(policy, name), weight(combined, name)
        if ours.shape != theirs.shape or float((ours - theirs).abs().max()) > rounding * float(theirs.abs().max()):
            raise ModelError(f"one of them changes {name} by something other than a low-rank sum")
