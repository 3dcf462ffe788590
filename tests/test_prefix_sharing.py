"""Shared prefixes: the same log-probs and gradients as row by row, for families of models and any shape of a batch."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import GROUPED, MODELS, V
from run_halos import UNEQUAL, binary_data, fit, metrics, pair_data
from shared_rows import batches, example, model, results, spread
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from halos_pl.batch import TokenBatch
from halos_pl.cli.main import main
from halos_pl.policy import head, prefix_sharing
from halos_pl.policy.kl import compared_logps
from halos_pl.policy.logprobs import padded_logps
from halos_pl.policy.prefix_sharing import shared_logps
from halos_pl.policy.reference import FixedModel
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.self_test import sharing_fault
from halos_pl.policy.spec import ModelError

MIXED = {"layer_types": ["conv", "full_attention"]}


UNFIT = {
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8)), "attention is eager"),
    "bloom": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
        "attention is eager",
    ),
    # Its convolutions run on from one row into the next.
    "lfm2": (lambda: spread(Lfm2ForCausalLM(Lfm2Config(**GROUPED, **MIXED))), "its log-probs change"),
    "lfm2, bfloat16": (
        lambda: spread(Lfm2ForCausalLM(Lfm2Config(**GROUPED, **MIXED)), std=0.1).bfloat16(),
        "tokens of one row reach another row",
    ),
    # No made-up row is long enough to leave its window.
    "qwen2-moe, window": (
        lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**GROUPED, sliding_window=24, use_sliding_window=True, num_experts=4)
        ),
        "sliding window of 24",
    ),
}


def assert_equal(made: Any, batch: TokenBatch, tolerance: float = 1e-5) -> None:
    (a, plain), (b, packed) = (results(made, batch, how) for how in (padded_logps, shared_logps))
    assert (a - b).abs().max() <= tolerance * (1 + a.abs().max())
    if bool((~batch.labels.mismatched).any()):
        assert plain.keys() == packed.keys()
        size = max(g.abs().max() for g in plain.values())
        for name, gradient in plain.items():
            assert (gradient - packed[name]).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("name", MODELS)
@given(batch=batches())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_trees_equal_rows(name: str, batch: TokenBatch) -> None:
    assert_equal(model(name), batch)


@given(batch=batches(), logits=st.sampled_from([1, 3 * V, 7 * V + 1]))
@settings(max_examples=9, deadline=None, derandomize=True)
def test_log_probs_by_parts_equal_those_at_once(batch: TokenBatch, logits: int) -> None:
    before, head.LOGITS = head.LOGITS, logits
    try:
        assert_equal(model("llama"), batch)
    finally:
        head.LOGITS = before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_with_gradient_checkpointing(name: str) -> None:
    made = model(name)
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for seed in range(3):
        assert_equal(made, example(seed))


def test_in_bfloat16_within_its_rounding() -> None:
    made = model("llama", torch.bfloat16)
    batch = example(0)
    (a, _), (b, _) = (results(made, batch, how) for how in (padded_logps, shared_logps))
    assert a.dtype == b.dtype == torch.float32
    exact = results(made.float(), batch, padded_logps)[0]
    # Neither is farther from what float32 says than bfloat16's three digits allow of sums over a few layers.
    for found in (a, b):
        assert (found - exact).abs().max() <= 0.03 * exact.abs().max()


def test_with_an_adapter_and_with_it_off() -> None:
    from peft import LoraConfig, get_peft_model

    made: Any = get_peft_model(model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    batch = example(1)
    wanted = padded_logps(made, batch)
    with made.disable_adapter():
        wanted_off = padded_logps(made, batch)
    scorer = Scorer(made, prefix_sharing="always")
    torch.testing.assert_close(scorer(batch), wanted, rtol=1e-5, atol=1e-5)
    with made.disable_adapter():
        torch.testing.assert_close(scorer(batch), wanted_off, rtol=1e-5, atol=1e-5)
    assert (wanted - wanted_off).abs().max() > 0.1


def test_mismatched_rows_get_no_gradient_and_change_none() -> None:
    made, batch = model("llama"), example(2)
    everything = results(made, batch, shared_logps)
    alone = results(made, batch.select((~batch.labels.mismatched).nonzero().squeeze(1)), shared_logps)
    for name, gradient in alone[1].items():
        assert torch.equal(everything[1][name], gradient)
    made.config._attn_implementation = prefix_sharing.NAME
    found = shared_logps(made, batch)
    assert (
        torch.autograd.grad(found[batch.labels.mismatched].sum() + 0 * found.sum(), made.lm_head.weight)[0].abs().max()
        == 0
    )


def test_each_distinct_token_is_computed_once() -> None:
    made, batch = model("llama"), example(3)
    seen: list[int] = []
    made.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    results(made, batch, shared_logps)
    # The last token of a completion predicts nothing. Prompt 2 has one mismatched row only, in the second pass.
    rows = [len(c) - 1 for c in batch.completions]
    assert seen == [7 + 1 + sum(rows[:4]), 4 + sum(rows[4:])]


def test_a_sharded_model_makes_a_pass_without_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks may have tokens in the pass, and need this rank's weights."""
    tested, whole = model("llama"), example(0)
    # The mismatched row's only token is predicted by a prompt that the first pass computes.
    batch = whole.select(torch.tensor([0, 1]))
    batch.labels.mismatched = torch.tensor([False, True])
    tested.config._attn_implementation = prefix_sharing.NAME
    wanted = shared_logps(tested, batch)
    sizes: list[int] = []
    tested.model.embed_tokens.register_forward_hook(lambda module, args, out: sizes.append(args[0].numel()))
    for sharded, expected in ((False, [7 + 2]), (True, [7 + 2, 1])):
        monkeypatch.setattr(prefix_sharing, "is_sharded", lambda _, answer=sharded: answer)
        sizes.clear()
        assert torch.equal(shared_logps(tested, batch), wanted)
        assert sizes == expected


def test_whether_a_model_shares_prefixes_is_found_by_trying() -> None:
    for name in MODELS:
        made = model(name)
        before = made.config._attn_implementation
        assert sharing_fault(made) is None
        assert (made.training, made.config._attn_implementation) == (True, before)  # the test leaves no trace
        assert Scorer(made).shares_prefixes
    for make, why in UNFIT.values():
        unfit: Any = make()
        assert why in str(sharing_fault(unfit))
        with pytest.raises(ModelError, match=re.escape(why)):
            Scorer(unfit, prefix_sharing="always")


def test_a_model_that_cannot_share_computes_each_row_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer(UNFIT["gemma2"][0](), name="the policy")
    assert not scorer.shares_prefixes
    assert scorer(example(0)).shape == (7, 9)
    assert "the policy" in caplog.text

    class Odd(LlamaForCausalLM):
        """Its layers never hear of shared prefixes."""

        def get_decoder(self) -> Any:
            inner = self.model
            return lambda layout, **inputs: inner(**inputs)

    odd = Odd(LlamaConfig(**GROUPED))
    assert sharing_fault(odd) is not None
    assert odd.config._attn_implementation == "sdpa"


def test_a_model_that_shares_prefixes_still_samples() -> None:
    made = model("llama").eval()
    ids = torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = made.generate(ids, **options)
    assert Scorer(made).shares_prefixes
    assert torch.equal(made.generate(ids, **options), plain)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ("kto", "binary"),
        ("dpo", "pairs"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("bco", "binary"), ("grpo", "pairs"), ("orpo", "pairs"))
        ),
    ],
)
def test_a_run_is_the_same_shared_and_padded(
    objective: str, kind: str, tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = (binary_data if kind == "binary" else pair_data)(tmp_path / "data.jsonl", 12)
    for sharing in ("always", "never"):
        options = (f"--model.prefix_sharing={sharing}", "--trainer.max_steps=3")
        main(fit(tiny_folder, objective, data, tmp_path / sharing, *options))
    shared, padded = (metrics(tmp_path / sharing) for sharing in ("always", "never"))
    assert len(shared) == len(padded) == 3
    for a, b in zip(shared, padded, strict=True):
        a, b = ({k: float(v) for k, v in row.items() if k not in UNEQUAL} for row in (a, b))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_sharing_is_refused_where_a_model_cannot(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = binary_data(tmp_path / "data.jsonl", 8)
    eager = ("--model.policy.attn_implementation=eager", "--trainer.max_steps=1")
    with pytest.raises(SystemExit):
        main(fit(tiny_folder, "kto", data, tmp_path / "a", *eager, "--model.prefix_sharing=always"))
    assert "model.policy.attn_implementation is eager" in capfd.readouterr().err
    main(fit(tiny_folder, "kto", data, tmp_path / "b", *eager))
    assert "its attention is eager" in caplog.text


@pytest.mark.parametrize(
    "name", ["llama, tied", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt-neox", "gemma"))]
)
@settings(max_examples=8, deadline=None)
@given(batch=batches(), most=st.sampled_from([V, 5 * V, 1 << 23]))
def test_two_models_beside_each_other_are_compared_as_row_by_row(name: str, batch: TokenBatch, most: int) -> None:
    policy, reference = model(name), model(name)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    apart = Scorer(copy.deepcopy(policy), prefix_sharing="never")
    wanted = compared_logps(apart, FixedModel(copy.deepcopy(reference), apart), batch)
    shared = Scorer(policy, prefix_sharing="always")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "LOGITS", most)
        found = compared_logps(shared, FixedModel(reference, shared), batch)
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found[0], shared(batch).detach(), rtol=1e-5, atol=2e-5)
    assert bool((found[2] >= -1e-5).all())
