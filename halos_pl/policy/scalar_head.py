"""A scalar per row: a linear head on the hidden state after the row's last token, as in reward models.

transformers calls a model with such a head a sequence classifier with one label. The run trains the head beside the
causal language model, so that prefix sharing, adapters and sharding work as for any other objective; the export joins
the two (see :func:`sequence_classifier`).
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from halos_pl.batch import TokenBatch
from halos_pl.policy.architecture import base_model, decoder_and_head, evaluating, text_config
from halos_pl.policy.self_test import rounding
from halos_pl.policy.spec import ModelError, reason


class RewardHead(nn.Module):
    """A linear map from hidden states to scalars, without bias.

    The weights are drawn from a normal distribution with the config's ``initializer_range``, like the heads of
    transformers' sequence classifiers. They depend on torch's initial seed, but not on how many random numbers have
    been drawn since.

    Args:
        model: Causal language model whose hidden states it reads.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        size = decoder_and_head(model)[1].weight.shape[1]
        deviation = getattr(text_config(model), "initializer_range", None) or 0.02
        draw = torch.Generator().manual_seed(torch.initial_seed())
        weight = torch.empty(1, size, dtype=torch.float32, device="cpu").normal_(0.0, deviation, generator=draw)
        self.weight = nn.Parameter(weight.to(next(model.parameters()).device))

    def forward(self, hidden: Tensor) -> Tensor:
        """The scalars float32 [m] of hidden states [m, size], computed in float32 whatever the model's dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float()).squeeze(1)


def freeze_language_head(model: nn.Module) -> None:
    """Freezes a model's own head, which only log-probs use, unless it is tied to the embedding.

    A trained weight without a gradient would make DDP wait for it.
    """
    decoder, head = decoder_and_head(model)
    used = {id(p) for p in decoder.parameters()}
    for parameter in base_model(model).get_output_embeddings().parameters() if head is not None else ():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def sequence_classifier(model: nn.Module, head: Tensor, pad_token_id: int | None) -> Any:
    """The sequence classifier of transformers that gives each row the scalar of a head; it shares the model's weights.

    Args:
        model: Causal language model, without an adapter that is to be saved separately.
        head: Weight of the head, [1, size].
        pad_token_id: Token that pads rows. The classifier reads the last token that differs from it.

    Raises:
        ModelError: as in :func:`empty_classifier`.
    """
    base = base_model(model)
    config = deepcopy(base.config)
    classifier, name = empty_classifier(config, type(base).__name__)
    classifier.config.get_text_config().pad_token_id = pad_token_id
    setattr(classifier, classifier.base_model_prefix, base.base_model)
    place, _, weight = name.rpartition(".")
    setattr(classifier.get_submodule(place), weight, nn.Parameter(head.detach().to(base.dtype)))
    return classifier.eval()


def empty_classifier(config: Any, name: str) -> tuple[Any, str]:
    """A sequence classifier with one label on the meta device, and the name of the weight of its head.

    Args:
        config: Config of a causal language model; it becomes that of the classifier.
        name: Name of the model in messages.

    Raises:
        ModelError: if transformers has no such classifier, or its head is not one matrix.
    """
    kind = getattr(config, "model_type", "model")
    refusal = f"{name}: a reward model of type {kind} could not be saved: "
    config.num_labels, config.problem_type = 1, "regression"
    try:
        with torch.device("meta"):
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # "Unrecognized configuration class", with a list of all others
        why = reason(error)
        if "Unrecognized configuration class" in why:
            why = "transformers has no sequence classifier for it"
        raise ModelError(f"{refusal}{why}; choose another architecture, such as Llama or Qwen") from error
    prefix = f"{classifier.base_model_prefix}."
    weights = {name: p for name, p in classifier.named_parameters() if not name.startswith(prefix)}
    if len(weights) != 1 or any(tuple(p.shape) != (1, text_config(classifier).hidden_size) for p in weights.values()):
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in weights.items())
        raise ModelError(f"{refusal}the head of {type(classifier).__name__} is not one matrix ({shapes})")
    return classifier, next(iter(weights))


def save_reward_adapter(policy: Any, head: Tensor, folder: Path) -> None:
    """Writes the adapter of a peft model, with a head, as the adapter of a sequence classifier.

    Args:
        policy: Causal language model with an adapter.
        head: Weight of the head, [1, size].
        folder: Folder to write to.
    """
    _, name = empty_classifier(deepcopy(base_model(policy).config), type(base_model(policy)).__name__)
    config = deepcopy(policy.peft_config["default"])
    config.task_type, config.inference_mode = "SEQ_CLS", True
    config.modules_to_save = [*(config.modules_to_save or []), name.rpartition(".")[0]]
    weights = get_peft_model_state_dict(policy, save_embedding_layers=False)
    weights[f"base_model.model.{name}"] = head.detach()
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


@torch.no_grad()
def check_classifier(scorer: Any, batch: TokenBatch) -> None:
    """Refuses a model whose sequence classifier would not give the scalars that training sees.

    Args:
        scorer: Scorer with a scalar head; its model is not sharded.
        batch: A few rows.

    Raises:
        ModelError: naming the largest difference.
    """
    model = scorer.model
    classifier = sequence_classifier(model, scorer.scalar_head.weight, None)
    with evaluating(model):
        scalars = scorer.scalars(batch)
        rows = zip(batch.host.prompt, batch.completions, strict=True)
        ids = [torch.cat([batch.prompts[prompt], completion]) for prompt, completion in rows]
        logits = torch.stack([classifier(input_ids=row[None]).logits.float().view(()) for row in ids])
    # Wider than for log-probs: the scalar is a small sum of large terms. Another token or norm is off by far more.
    most = max(16 * rounding(model), 2000 * torch.finfo(torch.float32).eps) * (1 + float(scalars.abs().max()))
    if not bool((off := (logits - scalars).abs().max()) <= most):
        raise ModelError(
            f"{type(classifier).__name__} of transformers differs from the trained head by up to {float(off):.2g},"
            " so the reward model could not be used outside; choose another architecture"
        )
