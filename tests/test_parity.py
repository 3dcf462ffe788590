"""Loss and every parameter's gradient equal TRL's own trainers' on one real batch, with the same models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from trl_parity import BETA, flat, models, settings, short_pairs

from halos_pl.batch import LogProbBatch, TokenBatch
from halos_pl.data.tokenize import encode_completion, encode_prompt
from halos_pl.objective.feedback import Binary, Pairwise
from halos_pl.objective.halo import HALO
from halos_pl.objective.reference_points import MismatchedKL, PairedCompletion
from halos_pl.objective.rewards import LogRatio
from halos_pl.policy.logprobs import completion_mask, padded_logps
from value_functions import Logistic, LogSigmoid

trl = pytest.importorskip("trl", reason="TRL, the peer that losses are compared with, is not installed")


def assert_parity(trainer: Any, batch: dict, policy: Any, reference: Any, objective: HALO, ours: TokenBatch) -> Any:
    policy.train()
    their_loss = trainer.compute_loss(policy, batch)
    their_loss.backward()
    theirs = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    with torch.no_grad():
        reference_logps = padded_logps(reference, ours)
    result = objective(
        LogProbBatch(
            padded_logps(policy, ours),
            reference_logps,
            completion_mask(ours),
            ours.labels,
        )
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    for name, parameter in policy.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name], rtol=0, atol=1e-5), name
    assert max(g.abs().max() for g in theirs.values()) > 1e-3
    return result


@pytest.mark.parametrize(("seed", "weights"), [(1, (1.0, 1.0)), (2, (1.5, 0.7)), (5, (0.5, 2.0))])
def test_kto_equals_trl(tiny_folder, shared_data, tmp_path, seed, weights):
    """Same rows, same mismatches (TRL's rotation), unequal weights, z0 clamped or not as the seed has it."""
    pairs = short_pairs(shared_data)
    from datasets import Dataset

    rows = [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, p in enumerate(pairs)
    ]
    n = len(rows)
    policy, reference = models(tiny_folder, seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    trainer = trl.KTOTrainer(
        model=policy,
        ref_model=reference,
        args=settings(trl.KTOConfig, tmp_path, n, desirable_weight=weights[0], undesirable_weight=weights[1]),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = [trainer.train_dataset[i] for i in range(n)]
    for row, their in zip(rows, theirs, strict=True):
        assert encode_prompt(tokenizer, row["prompt"]) == their["prompt_ids"]
        # TRL trains on the newline that the template puts behind the last EOS; the model would stop before it.
        ours = encode_completion(tokenizer, row["prompt"], row["completion"])
        assert their["completion_ids"][: len(ours)] == ours
        assert tokenizer.decode(their["completion_ids"][len(ours) :]).strip() == ""
    batch = flat(
        [t["prompt_ids"] for t in theirs] * 2,
        [t["completion_ids"] for t in theirs] + [t["KL_completion_ids"] for t in theirs],
        [row["label"] for row in rows] + [False] * n,
        [-1] * (2 * n),
        [False] * n + [True] * n,
    )
    objective = HALO(
        reward=LogRatio(),
        reference_point=MismatchedKL(),
        value_function=Logistic(beta=BETA),
        feedback=Binary(lambda_desirable=weights[0], lambda_undesirable=weights[1]),
        reflect_undesirable=True,
        loss_offset=1.0,
    )
    result = assert_parity(trainer, trainer.data_collator(theirs), policy, reference, objective, batch)
    kl = trainer._metrics["train"]["kl"][-1]
    assert result.outcomes.reference_point[0].item() == pytest.approx(kl, rel=1e-4, abs=1e-4)
    shown = BETA * result.outcomes.reward[torch.tensor([row["label"] for row in rows])].mean().item()
    assert shown == pytest.approx(trainer._metrics["train"]["rewards/chosen"][-1], rel=1e-3)


def test_dpo_equals_trl(tiny_folder, shared_data, tmp_path):
    pairs = short_pairs(shared_data)
    from datasets import Dataset

    n = len(pairs)
    policy, reference = models(tiny_folder, 3)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings(trl.DPOConfig, tmp_path, n),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )
    theirs = [trainer.train_dataset[i] for i in range(n)]
    batch = flat(
        [t["prompt_ids"] for t in theirs] * 2,
        [t["chosen_ids"] for t in theirs] + [t["rejected_ids"] for t in theirs],
        [True] * n + [False] * n,
        [*range(n, 2 * n), *range(n)],
        [False] * (2 * n),
    )
    objective = HALO(
        reward=LogRatio(),
        reference_point=PairedCompletion(),
        value_function=LogSigmoid(beta=BETA),
        feedback=Pairwise(),
        reflect_undesirable=False,
    )
    assert_parity(trainer, trainer.data_collator(theirs), policy, reference, objective, batch)
