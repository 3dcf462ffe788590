"""Objective files against the trainers of TRL 1.16: loss and every parameter's gradient, on one real batch.

TRL's own ``_compute_loss`` is run, with the constants that the file has; only what a trainer was built for (loss type,
divergence, smoothing) is set on the trainer that is there, because building one takes seconds. What TRL defines
otherwise is put together from its parts, and the test of that says why. Of the family TRL 1.16 has no BCO, SLiC, NCA
beyond pairs, unlikelihood, conditional fine-tuning or humanline; TR-DPO and KTO's other arms are its DPO and KTO
with another reference. KTO itself, with unequal weights, is in ``test_parity.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import FILES, objective
from run_halos import ROOT
from transformers import AutoTokenizer
from trl_parity import flat, models, settings, short_pairs

from halos_pl.batch import LogProbBatch, TokenBatch
from halos_pl.policy.logprobs import completion_mask, padded_logps

trl = pytest.importorskip("trl", reason="TRL, the peer that losses are compared with, is not installed")
Gradient = dict[str, torch.Tensor]


def gradient_of(loss: torch.Tensor, policy: Any) -> tuple[float, Gradient]:
    policy.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_equal(ours: tuple[float, Gradient], theirs: tuple[float, Gradient]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    whole = torch.stack([g.norm() for g in theirs[1].values()]).norm()
    assert whole > 1e-4
    for name, their in theirs[1].items():
        assert (ours[1][name] - their).norm() <= 2e-4 * (their.norm() + 0.1 * whole), name


class Peers:
    """TRL's trainers of one policy and one reference, made when first asked for."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], tmp: Path) -> None:
        self.pairs, self.n, self.tmp = rows, len(rows), tmp
        self.policy, self.reference = models(folder, 3)
        # Rewards of some nats: much more, and what is exponential in them drowns in rounding.
        with torch.no_grad():
            for own, start in zip(self.policy.parameters(), self.reference.parameters(), strict=True):
                own.lerp_(start, 0.8)
        self.policy.train()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def trainer(self, cls: Any, config: Any, rows: list[dict[str, Any]], **more: Any) -> Any:
        from datasets import Dataset

        return cls(
            model=self.policy,
            args=settings(config, self.tmp, len(rows)),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            **more,
        )

    @cached_property
    def dpo(self) -> Any:
        return self.trainer(trl.DPOTrainer, trl.DPOConfig, self.pairs, ref_model=self.reference)

    @cached_property
    def cpo(self) -> Any:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        # With the loss that has the most settings; the others are set in its place.
        return self.trainer(CPOTrainer, partial(CPOConfig, loss_type="simpo"), self.pairs)

    @cached_property
    def orpo(self) -> Any:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return self.trainer(ORPOTrainer, ORPOConfig, self.pairs)

    def examples(self, trainer: Any) -> list[dict[str, Any]]:
        return [dict(trainer.train_dataset[i]) for i in range(self.n)]

    def paired(self, prompts: list, chosen: list, rejected: list) -> TokenBatch:
        n = len(prompts)
        pair = [*range(n, 2 * n), *range(n)]
        return flat(prompts * 2, chosen + rejected, [True] * n + [False] * n, pair, [False] * (2 * n))

    def dpo_rows(self, examples: list[dict[str, Any]]) -> TokenBatch:
        return self.paired(*([row[f"{kind}_ids"] for row in examples] for kind in ("prompt", "chosen", "rejected")))

    def cpo_rows(self, examples: list[dict[str, Any]]) -> TokenBatch:
        """Completions are the labels that are not -100, prompts what is before them."""
        sides: dict[str, list[list[int]]] = {"prompt": [], "chosen": [], "rejected": []}
        for row in examples:
            for side in ("chosen", "rejected"):
                length = sum(label != -100 for label in row[f"{side}_labels"])
                sides[side].append(row[f"{side}_input_ids"][-length:])
            sides["prompt"].append(row["rejected_input_ids"][:-length])
        return self.paired(*sides.values())

    def ours(self, name: str, rows: TokenBatch, term: int | None = None) -> tuple[float, Gradient]:
        """Loss and gradient of an objective file, or of one of its terms, on ``rows``."""
        with torch.no_grad():
            reference = padded_logps(self.reference, rows)
        policy, mask = padded_logps(self.policy, rows), completion_mask(rows)
        made = objective(name)
        made = made if term is None else made.terms[term]
        whole = LogProbBatch(policy, reference, mask, rows.labels)
        return gradient_of(made(whole).loss, self.policy)

    def of_dpo(
        self, *kinds: str, weights: Sequence[float] = (1.0,), examples: Any = None, **more: Any
    ) -> tuple[float, Gradient]:
        """The DPO trainer's loss of types ``kinds``, with beta .1 and no smoothing unless ``more`` says otherwise."""
        trainer = self.dpo
        trainer.loss_types, trainer.loss_weights = list(kinds), list(weights)
        usual = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl"}
        trainer.args.discopop_tau = 0.05
        set_all(trainer, usual | more)
        batch = trainer.data_collator(examples or self.examples(trainer))
        return gradient_of(trainer.compute_loss(self.policy, batch), self.policy)

    def of_cpo(self, examples: Any = None, **more: Any) -> tuple[float, Gradient]:
        trainer = self.cpo
        set_all(trainer, {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.0, "cpo_alpha": 0.0} | more)
        batch = trainer.data_collator(examples or self.examples(trainer))
        return gradient_of(trainer.compute_loss(self.policy, batch), self.policy)


def set_all(trainer: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, value)


@pytest.fixture(scope="module")
def peers(tiny_folder, shared_data, tmp_path_factory):
    pairs = short_pairs(shared_data)
    return Peers(tiny_folder, pairs, tmp_path_factory.mktemp("trl"))


SMOOTHED = {"label_smoothing": 0.1}
DPO: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("sigmoid", {}),
    "tr_dpo": ("sigmoid", {}),  # the loss of one step; how its reference moves is not TRL's loss to say
    "dpo_length_normalised": ("sigmoid_norm", {}),
    "robust_dpo": ("robust", SMOOTHED),
    "hinge": ("hinge", {}),
    "ipo_length_normalised": ("ipo", {}),
    "exo_pair": ("exo_pair", {"label_smoothing": 1e-3}),
    "nca_pair": ("nca_pair", {}),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo_hard", {}),
    "aot": ("aot", {}),
    "aot_unpaired": ("aot_unpaired", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}),
    "dpo_forward_kl": ("sigmoid", {"f_divergence_type": "forward_kl"}),
    "dpo_jensen_shannon": ("sigmoid", {"f_divergence_type": "js_divergence"}),
    "dpo_alpha": ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}),
    "sft": ("sft", {}),
}
CPO: dict[str, dict[str, Any]] = {
    "cpo": {"loss_type": "sigmoid", "cpo_alpha": 1.0},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "cpo_simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 1.0},
}
KTO = {
    "kto": "kto",
    "kto_one_y_per_x": "kto",
    "apo_zero_unpaired": "apo_zero_unpaired",
    "kto_zero_reference": "apo_zero_unpaired",
}
TOKENS = {"ppo_clip", "grpo"}
REWARD_MODELS = {"bradley_terry"}  # compared in test_reward_models.py
IN_PARTS = {"cdpo", "ipo", "slic", "orpo"}
# Compared with TRL's own code in test_other_libraries.py.
ON_ONE_BATCH = {"alphapo", "cispo", "gmpo", "gspo", "ld_dpo", "luspo", "mpo", "sapo", "tpo", "vespo", "wpo"}
NOT_IN_TRL = {
    *("alpha_dpo", "beta_dpo", "dpo_sigmoid", "dppo_tv", "dro", "fipo", "gamma_po", "humanline_grpo", "infonca"),
    *("kto_surprisal", "madpo", "mnpo", "npo", "plackett_luce", "qrpo", "real", "rebel", "repo", "simnpo", "simper"),
    "astar_po",  # A2POTrainer samples its completions itself
    "bco",  # taken out of TRL before 1.16; its pairwise form without a shift is bco_pair
    "csft",
    "humanline_dpo",
    "humanline_kto",
    "kto_identity",
    "kto_kahneman_tversky",
    "kto_log_sigmoid",
    "kto_no_reference_model",
    "unlikelihood",
}


def test_every_file_is_compared_or_named_as_not_in_trl():
    lists = [set(DPO), set(CPO), set(KTO), TOKENS, REWARD_MODELS, IN_PARTS, ON_ONE_BATCH, NOT_IN_TRL]
    assert sorted(name for names in lists for name in names) == FILES


@pytest.mark.parametrize("name", DPO)
def test_equals_the_dpo_trainers(peers, name):
    kind, more = DPO[name]
    assert_equal(peers.ours(name, peers.dpo_rows(peers.examples(peers.dpo))), peers.of_dpo(kind, **more))


def test_cdpo_is_a_combination_of_two_of_the_dpo_trainers(peers):
    """TRL's sigmoid loss takes no smoothing any more; what cDPO adds is in its robust loss, over 1 - 2 epsilon."""
    theirs = peers.of_dpo("sigmoid", "robust", weights=(1.8, -0.8), **SMOOTHED)
    assert_equal(peers.ours("cdpo", peers.dpo_rows(peers.examples(peers.dpo))), theirs)


LENGTH = 6


def cut(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with completions of ``LENGTH`` tokens each."""
    kept = []
    for row in examples:
        row = dict(row)
        for side in ("chosen", "rejected"):
            if f"{side}_ids" in row:
                row[f"{side}_ids"] = row[f"{side}_ids"][:LENGTH]
            else:
                end = sum(label == -100 for label in row[f"{side}_labels"]) + LENGTH
                for column in ("input_ids", "attention_mask", "labels"):
                    row[f"{side}_{column}"] = row[f"{side}_{column}"][:end]
        kept.append(row)
    return kept


def test_ipo_on_completions_of_equal_length(peers):
    """TRL's IPO takes means over tokens, the paper sums: for L tokens (u/L - 1/2tL)^2 is (u - 1/2t)^2 / L^2."""
    examples = cut(peers.examples(peers.dpo))
    theirs = peers.of_dpo("ipo", weights=(LENGTH**2,), examples=examples, beta=0.1 * LENGTH)
    assert_equal(peers.ours("ipo", peers.dpo_rows(examples)), theirs)


@pytest.mark.parametrize("name", CPO)
def test_equals_the_cpo_trainers(peers, name):
    assert_equal(peers.ours(name, peers.cpo_rows(peers.examples(peers.cpo))), peers.of_cpo(**CPO[name]))


def test_slic_on_completions_of_equal_length(peers):
    """TRL's hinge on log-probs is SLiC's, but its likelihood is a mean over tokens: .1 of a sum is .1 L of it."""
    examples = cut(peers.examples(peers.cpo))
    theirs = peers.of_cpo(examples, loss_type="hinge", beta=1.0, cpo_alpha=0.1 * LENGTH)
    assert_equal(peers.ours("slic", peers.cpo_rows(examples)), theirs)


def test_orpo_in_two_parts(peers):
    """TRL's ORPO takes the likelihood of the prompt too, as its authors' code; the paper's equation has the answer's
    (eq. 6 and 2, P(y | x)). So the odds ratio is compared with TRL's, and the likelihood with TRL's ``sft``."""
    trainer = peers.orpo
    trainer.beta = 0.1
    examples = peers.examples(trainer)
    chosen, rejected = trainer.concatenated_forward(peers.policy, trainer.data_collator(examples))[:2]
    theirs = gradient_of(-trainer.odds_ratio_loss(chosen, rejected)[0].mean(), peers.policy)
    assert_equal(peers.ours("orpo", peers.cpo_rows(examples), term=0), theirs)
    rows = peers.dpo_rows(peers.examples(peers.dpo))
    assert_equal(peers.ours("orpo", rows, term=1), peers.of_dpo("sft"))


@pytest.fixture(scope="module")
def kto(peers):
    """The KTO trainer, its batch and the same rows with TRL's mismatches as mismatched rows."""
    labels = [True, False, False, True, True, False]
    sides = ["chosen" if label else "rejected" for label in labels]
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": label}
        for pair, side, label in zip(peers.pairs, sides, labels, strict=True)
    ]
    trainer = peers.trainer(trl.KTOTrainer, trl.KTOConfig, rows, ref_model=peers.reference)
    trainer.beta = 0.1
    theirs = peers.examples(trainer)
    n = len(rows)
    ours = flat(
        [row["prompt_ids"] for row in theirs] * 2,
        [row["completion_ids"] for row in theirs] + [row["KL_completion_ids"] for row in theirs],
        labels + [False] * n,
        [-1] * (2 * n),
        [False] * n + [True] * n,
    )
    return trainer, trainer.data_collator(theirs), ours


@pytest.mark.parametrize("name", KTO)
def test_equals_the_kto_trainers(peers, kto, name):
    """Both are means over rows, so TRL's apo_zero_unpaired has our denominator; its apo_zero is a mean over pairs."""
    trainer, batch, rows = kto
    trainer.loss_type = KTO[name]
    trainer.calculate_KL = KTO[name] == "kto"
    assert_equal(peers.ours(name, rows), gradient_of(trainer.compute_loss(peers.policy, batch), peers.policy))


@pytest.mark.parametrize(("name", "beta"), [("ppo_clip", 0.0), ("grpo", 0.04)])
def test_equals_the_grpo_trainers(peers, name, beta):
    """TRL's clipped loss as a mean over tokens (its ``bnpo``), with the reference as the old policy.

    Advantages are given, because TRL's divide by the sample's standard deviation + 1e-4 and ours, as the authors of
    offline alignment, by the population's + .01: two answers, one good and one bad, have +-.5 / .51. TRL's option of
    multiplying the KL estimate by the ratio, which is no part of GRPO's eq. 4, is off.
    """
    examples = peers.examples(peers.dpo)
    shortest = min(len(row["prompt_ids"]) for row in examples)
    # TRL pads prompts on the left and counts positions from there, which rounds otherwise.
    rows = peers.dpo_rows([row | {"prompt_ids": row["prompt_ids"][-shortest:]} for row in examples])
    rows = dataclasses.replace(rows, labels=dataclasses.replace(rows.labels, group=torch.arange(peers.n).repeat(2)))

    def config(max_length: None, **options: Any) -> Any:
        return trl.GRPOConfig(num_generations=2, use_bias_correction_kl=False, **options)

    trainer = peers.trainer(trl.GRPOTrainer, config, peers.pairs, reward_funcs=len)
    set_all(trainer, {"beta": beta, "loss_type": "bnpo", "epsilon_low": 0.2, "epsilon_high": 0.2})
    prompts = [rows.prompts[i] for i in rows.prompt.tolist()]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    inputs = {
        "prompt_ids": torch.stack(prompts),
        "prompt_mask": torch.ones_like(torch.stack(prompts)),
        "completion_ids": pad(rows.completions),
        "completion_mask": completion_mask(rows).long(),
        "advantages": torch.where(rows.labels.desirable, 1.0, -1.0) * (1.0 if name == "ppo_clip" else 0.5 / 0.51),
    }
    with torch.no_grad():
        old = padded_logps(peers.reference, rows)
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": old}
    trainer.current_gradient_accumulation_steps = 1
    assert_equal(peers.ours(name, rows), gradient_of(trainer._compute_loss(peers.policy, inputs), peers.policy))


@pytest.mark.parametrize("name", [name for name in DPO if name != "tr_dpo"])
def test_a_converted_config_has_the_file_that_is_compared(tmp_path, name):
    """``halos convert`` names the objective that the tests above hold to TRL's loss type."""
    import yaml

    from halos_pl.cli.convert import peers

    (kind, more), path = DPO[name], tmp_path / "dpo.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", "loss_type": [kind], **more}))
    made = yaml.safe_load(peers()["trl"].convert(path, overrides="", trainer="dpo", devices=1).text)["model"]
    shipped = yaml.safe_load((ROOT / f"experiments/objectives/{name}.yaml").read_text())["model"]
    del shipped["reference_model"]
    bare = {"class_path": shipped["reward"], "init_args": {}}
    assert made["reward"] in (shipped["reward"], bare)  # two spellings of a class without arguments
    assert {key: made[key] for key in shipped} == shipped | {"reward": made["reward"]}
