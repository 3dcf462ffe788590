"""TRL: the ``compute_loss`` of its trainers is called, with log-probs in place of a model.

A trainer is made without its ``__init__``, which would want a model, a tokenizer and data, and is given the attributes
that its loss reads. What stands for the model returns the batch's log-probs, or logits over a vocabulary of two tokens
that have them.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from parity.batch import PROMPT, Batch
from parity.formulas import standardised, thumbs
from parity.library import Library

LIBRARY = Library("TRL", "huggingface/trl", "v1.16.0", package="trl", version="1.16.0")

DPO: dict[str, Any] = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
}
KTO: dict[str, Any] = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "loss_type": "kto"}
CPO: dict[str, Any] = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "alpha": 0.0,
    "loss_type": "sigmoid",
}
TPO: dict[str, Any] = {
    "beta": 0.01,
    "label_smoothing": 0.0,
    "tpo_alpha": 1.0,
    "tpo_l_gamma": 0.5,
    "loss_type": "sigmoid",
}
GRPO: dict[str, Any] = {
    "beta": 0.04,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "max_completion_length": 16,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "_entropy_bonus_enabled": False,
    "current_gradient_accumulation_steps": 1,
}
#: The defaults of SAPO and VESPO.
GATES = {
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}


class Model(torch.nn.Module):
    """Stands for a model: has log-probs for rows of the batch, in the order in which they are asked for.

    Args:
        tokens: float [n, L], log-prob of each token of prompt and completion.
        counted: bool [n, L], True on the tokens that carry the loss.
    """

    is_gradient_checkpointing = False

    def __init__(self, tokens: Tensor, counted: Tensor) -> None:
        super().__init__()
        self.tokens, self.counted = tokens, counted

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        probability = self.tokens.detach().exp()
        return SimpleNamespace(
            log_probs=torch.where(self.counted, self.tokens, 0.0),
            log_sum_sq_probs=(probability.square() + (1 - probability).square()).log(),
            logits=_logits(self.tokens),
            entropy=torch.zeros_like(self.tokens),
            mean_logits=torch.zeros_like(self.tokens),
            is_top1=torch.ones_like(self.counted),
        )


class OfTwoKinds(torch.nn.Module):
    """Stands for a model that is also asked for the mismatched rows, whose input ids are not 1."""

    is_gradient_checkpointing = False

    def __init__(self, batch: Batch, tokens: Tensor) -> None:
        super().__init__()
        self.rows, self.mismatched = _model(batch, batch.train, tokens), _model(batch, batch.mismatched, tokens)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        outputs: SimpleNamespace = (self.rows if input_ids[0, 0] == 1 else self.mismatched)(input_ids)
        return outputs


def _logits(tokens: Tensor) -> Tensor:
    """Logits [n, 1 + L, 2] under which token 1 has the log-probs ``tokens`` [n, L] at its place in the row."""
    logits = torch.stack([torch.log(-torch.expm1(tokens)), tokens], dim=2)
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)


def _model(batch: Batch, rows: Tensor, tokens: Tensor) -> Model:
    counted = torch.cat([torch.zeros(len(rows), PROMPT, dtype=torch.bool), batch.mask[rows]], dim=1)
    return Model(tokens[rows], counted)


def _reference(batch: Batch) -> Tensor:
    return torch.cat([batch.prompt.detach(), batch.reference], dim=1)


def _masks(batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Long [m, 1 + PROMPT + T]: which tokens are there, and which are completion; the first one has no log-prob."""
    before = torch.ones(len(rows), 1 + PROMPT, dtype=torch.long)
    mask = batch.mask[rows].long()
    return torch.cat([before, mask], dim=1), torch.cat([0 * before, mask], dim=1)


def _trainer(cls: Any, model: Any, args: dict[str, Any] | None = None, **attributes: Any) -> Any:
    """A trainer of one process that reads nothing but ``attributes``."""
    trainer = cls.__new__(cls)

    def same(x: Any, **_: Any) -> Any:
        return x

    usual: dict[str, Any] = {
        "model": model,
        "accelerator": SimpleNamespace(
            device="cpu", num_processes=1, gather=same, gather_for_metrics=same, reduce=same, unwrap_model=same
        ),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, **(args or {})),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "is_encoder_decoder": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in (usual | attributes).items():
        setattr(trainer, name, value)
    return trainer


def dpo(batch: Batch, *, loss_type: str, discopop_tau: float = 0.05, **constants: Any) -> Tensor:
    """``DPOTrainer``; ``loss_type`` may be several, joined by ``+``, each of which has weight 1."""
    from trl import DPOTrainer

    rows = batch.train
    there, completion = _masks(batch, rows)
    kinds = loss_type.split("+")
    weights = constants.pop("loss_weights", [1.0] * len(kinds))
    trainer = _trainer(
        DPOTrainer,
        _model(batch, rows, batch.tokens),
        {"discopop_tau": discopop_tau},
        ref_model=_model(batch, rows, _reference(batch)),
        loss_types=kinds,
        loss_weights=weights,
        **DPO | constants,
    )
    inputs = {"input_ids": there, "attention_mask": there, "completion_mask": completion}
    loss: Tensor = trainer._compute_loss(trainer.model, inputs, False)
    return loss


def kto(batch: Batch, *, micro_batches: int = 1, **constants: Any) -> Tensor:
    """``KTOTrainer``; the loss of an optimizer step is the mean over its micro-batches."""
    parts = batch.halves() if micro_batches == 2 else (batch,)
    return torch.stack([_kto(part, KTO | constants) for part in parts]).mean()


def _kto(batch: Batch, constants: dict[str, Any]) -> Tensor:
    from trl import KTOTrainer

    there, completion = _masks(batch, batch.train)
    there_kl, completion_kl = _masks(batch, batch.mismatched)
    inputs = {
        "label": batch.labels.desirable[batch.train],
        "input_ids": there,
        "attention_mask": there,
        "completion_mask": completion,
        "KL_input_ids": 2 * there_kl,
        "KL_attention_mask": there_kl,
        "KL_completion_mask": completion_kl,
    }
    kinds = {"calculate_KL": constants["loss_type"] == "kto"}
    models = OfTwoKinds(batch, batch.tokens), OfTwoKinds(batch, _reference(batch))
    trainer = _trainer(KTOTrainer, models[0], ref_model=models[1], **kinds, **constants)
    loss: Tensor = trainer._compute_loss(trainer.model, inputs, False)
    return loss


def _sides(batch: Batch) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    for side, rows in (("chosen", batch.good), ("rejected", batch.bad)):
        there, completion = _masks(batch, rows)
        inputs |= {
            f"{side}_input_ids": there,
            f"{side}_attention_mask": there,
            f"{side}_labels": torch.where(completion == 1, there, -100),
        }
    return inputs


def cpo(batch: Batch, **constants: Any) -> Tensor:
    """``CPOTrainer`` of ``trl.experimental``."""
    from trl.experimental.cpo import CPOTrainer

    trainer = _trainer(CPOTrainer, _model(batch, batch.train, batch.tokens), pad_token_id=0, **CPO | constants)
    loss: Tensor = trainer.get_batch_loss_metrics(trainer.model, _sides(batch))[0]
    return loss


def tpo(batch: Batch, **constants: Any) -> Tensor:
    """``TPOTrainer`` of ``trl.experimental``."""
    from trl.experimental.tpo import TPOTrainer

    rows = torch.cat([batch.train, batch.gold])
    there, completion = _masks(batch, rows)
    trainer = _trainer(TPOTrainer, _model(batch, rows, batch.tokens), **TPO | constants)
    inputs = {"input_ids": there, "attention_mask": there, "completion_mask": completion}
    loss: Tensor = trainer._compute_loss(trainer.model, inputs, False)
    return loss


def orpo(batch: Batch, *, beta: float = 0.1) -> Tensor:
    """``ORPOTrainer`` of ``trl.experimental``."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = _trainer(ORPOTrainer, _model(batch, batch.train, batch.tokens), padding_value=0, beta=beta)
    loss: Tensor = trainer.get_batch_loss_metrics(trainer.model, _sides(batch))[0]
    return loss


def reward(batch: Batch, *, margin: bool = False, center_rewards_coefficient: float | None = None) -> Tensor:
    """``RewardTrainer``."""
    from trl import RewardTrainer

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=batch.scalar[batch.train][:, None])

    stand_in = SimpleNamespace(training=True)
    trainer = _trainer(RewardTrainer, stand_in, {"center_rewards_coefficient": center_rewards_coefficient})
    inputs = {"attention_mask": torch.ones(len(batch.train), 1)}
    if margin:
        inputs["margin"] = batch.margin(batch.labels.score)
    loss: Tensor = trainer.compute_loss(model, inputs)
    return loss


def grpo(batch: Batch, **constants: Any) -> Tensor:
    """``GRPOTrainer``; see :func:`_online`."""
    from trl import GRPOTrainer

    return _online(GRPOTrainer, batch, **constants)


def gmpo(batch: Batch, **constants: Any) -> Tensor:
    """``GMPOTrainer`` of ``trl.experimental``; see :func:`_online`."""
    from trl.experimental.gmpo import GMPOTrainer

    return _online(GMPOTrainer, batch, **constants)


def _online(
    cls: Any, batch: Batch, *, advantage: str = "group", use_bias_correction_kl: bool = True, **constants: Any
) -> Tensor:
    """A trainer's loss with the reference as the old policy.

    Advantages are computed before the loss: those of ``scale_rewards: group`` are written out here. ``ours`` gives
    our advantages, ``thumbs`` +1 and -1.
    """
    advantages = {
        "group": standardised(batch, correction=1, eps=1e-4),
        "ours": standardised(batch, correction=0, eps=1e-2),
        "thumbs": thumbs(batch),
    }
    rows = batch.train
    ids, mask = torch.ones_like(batch.mask[rows]).long(), batch.mask[rows].long()
    logps, reference = batch.policy[rows], batch.reference[rows]
    trainer = _trainer(
        cls,
        SimpleNamespace(training=True),
        {"use_bias_correction_kl": use_bias_correction_kl, "delta": None, "steps_per_generation": 1, **GATES},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        **GRPO | constants,
    )
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages[advantage],
        "old_per_token_logps": reference,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = trainer._compute_loss(trainer.model, inputs)
    return loss
