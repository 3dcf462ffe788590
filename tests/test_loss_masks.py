"""Completions of which not every token carries the loss: the same losses however they are computed."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import fit, metrics
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halos_pl.batch import TokenBatch
from halos_pl.cli.main import main
from halos_pl.data.datamodule import FeedbackDataModule
from halos_pl.data.example import DataError, Example
from halos_pl.data.template import NAMED, template_of, use_template
from halos_pl.data.tokenize import Encoder, Tokens
from halos_pl.labels import Labels
from halos_pl.policy.kl import compared_logps
from halos_pl.policy.logprobs import completion_mask, padded_logps
from halos_pl.policy.reference import FixedModel
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.store import keys
from halos_pl.testing import tiny_tokenizer
from halos_pl.training.trained import load_run

V = 61
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
}


def batch() -> TokenBatch:
    """Rows that share prompts, of which some carry the loss in parts, and a mismatched row with such a completion."""
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> torch.Tensor:
        return torch.randint(0, V, (n,), generator=draw)

    masks = [[1, 1, 0, 0, 1], None, [0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    return TokenBatch(
        prompts=[some(4), some(1)],
        completions=[some(5), some(2), some(3), some(4), some(4)],
        prompt=torch.tensor([0, 0, 0, 1, 1]),
        labels=Labels(
            desirable=torch.tensor([True, False, True, False, False]),
            mismatched=torch.tensor([False, False, False, False, True]),
        ),
        row_ids=list("abcde"),
        loss=[None if mask is None else torch.tensor(mask, dtype=torch.bool) for mask in masks],
    )


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_whole_completion_at_the_tokens_with_loss(name: str) -> None:
    torch.manual_seed(0)
    model, rows = MODELS[name]().eval(), batch()
    whole, mask = padded_logps(model, replace(rows, loss=None)), completion_mask(rows)
    assert mask.sum(dim=1).tolist() == [3, 2, 1, 2, 2]
    wanted = torch.where(mask, whole, 0.0)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)) * (~rows.labels.mismatched)[:, None]
    gradients = []
    for prefix_sharing in ("never", "always"):
        scorer = Scorer(model, prefix_sharing=prefix_sharing)  # type: ignore[arg-type]
        found = scorer(rows)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
        model.zero_grad()
        (found * weight).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        some = torch.tensor([3, 0])
        torch.testing.assert_close(scorer(rows.select(some)), wanted[some], atol=2e-5, rtol=0)
        policy, reference, kl = compared_logps(scorer, FixedModel(deepcopy(model), scorer), rows)
    torch.testing.assert_close(policy, wanted.detach(), atol=2e-5, rtol=1e-5)
    assert not policy[~mask].any()
    assert not reference[~mask].any()
    assert not kl[~mask].any()


def test_a_stored_log_prob_is_one_of_the_same_tokens_with_loss() -> None:
    rows = batch()
    named, whole = keys("m", rows), keys("m", replace(rows, loss=None))
    assert [a == b for a, b in zip(named, whole, strict=True)] == [False, True, False, False, False]


def talks(path: Path, count: int = 8) -> Path:
    rows = []
    for i in range(count):
        said = [
            {"role": "user", "content": f"Could you tell me {i}?"},
            {"role": "assistant", "content": f"The answer is {i}" + " so" * (i % 3)},
            {"role": "user", "content": "and the question?"},
            {"role": "assistant", "content": "lost" + " on the way" * (i % 2)},
        ]
        rows.append({"messages": said, "label": i % 2 == 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A base model: without a chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tiny_tokenizer(None).save_pretrained(folder)
    assert not (folder / "chat_template.jinja").exists()
    return folder


@pytest.mark.slow
def test_a_fit_on_all_turns_with_a_template_of_ones_own(tmp_path: Path, base_folder: Path) -> None:
    data, template = talks(tmp_path / "a.jsonl"), tmp_path / "own.jinja"
    template.write_text(NAMED["chatml"].replace("assistant\\n", "assistant\\n\\n"))
    runs = {}
    for name, options in {
        "whole": ["--model.prefix_sharing=always"],
        "parts": ["--model.prefix_sharing=never", "--model.micro_batch_rows=1"],
        "last": ["--data.loss_on=last"],
    }.items():
        runs[name] = tmp_path / name
        words = ["--data.loss_on=all", f"--data.chat_template={template}", "--trainer.max_steps=3", *options]
        main(fit(base_folder, "kto", data, runs[name], *words))
    found = {name: [float(row["loss"]) for row in metrics(run) if "loss" in row] for name, run in runs.items()}
    assert found["whole"] == pytest.approx(found["parts"], rel=1e-4)
    assert found["whole"] != pytest.approx(found["last"], rel=1e-4)
    text = template.read_text()
    template.unlink()  # the run has its own copy
    assert load_run(runs["whole"]).tokenizer.chat_template == text
    main(["export", str(runs["whole"]), str(tmp_path / "out")])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text


def test_a_template_that_is_none(tmp_path: Path) -> None:
    assert template_of("{{ messages }}") == "{{ messages }}"
    assert template_of("chatml") == NAMED["chatml"]
    (tmp_path / "a.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert template_of(str(tmp_path / "a.jinja")) == "{{ messages }}"
    tiny_tokenizer("{{ messages }} {{ 1 }}").save_pretrained(tmp_path / "model")
    assert template_of(str(tmp_path / "model")) == "{{ messages }} {{ 1 }}"
    config = tmp_path / "model" / "tokenizer_config.json"  # as older folders have several
    (tmp_path / "model" / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ messages }}"}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    assert template_of(str(tmp_path / "model")) == "{{ messages }}"
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    (tmp_path / "empty.jinja").touch()
    (tmp_path / "b.jinja").write_bytes(b"\xff")
    for wrong in ("absent.jinja", "base", "empty.jinja", "b.jinja"):
        with pytest.raises(DataError, match=rf"data.chat_template: .*{wrong}"):
            FeedbackDataModule("a.jsonl", chat_template=str(tmp_path / wrong))
    with pytest.raises(ValueError, match="loss_on"):
        FeedbackDataModule("a.jsonl", loss_on="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text_prompts"):
        FeedbackDataModule("a.jsonl", text_prompts="both")  # type: ignore[arg-type]


def without_its_tokens(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer to which ChatML's tokens are text, as they are to GPT-2's, Pythia's and Mistral's."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(ByteLevel.alphabet())}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def test_chatml_ends_turns_with_eos_where_its_end_is_no_token() -> None:
    """Else answers would end in the text <|im_end|>, when they are sampled too, and rules would see it."""
    tokenizer, messages = without_its_tokens(), [{"role": "user", "content": "a"}]
    use_template(tokenizer, template_of("chatml"))
    encoder = Encoder(tokenizer, loss_on="all")
    talk = [{"role": "assistant", "content": "b"}, *messages, {"role": "assistant", "content": "c"}]
    [found] = encoder.encode([Example(messages, (talk,), (None,), "a:1")])
    assert isinstance(found, Tokens)
    assert [tokenizer.decode(found.completions[0][slice(*span)]) for span in found.spans[0]] == [
        "b<|endoftext|>",
        "c<|endoftext|>",
    ]
    assert not encoder.notes
    known = tiny_tokenizer(None)
    use_template(known, template_of("chatml"))
    assert known.chat_template == NAMED["chatml"]


def test_a_template_whose_end_of_a_turn_is_no_token_is_told() -> None:
    form = "{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n### end\n{% endfor %}### assistant\n"
    encoder = Encoder(without_its_tokens(form))
    [found] = encoder.encode([Example([{"role": "user", "content": "a"}], ("b",), (None,), "a:1")])
    assert isinstance(found, Tokens)
    [note] = encoder.notes
    assert "'### end\\n### assistant'" in note
    assert "eos_token" in note
    silent = Encoder(without_its_tokens(form.replace("### end\n", "{{ eos_token }}").replace("### assistant\n", "")))
    list(silent.encode([Example([{"role": "user", "content": "a"}], ("b",), (None,), "a:1")]))
    assert not silent.notes
