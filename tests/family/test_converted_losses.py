"""Losses of converted configs against formulas of the other libraries' code, in plain torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_runs import rows
from torch.nn.functional import logsigmoid, relu

from halos_pl.cli.convert import peers
from halos_pl.objective.build import load_objective

PEERS = peers()
ENTRY = {"file_name": "d.json", "formatting": "sharegpt"}
PAIRS = ENTRY | {"ranking": True, "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}}
ROWS = ENTRY | {"columns": {"kto_tag": "label", "messages": "conversations"}}


def loss_of(folder: Path, word: str, settings: dict[str, Any], trainer: str | None = None) -> Any:
    """The objective of a converted config."""
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": PAIRS, "rows": ROWS}))
    path = folder / "peer.yaml"
    more = {"dataset_dir": str(folder)} if word == "llamafactory" else {}
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", **more, **settings}))
    text = PEERS[word].convert(path, overrides="", trainer=trainer, devices=1).text
    (folder / "ours.yaml").write_text(text)
    return load_objective(folder / "ours.yaml")


class Pairs:
    """Sums and means of the rows' log-probs, chosen first."""

    def __init__(self) -> None:
        self.rows = rows(pairs=5, mismatched=0, seed=3)
        labels, mask = self.rows.labels, self.rows.mask
        self.chosen = labels.desirable.nonzero()[:, 0]
        self.rejected = labels.pair[self.chosen]
        length = mask.sum(1)
        policy, reference = self.rows.policy_logps * mask, self.rows.reference_logps * mask
        self.l, self.r = policy.sum(1), (policy - reference).sum(1)
        self.l_bar, self.r_bar = self.l / length, self.r / length
        self.length = length

    def margin(self, of: torch.Tensor) -> torch.Tensor:
        return of[self.chosen] - of[self.rejected]

    @property
    def mean_nll(self) -> torch.Tensor:
        """A mean over pairs of means over tokens, as in LLaMA-Factory."""
        return -self.l_bar[self.chosen].mean()

    @property
    def token_nll(self) -> torch.Tensor:
        """A mean over tokens, as in TRL."""
        return -self.l[self.chosen].sum() / self.length[self.chosen].sum()


def log_odds(l_bar: torch.Tensor) -> torch.Tensor:
    return l_bar - torch.log1p(-l_bar.exp())


FACTORY: dict[str, tuple[dict[str, Any], Any]] = {
    "sigmoid": ({}, lambda p: -logsigmoid(0.3 * p.margin(p.r)).mean()),
    "conservative": (
        {"dpo_label_smoothing": 0.2},
        lambda p: -(0.8 * logsigmoid(0.3 * p.margin(p.r)) + 0.2 * logsigmoid(-0.3 * p.margin(p.r))).mean(),
    ),
    "with likelihood": ({"pref_ftx": 0.7}, lambda p: -logsigmoid(0.3 * p.margin(p.r)).mean() + 0.7 * p.mean_nll),
    "hinge": ({"pref_loss": "hinge"}, lambda p: relu(1 - 0.3 * p.margin(p.r)).mean()),
    "ipo": ({"pref_loss": "ipo"}, lambda p: (p.margin(p.r_bar) - 1 / 0.6).square().mean()),
    "orpo": (
        {"pref_loss": "orpo"},
        lambda p: p.mean_nll - 0.3 * logsigmoid(p.margin(log_odds(p.l_bar))).mean(),
    ),
    "simpo": (
        {"pref_loss": "simpo", "simpo_gamma": 0.8},
        lambda p: -logsigmoid(0.3 * (p.margin(p.l_bar) - 0.8 / 0.3)).mean(),
    ),
}
TRL: dict[str, tuple[str, dict[str, Any], Any]] = {
    "weighted": (
        "dpo",
        {"loss_type": ["sigmoid", "hinge", "sft"], "loss_weights": [0.5, 2.0, 0.3]},
        lambda p: (
            -0.5 * logsigmoid(0.3 * p.margin(p.r)).mean() + 2 * relu(1 - 0.3 * p.margin(p.r)).mean() + 0.3 * p.token_nll
        ),
    ),
    "likelihood only": ("dpo", {"loss_type": "sft"}, lambda p: p.token_nll),
    "robust": (
        "dpo",
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        lambda p: -(0.8 * logsigmoid(0.3 * p.margin(p.r)) - 0.2 * logsigmoid(-0.3 * p.margin(p.r))).mean() / 0.6,
    ),
    "divergence": (
        "dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
        lambda p: -logsigmoid(0.3 * p.margin(((-0.6 * p.r).exp() - 1) / -0.6)).mean(),
    ),
    "cpo": (
        "cpo",
        {"label_smoothing": 0.1, "cpo_alpha": 0.5},
        lambda p: (
            -(0.9 * logsigmoid(0.3 * p.margin(p.l)) + 0.1 * logsigmoid(-0.3 * p.margin(p.l))).mean() + 0.5 * p.token_nll
        ),
    ),
    "cpo hinge": ("cpo", {"loss_type": "hinge"}, lambda p: relu(1 - 0.3 * p.margin(p.l)).mean() + p.token_nll),
    "cpo ipo": (
        "cpo",
        {"loss_type": "ipo", "cpo_alpha": 0},
        lambda p: (p.margin(p.l_bar) - 1 / 0.6).square().mean(),
    ),
    "cpo simpo": (
        "cpo",
        {"loss_type": "simpo", "simpo_gamma": 0.8, "cpo_alpha": 0.0},
        lambda p: -logsigmoid(0.3 * (p.margin(p.l_bar) - 0.8 / 0.3)).mean(),
    ),
}


@pytest.mark.parametrize("name", FACTORY)
def test_llamafactory_s_pairwise_losses(name, tmp_path):
    settings, formula = FACTORY[name]
    made = loss_of(tmp_path, "llamafactory", {"stage": "dpo", "pref_beta": 0.3, "dataset": "pairs"} | settings)
    pairs = Pairs()
    torch.testing.assert_close(made(pairs.rows).loss, formula(pairs))


@pytest.mark.parametrize("name", TRL)
def test_trl_s_pairwise_losses(name, tmp_path):
    trainer, settings, formula = TRL[name]
    made = loss_of(tmp_path, "trl", {"beta": 0.3} | settings, trainer)
    pairs = Pairs()
    torch.testing.assert_close(made(pairs.rows).loss, formula(pairs))


@pytest.mark.parametrize("word", ["trl", "llamafactory"])
def test_kto_with_weights(word, tmp_path):
    batch = rows(pairs=4, mismatched=3, seed=1)
    labels = batch.labels
    r = ((batch.policy_logps - batch.reference_logps) * batch.mask).sum(1)
    z0 = r[labels.mismatched].mean().clamp(min=0)
    train = ~labels.mismatched
    gains, losses = 1.5 * (1 - torch.sigmoid(0.3 * (r - z0))), 0.5 * (1 - torch.sigmoid(0.3 * (z0 - r)))
    expected = torch.where(labels.desirable, gains, losses)[train].mean()
    theirs = {
        "trl": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        "llamafactory": {"stage": "kto", "pref_beta": 0.3, "kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5},
    }[word]
    made = loss_of(tmp_path, word, theirs | ({"dataset": "rows"} if word == "llamafactory" else {}))
    unpaired = dataclasses.replace(batch, labels=dataclasses.replace(labels, pair=torch.full_like(labels.pair, -1)))
    torch.testing.assert_close(made(unpaired).loss, expected)
