"""The step of a tiny model: log-probs compared with a plain loop, rewards of exactly 0 at the start, splits."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from policy_steps import PARTS, batch, module
from run_halos import OBJECTIVES, ROOT, one_for_each_need, one_in, quiet_trainer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from halos_pl.batch import LogProbBatch, TokenBatch
from halos_pl.labels import Labels
from halos_pl.objective.build import load_objective
from halos_pl.objective.halo import HALO
from halos_pl.objective.reference_points import SampledKL, TokenKL
from halos_pl.objective.rewards import LogProb, LogRatio
from halos_pl.policy.architecture import decoder_and_head
from halos_pl.policy.kl import compared_logps
from halos_pl.policy.loading import LoRASpec, ModelError, ModelSpec, load_model, load_tokenizer
from halos_pl.policy.logprobs import completion_mask, padded_logps
from halos_pl.policy.moving_reference import PastPolicies, SyncedCopy
from halos_pl.policy.reference import AdapterOff, FixedModel, FrozenCopy, NoReference
from halos_pl.policy.sampling import sample_tokens
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.self_test import padding_fault
from halos_pl.training.engine import StepEngine, _Step
from halos_pl.training.metrics import Means, reward_figures
from halos_pl.training.module import HALOModule
from halos_pl.training.non_finite import NonFiniteLossError
from value_functions import Logistic

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def made(config: Any, model: Any) -> Any:
    torch.manual_seed(0)
    return model(config).eval()


ARCHITECTURES = {
    "qwen2": lambda: made(
        Qwen2Config(vocab_size=300, num_key_value_heads=2, initializer_range=0.2, **SMALL), Qwen2ForCausalLM
    ),
    "gpt_neox": lambda: made(GPTNeoXConfig(vocab_size=300, initializer_range=0.2, **SMALL), GPTNeoXForCausalLM),
    "gemma2": lambda: made(
        Gemma2Config(vocab_size=300, num_key_value_heads=2, head_dim=8, initializer_range=0.2, **SMALL),
        Gemma2ForCausalLM,
    ),
}


def one_by_one(model: Any, rows: TokenBatch) -> list[torch.Tensor]:
    """Log-probs of each row alone, without padding, with the head applied to every position."""
    found = []
    for prompt, completion in zip(rows.prompt.tolist(), rows.completions, strict=True):
        ids = torch.cat([rows.prompts[prompt], completion])
        logps = model(ids[None]).logits[0].float().log_softmax(-1)
        found.append(logps[:-1].gather(1, ids[1:, None]).squeeze(1)[-len(completion) :])
    return found


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def compared(policy: Any, reference: Any, rows: TokenBatch, prefix_sharing: Any = "never") -> Any:
    scorer = Scorer(policy, prefix_sharing=prefix_sharing)
    return compared_logps(scorer, FixedModel(reference, scorer), rows)


@pytest.mark.parametrize("name", ["llama", "gpt2", *ARCHITECTURES])
def test_log_probs_equal_those_of_each_row_alone(name, tiny_folder, tiny_gpt2_folder):
    folders = {"llama": tiny_folder, "gpt2": tiny_gpt2_folder}
    model = load(folders[name]) if name in folders else ARCHITECTURES[name]()
    rows = batch()
    together, mask = padded_logps(model, rows), completion_mask(rows)
    assert together.dtype == torch.float32
    assert bool((together[~mask] == 0).all())
    for i, alone in enumerate(one_by_one(model, rows)):
        assert torch.allclose(together[i][mask[i]], alone, atol=2e-5)


def test_the_head_is_applied_to_completion_positions_only(tiny_folder):
    model, rows, seen = load(tiny_folder), batch(), []
    model.lm_head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape))
    padded_logps(model, rows)
    assert seen == [torch.Size([len(rows), max(map(len, rows.completions)), 32])]


def test_kl_equals_the_sum_over_the_vocabulary(tiny_folder):
    policy, reference, rows = load(tiny_folder), load(tiny_folder), batch()
    assert compared(policy, reference, rows)[2].abs().max() < 1e-5
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    kl = compared(policy, reference, rows)[2]
    ids = torch.cat([rows.prompts[rows.prompt[0]], rows.completions[0]])
    p, q = (m(ids[None]).logits[0].double().log_softmax(-1) for m in (policy, reference))
    expected = (p.exp() * (p - q)).sum(-1)[:-1][-len(rows.completions[0]) :]
    assert torch.allclose(kl[0][: len(expected)].double(), expected, atol=1e-5)
    assert bool((kl >= -1e-6).all())


def train(model: HALOModule, steps: list[TokenBatch], **options: Any) -> dict[str, float]:
    """Takes one optimizer step per batch; returns the metrics logged last."""
    torch.manual_seed(0)
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(model, DataLoader(steps, batch_size=None))  # type: ignore[arg-type]
    return {k: v.item() for k, v in trainer.callback_metrics.items()}


def weights(model: HALOModule) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


START = {"kto": 0.5, "dpo": 0.6931471824645996, "bco": 0.6931471824645996}
SETUPS: dict[str, dict[str, Any]] = {
    "frozen copy": {},
    "adapter off": {"lora": LoRASpec(r=4)},
    "checkpointed": {"gradient_checkpointing": True},
    "split": {"micro_batch_rows": 2},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", PARTS)
@pytest.mark.parametrize("setup", one_in(3, SETUPS))
def test_every_reward_is_exactly_zero_at_the_start(setup, objective, tiny_folder, tiny_gpt2_folder):
    """Same kernels, same shapes, no dropout: GPT-2 has a dropout of 0.1 unless it is switched off."""
    for folder in (tiny_folder, tiny_gpt2_folder):
        model = module(folder, objective, **dict(SETUPS[setup]))
        figures = train(model, [batch()])
        assert figures["outcome/reward"] == 0
        assert figures["outcome/u"] == 0
        assert figures["loss"] == pytest.approx(START[objective], abs=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_rewards_are_exactly_zero_at_the_start_in_mixed_precision(tiny_folder):
    for precision in ("bf16-mixed", "bf16-true"):
        for reference in (None, FrozenCopy()):
            lora = {"lora": LoRASpec(r=4)} if reference else {}
            model = module(tiny_folder, "kto", reference, **lora)
            assert train(model, [batch()], precision=precision)["outcome/reward"] == 0
            assert model.scorer.shares_prefixes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", one_in(3, PARTS))
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_split_does_not_change_the_step(objective, clip, tiny_folder):
    """Two steps with any micro_batch_rows give the weights and metrics of unsplit steps, also with clipping."""
    results = {}
    for rows in (None, 1, 3, 4):
        model = module(tiny_folder, objective, micro_batch_rows=rows, lr=0.5)
        figures = train(model, [batch(seed=1), batch(seed=2)], gradient_clip_val=clip)
        results[rows] = (weights(model), figures)
    whole, figures = results.pop(None)
    for found, other in results.values():
        for name, value in whole.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=2e-5), name
        for name, figure in figures.items():
            assert other[name] == pytest.approx(figure, rel=1e-4, abs=1e-4), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", one_for_each_need(OBJECTIVES))
def test_the_split_does_not_change_the_step_of_any_objective_file(name, tiny_folder):
    """At the second step, when rewards are no longer 0. A plug-in that needs the whole step gets it."""
    results = {}
    for rows in (None, 2):
        path = ROOT / "experiments" / "objectives" / f"{name}.yaml"
        model = module(tiny_folder, str(path), micro_batch_rows=rows, lr=0.02)
        figures = train(model, [batch(seed=1), batch(seed=2)], gradient_clip_val=1.0)
        results[rows] = (weights(model), figures)
    for parameter, value in results[None][0].items():
        assert torch.allclose(results[2][0][parameter], value, rtol=1e-4, atol=2e-5), parameter
    for figure, value in results[None][1].items():
        # Where a loss hardly moves the policy, a correlation of its rewards is that of their rounding.
        assert results[2][1][figure] == pytest.approx(value, rel=1e-4, abs=5e-4, nan_ok=True), figure


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [None, 2])
def test_z0_of_samples_is_their_mean_log_ratio_and_of_exact_kl_the_mismatched_rows(rows, tiny_folder, monkeypatch):
    """After a step, so that policy and reference differ."""
    drawn: list[list[list[int]]] = []

    def spy(*args: Any, **kwargs: Any) -> list[list[int]]:
        drawn.append(sample_tokens(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr("halos_pl.policy.sampling.sample_tokens", spy)
    for reference_point in (SampledKL(max_new_tokens=6), TokenKL()):
        model = module(tiny_folder, micro_batch_rows=rows, lr=2.0)
        model.objective.reference_point = reference_point
        steps = [batch(seed=1, mismatched=False), batch(seed=2, mismatched=False)]
        if isinstance(reference_point, TokenKL):
            steps = [batch(seed=1), batch(seed=2)]
        before: dict[str, Any] = {}

        class Keep(Callback):
            def on_train_batch_start(self, trainer: Any, module: Any, *_: Any, before: Any = before) -> None:
                before["policy"] = deepcopy(module.policy)

        figures = train(model, steps, callbacks=[Keep()])
        policy, frozen, last = before["policy"].eval(), load(tiny_folder), steps[-1]
        if isinstance(reference_point, TokenKL):
            mismatched = last.select(last.labels.mismatched.nonzero().squeeze(1))
            expected = compared(policy, frozen, mismatched)[2].sum(1).mean().item()
        else:
            assert len(drawn[-1]) == len(last)
            sampled = replace(last, completions=[torch.tensor(ids) for ids in drawn[-1]])
            with torch.no_grad():
                ratio = [
                    a.sum() - b.sum()
                    for a, b in zip(one_by_one(policy, sampled), one_by_one(frozen, sampled), strict=True)
                ]
            expected = torch.stack(ratio).mean().item()
        assert abs(expected) > 1e-3
        assert figures["outcome/z0"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert figures["outcome/z0_rows"] == len(last.labels.pair[last.labels.pair >= 0])


def test_samples_and_mismatched_rows_exclude_each_other(tiny_folder):
    both = [HALO(**(PARTS["kto"] | {k: v() for k, v in PARTS["kto"].items() if isinstance(v, type)}))]
    parts = {k: v() if isinstance(v, type) else v for k, v in PARTS["kto"].items()} | {"reference_point": SampledKL()}
    with pytest.raises(ValueError, match="samples of the policy"):
        HALOModule(ModelSpec(str(tiny_folder)), **parts, extra_terms=both)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [None, LoRASpec(r=4)])
def test_a_synced_reference_is_the_stated_mixture(lora, tiny_folder):
    """Five steps, synced after the 2nd and the 4th: each time 0.6 of the policy plus 0.4 of the old reference."""
    reference = SyncedCopy(every=2, mix=0.6)
    model = module(tiny_folder, "dpo", reference, lora=lora, lr=0.5)
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append({n: p.detach().clone() for n, p in module.policy.named_parameters() if p.requires_grad})

    train(model, [batch(seed=s, mismatched=False) for s in range(5)], callbacks=[Keep()])
    found = reference.state()
    assert found.keys() == seen[0].keys()
    assert any((seen[2][name] - start).abs().max() > 1e-3 for name, start in seen[0].items())
    for name, start in seen[0].items():
        expected = start.lerp(seen[2][name], 0.6).lerp(seen[4][name], 0.6)
        assert torch.allclose(found[name], expected, atol=1e-6), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [None, LoRASpec(r=4)])
def test_past_policies_are_the_stated_mean_and_continue_from_a_checkpoint(lora, tiny_folder):
    """Seven steps with snapshots after the 2nd, 4th and 6th, of which the last two are kept."""
    reference = PastPolicies(every=2, keep=2, start=0.25)
    model = module(tiny_folder, "dpo", reference, lora=lora, lr=0.5)
    rows = batch(mismatched=False)
    at: list[torch.Tensor] = []  # log-probs of the policy after each number of steps

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            with torch.no_grad():
                at.append(module.scorer(rows))
            if len(at) == 1:
                assert torch.equal(reference.logps(rows), at[0])

    train(model, [batch(seed=s, mismatched=False) for s in range(7)], callbacks=[Keep()])
    expected = 0.25 * at[0] + 0.375 * (at[4] + at[6])
    assert (at[0] - at[6]).abs().max() > 1e-3
    assert torch.allclose(reference.logps(rows), expected, atol=1e-5)
    with reference.scoring() as first, torch.no_grad():
        assert torch.equal(first(rows), at[0])
    state = {name: values.clone() for name, values in reference.state().items()}
    resumed = PastPolicies(every=2, keep=2, start=0.25)
    resumed.bind(Scorer(load_model(ModelSpec(str(tiny_folder), lora=lora))), ModelSpec(str(tiny_folder), lora=lora))
    resumed.restore(state)
    if lora is None:  # an adapter that is drawn anew has other weights at the start, though not another policy
        assert torch.equal(resumed.logps(rows), reference.logps(rows))
    assert torch.allclose(resumed.logps(rows), expected, atol=1e-5)
    for wrong in ({}, {"0.x": torch.zeros(1)}):
        with pytest.raises(ValueError, match="PastPolicies"):
            resumed.restore(wrong)


def test_past_policies_refuse_what_they_cannot_be(tiny_folder):
    for wrong in ({"every": 0}, {"keep": 0}, {"start": 1.0}, {"start": -0.1}, {"start": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PastPolicies(**({"every": 2, "keep": 2, "start": 0.5} | wrong))
    past, of_tokens = PastPolicies(every=1, keep=1, start=0.5), load_objective("kto", {"reference_point": "TokenKL"})
    with pytest.raises(ValueError, match="PastPolicies"):
        HALOModule(ModelSpec(str(tiny_folder)), past, extra_terms=[of_tokens])
    with pytest.raises(ValueError, match="PastPolicies"):
        StepEngine(of_tokens, Scorer(load_model(ModelSpec(str(tiny_folder)))), past)


def test_a_synced_reference_does_not_lose_small_moves_in_half_precision(tiny_folder):
    """A hundredth of the distance is below bfloat16's resolution; a hundred such moves are most of the distance."""
    spec = ModelSpec(str(tiny_folder), dtype="bfloat16")
    scorer, reference = Scorer(load_model(spec)), SyncedCopy(every=1, mix=0.01)
    policy = scorer.model
    start = {name: p.detach().clone().float() for name, p in policy.named_parameters()}
    reference.bind(scorer, spec)
    with torch.no_grad():
        for p in policy.parameters():
            p *= 1.0625
    other = SyncedCopy(every=1, mix=0.01)  # goes on from a checkpoint in the middle
    other.bind(scorer, spec)
    for step in range(100):
        if step == 50:
            other.restore(reference.state())
        (reference if step < 50 else other).follow(step + 1)
    for name, p in policy.named_parameters():
        wanted = p.float() + (start[name] - p.float()) * 0.99**100
        assert torch.allclose(other.state()[name], wanted, rtol=1e-3, atol=1e-6), name
    with other.scoring() as model:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix_sharing", ["auto", "never"])
def test_models_with_one_tokenizer_may_differ_in_unused_ids(prefix_sharing, tiny_folder, tmp_path):
    """As in the sizes of Qwen2.5: the KL divergence is over the ids that both models have."""
    larger = load_model(ModelSpec(str(tiny_folder)))
    larger.resize_token_embeddings(larger.config.vocab_size + 8, mean_resizing=False)
    larger.save_pretrained(tmp_path)
    load_tokenizer(ModelSpec(str(tiny_folder))).save_pretrained(tmp_path)
    found = []
    for folder in (tiny_folder, tmp_path):
        policy, reference = load(tiny_folder), load(folder)
        with torch.no_grad():
            policy.get_input_embeddings().weight.mul_(1.1)
            found.append(compared(policy, reference, batch(), prefix_sharing))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][2].shape == found[0][2].shape
    assert found[1][2].isfinite().all()


def test_a_pair_is_compared_where_there_is_one():
    """Rows without a paired completion are not compared; every step logs the same metrics, as ranks must agree."""
    rows = LogProbBatch(
        policy_logps=torch.tensor([[1.0], [2.0], [3.0]]),
        reference_logps=torch.zeros(3, 1),
        mask=torch.ones(3, 1, dtype=torch.bool),
        labels=Labels(desirable=torch.tensor([True, False, True]), pair=torch.tensor([1, 0, -1])),
    )
    for pair, wanted in ((rows.labels.pair, [0.0, 1.0]), (torch.full((3,), -1), [0.0, 0.0])):
        figures = reward_figures(
            replace(rows, labels=replace(rows.labels, pair=pair)), rows.policy_logps.sum(dim=1), 1.0
        )
        assert torch.stack(figures["rewards/accuracies"]).tolist() == wanted
    means = Means()
    means.add(figures)
    assert "rewards/accuracies" not in means.compute(empty=False)


@pytest.mark.filterwarnings("ignore")
def test_adapter_off_equals_a_separate_copy(tiny_folder):
    """After steps that moved the adapter: if it stayed on in the reference, rewards would still be 0."""
    steps = [batch(seed=s) for s in range(3)]
    off = train(module(tiny_folder, lora=LoRASpec(r=4), lr=1.0), steps)
    copy = train(module(tiny_folder, "kto", FrozenCopy(), lora=LoRASpec(r=4), lr=1.0), steps)
    assert abs(off["outcome/reward"]) > 1e-4
    for name, figure in off.items():
        assert copy[name] == pytest.approx(figure, rel=1e-5, abs=1e-6), name


@pytest.mark.filterwarnings("ignore")
def test_adapter_and_mode_are_restored(tiny_folder):
    model = module(tiny_folder, lora=LoRASpec(r=4), lr=1.0)
    train(model, [batch()])
    policy: Any = model.scorer
    rows = batch()
    reference = AdapterOff()
    reference.bind(policy, model.models.spec)
    for training in (True, False):
        policy.train(training)
        before = policy(rows)
        with reference.scoring() as scored:
            assert not scored.training
            assert not torch.equal(scored(rows), before)
        assert policy.training is training
        assert torch.equal(policy(rows), before)
    with pytest.raises(RuntimeError), reference.scoring():
        raise RuntimeError
    assert torch.equal(policy(rows), before)


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_reference_is_not_part_of_the_module(tiny_folder):
    model = module(tiny_folder)
    train(model, [batch()])
    own = sum(p.numel() for p in load(tiny_folder).parameters())
    assert sum(p.numel() for p in model.parameters()) == own
    assert all(name.startswith(("scorer.", "objective.")) for name in model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_unusable_references_are_refused(tiny_folder):
    """When the config is read, before data and weights are."""
    with pytest.raises(ModelError, match=r"AdapterOff .*FrozenCopy"):
        module(tiny_folder, "kto", AdapterOff())
    with pytest.raises(ModelError, match="NoReference"):
        module(tiny_folder, "kto", NoReference())
    with pytest.raises(ValueError, match="needs sdpa attention"):
        module(tiny_folder, "kto", attn_implementation="eager", prefix_sharing="always")


@pytest.mark.filterwarnings("ignore")
def test_no_reference_is_loaded_if_none_is_needed(tiny_folder, monkeypatch):
    monkeypatch.setattr(FrozenCopy, "bind", lambda *_: pytest.fail("a reference was loaded"))
    parts = {k: v() if isinstance(v, type) else v for k, v in PARTS["kto"].items()}
    model = HALOModule(ModelSpec(str(tiny_folder)), **{**parts, "reward": LogProb()})
    assert "loss" in train(model, [batch()])


@pytest.mark.filterwarnings("ignore")
def test_a_non_finite_loss_stops_the_run_and_names_the_rows(tiny_folder):
    class Broken(Logistic):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.arange(len(u)) == 2, float("nan"), super().forward(u))

    parts = {k: v() if isinstance(v, type) else v for k, v in PARTS["kto"].items()}
    model = HALOModule(ModelSpec(str(tiny_folder)), **{**parts, "value_function": Broken()})
    said = r"step 0(.|\n)*file:2\n(.|\n)*file:0, file:1(.|\n)*no checkpoints"
    with pytest.raises(NonFiniteLossError, match=said):
        train(model, [batch()])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_non_finite_gradient_stops_the_run_before_its_step(clip, tiny_folder):
    """At 0, where every run starts, x ** 0.88 has an infinite slope, so the gradient of where() is NaN."""

    class Textbook(Logistic):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return torch.where(u >= 0, u.clamp(min=0) ** 0.88, -2.25 * (-u).clamp(min=0) ** 0.88)

    parts = {k: v() if isinstance(v, type) else v for k, v in PARTS["kto"].items()}
    model = HALOModule(ModelSpec(str(tiny_folder)), **{**parts, "value_function": Textbook()})
    with pytest.raises(NonFiniteLossError, match=r"is nan at optimizer step 0(.|\n)*file:0, file:1(.|\n)*at u = 0"):
        train(model, [batch()], gradient_clip_val=clip)
    assert all(weight.isfinite().all() for weight in weights(model).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_gradient_norm_is_logged_before_clipping(clip, tiny_folder):
    model = module(tiny_folder, "dpo", lr=1.0)
    state = SimpleNamespace(fn=None)
    model.trainer = SimpleNamespace(testing=False, state=state, precision="32-true")  # type: ignore[assignment]
    model.configure_model()
    before = weights(model)
    found = train(model, [batch()], gradient_clip_val=clip)["grad_norm"]
    moved = torch.cat([(weight - before[name]).flatten() for name, weight in weights(model).items()]).norm()
    assert moved == pytest.approx(found if clip is None else clip, rel=1e-4)
    assert found > 0.1


@pytest.mark.filterwarnings("ignore")
def test_a_test_after_a_fit_compares_with_the_untrained_model(tiny_folder):
    """The fit needs no reference, so the test is the first to use one, when the policy has already changed."""
    parts = {k: v() if isinstance(v, type) else v for k, v in PARTS["kto"].items()}
    model = HALOModule(
        ModelSpec(str(tiny_folder)),
        **{**parts, "reward": LogProb()},
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
    )
    train(model, [batch()])
    [figures] = quiet_trainer().test(model, DataLoader([batch()], batch_size=None))  # type: ignore[arg-type]
    assert figures["test/kl/sequence"] > 0


class Learnt(Logistic):
    """A logistic whose beta is trained, and neither shown nor stored as a number."""

    def __init__(self) -> None:
        super().__init__()
        del self.beta
        self.beta = torch.nn.Parameter(torch.tensor(0.5))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", ["kto", "aot_unpaired"])
def test_parameters_of_an_objective_are_trained_under_any_split(objective, tiny_folder):
    found = {}
    for rows in (None, 2):
        halo: Any = load_objective(f"{ROOT}/experiments/objectives/{objective}.yaml")
        names = ("reward", "reference_point", "feedback", "reflect_undesirable", "loss_offset")
        model = HALOModule(
            ModelSpec(str(tiny_folder)),
            **{name: getattr(halo, name) for name in names},
            value_function=Learnt(),
            micro_batch_rows=rows,
            optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
            lr_schedule="constant_with_warmup",
            warmup_ratio=0.0,
        )
        steps = [batch(seed=1), batch(seed=2)]
        if not halo.needs.mismatched:
            steps = [batch(seed=1, mismatched=False), batch(seed=2, mismatched=False)]
        figures = train(model, steps)
        assert "rewards/margins" in figures
        found[rows] = float(model.objective.halo.value_function.beta)
    assert found[2] == pytest.approx(found[None], rel=1e-5)
    assert abs(found[2] - 0.5) > 1e-6


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_does_not_round_the_objective(tiny_folder):
    """Under the Trainer's autocast, a matrix product in a plug-in would run in bfloat16."""
    seen = []

    class Product(Logistic):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            seen.append((u[None] @ u[:, None]).dtype)
            return super().forward(u)

    parts = {k: v() if isinstance(v, type) else v for k, v in PARTS["kto"].items()}
    for rows in (None, 2):
        model = HALOModule(ModelSpec(str(tiny_folder)), **{**parts, "value_function": Product()}, micro_batch_rows=rows)
        train(model, [batch()], precision="bf16-mixed")
    assert set(seen) == {torch.float32}


def test_missing_parts_of_an_objective_are_named(tiny_folder):
    with pytest.raises(ValueError, match="lacks reference_point, feedback, reflect_undesirable"):
        HALOModule(ModelSpec(str(tiny_folder)), reward=LogRatio(), value_function=Logistic())
    with pytest.raises(ValueError, match="no objective"):
        HALOModule(ModelSpec(str(tiny_folder)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [None, 2])
def test_a_second_pass_repeats_the_dropout_of_the_first(rows, tiny_gpt2_folder, monkeypatch):
    """Otherwise the gradient of the loss would be multiplied with gradients of another network."""
    model = module(tiny_gpt2_folder, micro_batch_rows=rows, lr=0.0)
    model.models.spec = replace(model.models.spec, dropout=True)
    model.objective = load_objective(ROOT / "experiments" / "objectives" / "aot.yaml")
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    score = _Step._score

    def noted(self: Any, index: Any, **how: Any) -> Any:
        rows = score(self, index, **how)
        seen.setdefault(tuple(index.numbers), []).append(rows.policy_logps.detach())
        return rows

    monkeypatch.setattr(_Step, "_score", noted)
    train(model, [batch(mismatched=False)])
    assert len(seen) == (3 if rows else 1)
    for passes in seen.values():
        assert len(passes) == (2 if rows else 1)
        assert torch.equal(passes[0], passes[-1])


@pytest.mark.filterwarnings("ignore")
def test_evaluation_does_not_advance_the_random_state(tiny_folder):
    parts = {k: v() if isinstance(v, type) else v for k, v in PARTS["kto"].items()}
    model = HALOModule(ModelSpec(str(tiny_folder)), **{**parts, "reference_point": SampledKL(max_new_tokens=4)})
    train(model, [batch(mismatched=False)])
    model.eval()
    before = torch.get_rng_state()
    one, other = (next(model.engine.evaluate(batch(mismatched=False), 3)).batch for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one.completions, other.completions))
    model.engine.step(batch(mismatched=False))
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore")
def test_half_precision_does_not_round_the_frequencies_of_positions(tiny_folder, monkeypatch):
    """As with from_pretrained in that dtype, so the exported model equals the trained one."""
    model = module(tiny_folder, lr=0.0)
    kinds: list[torch.dtype] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            kinds.append(pl_module.policy.model.rotary_emb.inv_freq.dtype)
            kinds.append(next(pl_module.policy.parameters()).dtype)

    loaded: list[torch.dtype] = []

    def load(*arguments: Any) -> Any:
        loaded.append(next((one := load_model(*arguments)).parameters()).dtype)
        return one

    monkeypatch.setattr("halos_pl.training.models.load_model", load)
    figures = train(model, [batch()], precision="bf16-true", callbacks=[Look()])
    assert kinds == [torch.float32, torch.bfloat16]
    assert loaded == [torch.bfloat16]  # never as a float32 copy
    assert figures["outcome/reward"] == 0


def test_models_that_mix_rows_are_refused(tiny_gpt2_folder, monkeypatch):
    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2_folder, attn_implementation="eager")
    assert padding_fault(plain) is None
    # Positions that count the padding, as of models that take none.
    monkeypatch.setattr("halos_pl.policy.logprobs.accepts", lambda model, name: name != "position_ids")
    assert "beside longer rows" in str(padding_fault(plain))
    monkeypatch.undo()
    torch.manual_seed(0)
    both_ways = BertLMHeadModel(BertConfig(vocab_size=300, initializer_range=0.5, **SMALL))
    assert "depends on later tokens" in str(padding_fault(both_ways))
    model = module(tiny_gpt2_folder, prefix_sharing="never")
    monkeypatch.setattr("halos_pl.policy.logprobs.accepts", lambda model, name: name != "position_ids")
    with pytest.raises(ModelError, match=r"the policy cannot be used: beside longer rows"):
        train(model, [batch()])


def test_a_head_named_decoder_is_not_mistaken_for_the_layers(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.get_decoder = model.get_output_embeddings
    assert decoder_and_head(model) == (model.model, model.lm_head)
