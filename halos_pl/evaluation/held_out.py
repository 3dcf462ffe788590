"""Measures held-out feedback under a policy and a reference, and computes metrics by example."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs, TokenBatch
from halos_pl.data import FeedbackDataModule
from halos_pl.data.example import DataError
from halos_pl.policy.kl import Scoring, compared_logps
from halos_pl.policy.limits import check_length, check_vocabulary
from halos_pl.policy.loading import load_model
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.reference import AdapterOff, FixedModel, FrozenCopy
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.store import ReferenceStore, StoredReference
from halos_pl.training.checkpoint_search import find_checkpoint
from halos_pl.training.named_model import NamedModel
from halos_pl.training.progress import Progress
from halos_pl.training.trained import load_weights, module_of_run

#: Both classes of rows, pairs included.
NEEDS = Needs(undesirable=True)


class NonFiniteLogProbError(DataError):
    """Held-out rows have no finite log-prob under the policy or the reference."""


class Evaluation(LightningModule):
    """Measures each held-out row under a policy and, if there is one, a reference.

    Args:
        scorer: the policy.
        reference: the reference; None without one.
        tokenizer: the tokenizer of both.
    """

    def __init__(self, scorer: Scorer, reference: Scoring | None, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.scorer, self.reference, self.tokenizer = scorer, reference, tokenizer

    def configure_model(self) -> None:
        """Refuses rows that are too long for the models, or contain tokens that they do not know."""
        data: Any = getattr(self.trainer, "datamodule", None)
        scorers = [self.scorer]
        if self.reference is not None:
            with self.reference.scoring() as other:
                scorers.append(other)
        for scorer in scorers:
            check_length(scorer.model, getattr(data, "longest", 0))
            if data is not None:
                check_vocabulary(scorer.model, self.tokenizer, data.tokens())

    @torch.no_grad()
    def predict_step(self, batch: TokenBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row: log-probs under both models and the KL divergence between them, in nats."""
        if self.reference is not None:
            compared = compared_logps(self.scorer, self.reference, batch)
            figures = dict(zip(("policy_logp", "reference_logp", "kl"), compared, strict=True))
        else:
            figures = {"policy_logp": self.scorer(batch)}
        labels, tokens = batch.labels, completion_mask(batch).sum(dim=1).tolist()
        sums = {name: each.sum(dim=1).tolist() for name, each in figures.items()}
        first = [min(i, pair) if pair >= 0 else i for i, pair in enumerate(labels.pair.tolist())]
        return [
            {
                "row": batch.row_ids[i],
                "pair": batch.row_ids[first[i]] if labels.pair[i] >= 0 else None,
                "prompt": int(labels.group[i]),  # before truncation, which depends on the completion
                "desirable": bool(labels.desirable[i]),
                "tokens": tokens[i],
                "words": len(str(self.tokenizer.decode(batch.completions[i], skip_special_tokens=True)).split()),
            }
            | {name: each[i] for name, each in sums.items()}
            for i in range(len(batch))
        ]


def prepared(
    model: NamedModel,
    other: nn.Module | None = None,
    *,
    compare: bool = True,
    trained: bool = True,
    stored: bool = False,
) -> Evaluation:
    """The evaluation of a model.

    Args:
        model: the policy.
        other: the reference; None for a run's policy before training.
        compare: whether to use a reference at all.
        trained: whether to load a run's trained weights.
        stored: whether log-probs of the policy before training come from the reference store.
    """
    run = module_of_run(model.run) if model.run else None
    scorer = Scorer(
        load_model(model.spec),
        prefix_sharing=run.models.prefix_sharing if run else "auto",
        compiled=model.spec.compile,
        name="the policy",
    )
    reference: Any = None
    if compare and other is not None:
        reference = FixedModel(other, scorer)
    elif compare:
        reference = AdapterOff() if model.spec.lora else FrozenCopy()
        reference.bind(scorer, model.spec, stored=stored)
        if stored:
            reference = StoredReference(reference, ReferenceStore(), lambda: scorer.numerics)
    module = Evaluation(scorer, reference, model.tokenizer())
    if model.run and trained:
        load_weights(module, find_checkpoint(model.run, model.ckpt_path), model.run, "scorer.")
    return module.eval()


def records_of(module: Evaluation, data: FeedbackDataModule, name: str) -> list[dict[str, Any]]:
    """The records of all rows.

    Raises:
        NonFiniteLogProbError: naming the model, if log-probs are not finite.
    """
    data.connect(tokenizer=module.tokenizer, needs=NEEDS)
    # On one device: each of several would get only its share of the rows.
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        devices=1,
        num_nodes=1,
        callbacks=[Progress()],
    )
    batches: Any = trainer.predict(module, datamodule=data)
    records = [record for batch in batches for record in batch]
    names = ("policy_logp", "reference_logp", "kl")
    lost = sum(not np.isfinite([r[name] for name in names if name in r]).all() for r in records)
    if lost:
        raise NonFiniteLogProbError(
            f"{name}: {lost} of {len(records)} held-out rows have no finite log-prob: the policy diverged"
        )
    return records


def of_reference(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the reference itself."""
    return [{**record, "policy_logp": record["reference_logp"], "kl": 0.0} for record in records]


def figures_of(records: list[dict[str, Any]], beta: float) -> dict[str, dict[str, float]]:
    """All metrics by example that the rows allow."""
    return of_pairs(records, beta) | of_rows(records)


def of_pairs(records: list[dict[str, Any]], beta: float) -> dict[str, dict[str, float]]:
    """Metrics of pairs by example; without a reference, those that need none; empty without pairs."""
    differences = {name: _differences(records, name) for name in ("policy_logp", "reference_logp")}
    if not differences["policy_logp"]:
        return {}
    metrics = {"policy_accuracy": _wins(differences["policy_logp"])}
    if differences["reference_logp"]:
        margins = {pair: m - differences["reference_logp"][pair] for pair, m in differences["policy_logp"].items()}
        metrics |= {
            "reward_accuracy": _wins(margins),
            "reward_margin": margins,
            "brier": {pair: (1 - 1 / (1 + float(np.exp(-beta * m)))) ** 2 for pair, m in margins.items()},
        }
    example = {r["pair"]: name for r, name in zip(records, _examples(records).values(), strict=True)}
    return {metric: by_example(values, example) for metric, values in metrics.items()}


def _differences(records: list[dict[str, Any]], name: str) -> dict[str, float]:
    """For each pair, a figure of the chosen minus that of the rejected completion; empty if the rows lack it."""
    sides: dict[str, dict[bool, float]] = defaultdict(dict)
    for record in records:
        if record["pair"] is not None and name in record:
            sides[record["pair"]][record["desirable"]] = record[name]
    return {pair: both[True] - both[False] for pair, both in sides.items() if len(both) == 2}


def _wins(margins: Mapping[str, float]) -> dict[str, float]:
    """1 for a margin above 0, 0.5 for a tie."""
    return {pair: float(m > 0) + 0.5 * (m == 0) for pair, m in margins.items()}


def of_rows(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Metrics of single rows by example; without a reference, those that need none."""
    nll = {r["row"]: -r["policy_logp"] / r["tokens"] for r in records}
    example = _examples(records)
    metrics = {
        f"nll_{kind}": by_example({r["row"]: nll[r["row"]] for r in records if r["desirable"] is desirable}, example)
        for kind, desirable in (("desirable", True), ("undesirable", False))
    }
    if not all("reference_logp" in r for r in records):
        return metrics
    rewards: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for r in records:
        rewards[r["desirable"]][r["row"]] = r["policy_logp"] - r["reference_logp"]
    metrics["displacement"] = by_example(rewards[True], example)
    metrics["kl_held_out"] = by_example({r["row"]: r["kl"] for r in records}, example)
    if rewards[True] and rewards[False]:
        metrics["reward_auroc"] = by_example(_auroc_shares(rewards[True], rewards[False]), example)
    return metrics


def _examples(records: list[dict[str, Any]]) -> dict[str, str]:
    """The example that each row belongs to: the first row with its prompt."""
    first: dict[str, str] = {}
    return {r["row"]: first.setdefault(r["prompt"], r["row"]) for r in records}


def mean_by_example(values: Mapping[str, float], example: Mapping[str, str]) -> dict[str, float]:
    """The mean value of each example's rows. It does not depend on other examples, so evaluations of other files, or of
    a part of them, can be compared by it."""
    return {name: sum(each) / len(each) for name, each in _grouped(values, example).items()}


def by_example(values: dict[str, float], example: dict[str, str]) -> dict[str, float]:
    """Turns values of rows into values of examples with the same mean, as the rows of a prompt are not independent.

    Each is the mean plus the example's contribution to its error as a ratio of two sums (Cochran 1977, section 6.3), so
    that the number of rows per example does not count as variation of the metric. It depends on all rows, so models can
    be compared by it only if the same rows were measured.
    """
    grouped = _grouped(values, example)
    if len({len(each) for each in grouped.values()}) <= 1:  # plain means, without rounding
        return mean_by_example(values, example)
    mean = sum(values.values()) / len(values)
    share = len(grouped) / len(values)
    return {name: mean + share * (sum(each) - len(each) * mean) for name, each in grouped.items()}


def _grouped(values: Mapping[str, float], example: Mapping[str, str]) -> dict[str, list[float]]:
    """The values of each example's rows."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for row, value in values.items():
        grouped[example[row]].append(value)
    return grouped


def _auroc_shares(high: dict[str, float], low: dict[str, float]) -> dict[str, float]:
    """Each row's contribution to the area under the ROC curve; the mean over all rows is the area.

    Rows of both classes are a sample. A row's share is the part of the other class that it is ranked correctly against;
    its contribution is the area plus the weighted deviation of its share from the area. The variance of the mean is
    that of DeLong et al. 1988; with contributions summed by pair, that of Obuchowski 1997.
    """

    def below(values: dict[str, float], others: dict[str, float]) -> dict[str, float]:
        """For each value, the share of ``others`` below it, counting equal ones half."""
        ordered = np.sort(list(others.values()))
        places = [np.searchsorted(ordered, list(values.values()), side=side) for side in ("left", "right")]
        return dict(zip(values, ((places[0] + places[1]) / 2 / len(ordered)).tolist(), strict=True))

    right = {True: below(high, low), False: {row: 1 - share for row, share in below(low, high).items()}}
    area, rows = float(np.mean(list(right[True].values()))), len(high) + len(low)
    return {
        row: area + rows / len(shares) * (share - area) for shares in right.values() for row, share in shares.items()
    }
