"""What a model has no row or no position for is refused by name before it is computed.

transformers#11102 (a tokenizer larger than the embedding), gpt-neo#273 (generation past the positions).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit, refused
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, LlamaForCausalLM

from halos_pl.cli.main import main
from halos_pl.policy.limits import check_vocabulary
from halos_pl.policy.loading import ModelError, ModelSpec, load_model, load_tokenizer
from halos_pl.policy.sampling import generate, sample_tokens


def larger(tiny: Path, folder: Path) -> Path:
    """The tiny model with a tokenizer that knows two tokens more than its embedding."""
    tokenizer = load_tokenizer(ModelSpec(str(tiny)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})  # type: ignore[dict-item]
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def larger_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return larger(tiny_folder, tmp_path_factory.mktemp("larger"))


def rows_with_a_tool(path: Path, line: int, key: str) -> Path:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": i % 3 != 0} for i in range(40)]
    rows[line - 1][key] = "<tool>x</tool>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_with_a_token_that_the_embedding_lacks(larger_folder: Path, tmp_path: Path, capfd: Any) -> None:
    data = rows_with_a_tool(tmp_path / "data.jsonl", 37, "completion")
    said = refused(capfd, fit(larger_folder, "kto", data, tmp_path / "run", "--data.shuffle=false"))
    for word in ("data.jsonl:37", "'</tool>' (361)", "'<tool>' (360)", "360 rows", "resize_token_embeddings(362)"):
        assert word in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))  # nothing was trained


@pytest.mark.slow
def test_a_larger_tokenizer_may_be_used_where_no_row_has_its_tokens(
    tiny_folder: Path, larger_folder: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="<tool>"):
        main(fit(larger_folder, "kto", binary_data(tmp_path / "d.jsonl"), tmp_path / "r", "--trainer.max_steps=1"))
    # And a larger embedding than vocabulary, as many models have, is fine.
    model, tokenizer = (load(ModelSpec(str(tiny_folder))) for load in (load_model, load_tokenizer))
    model.resize_token_embeddings(384)  # type: ignore[operator]
    check_vocabulary(model, tokenizer, [("row", [383])])  # type: ignore[arg-type]


def test_a_prompt_with_a_token_that_the_embedding_lacks(larger_folder: Path, tmp_path: Path, capfd: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("question 1\n\nwhat is <tool>\n")
    said = refused(capfd, ["sample", str(larger_folder), f"--prompts={prompts}", "--max_new_tokens=2"])
    assert f"{prompts}:3" in said
    assert "'<tool>' (360)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]  # nothing is begun


@pytest.mark.parametrize("pad", [None, 10**6])
def test_padding_that_is_no_row(tiny_folder: Path, pad: int | None) -> None:
    model = load_model(ModelSpec(str(tiny_folder)))
    found = []
    for token in (pad, 0):
        torch.manual_seed(0)
        found.append(sample_tokens(model, [[5, 9], [7, 8, 9]], stops=[2, 10**6, -1], pad=token, max_new_tokens=9))
    assert found[0] == found[1]


# -- positions ------------------------------------------------------------------------------------------

MOST = 64


@pytest.fixture(scope="module")
def short_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with 64 positions."""
    folder = tmp_path_factory.mktemp("short")
    tokenizer = load_tokenizer(ModelSpec(str(tiny_folder)))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MOST, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=2, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_completions_end_where_the_positions_do(short_folder: Path) -> None:
    """In a batch as alone: each has the tokens that a loop without a cache gives it."""
    model = load_model(ModelSpec(str(short_folder))).eval()
    prompts = [[5] * n for n in (3, 40, 40, 61, 63)]
    most = 30
    found = sample_tokens(model, prompts, stops=[], pad=0, max_new_tokens=most, temperature=0, batch_size=5)
    for prompt, completion in zip(prompts, found, strict=True):
        expected: list[int] = []
        while len(expected) < min(most, MOST - len(prompt)) and 2 not in expected:
            with torch.no_grad():
                expected.append(int(model(torch.tensor([prompt + expected])).logits[0, -1].argmax()))
        assert completion == expected
    assert max(map(len, found)) == most or 2 in found[0]


def test_sampling_beyond_the_positions(short_folder: Path, tmp_path: Path, capfd: Any) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "why"}) + "\n" + json.dumps({"prompt": "xyz " * 40}) + "\n")
    words = ["sample", str(short_folder), f"--prompts={prompts}"]
    said = refused(capfd, words)
    assert f"{prompts}:2" in said
    assert f"{MOST} positions" in said
    prompts.write_text(json.dumps({"prompt": "why"}) + "\n")
    with pytest.warns(UserWarning, match=f"{MOST} positions"):
        main(words)  # 128 new tokens by default
    assert json.loads((tmp_path / "prompts.completions.jsonl").read_text())["completions"]


def test_a_model_without_sdpa_attention(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    """gpt-neo#273: generation past the positions of a GPT-Neo, for which transformers has eager attention alone."""
    tokenizer = load_tokenizer(ModelSpec(str(tiny_folder)))
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": MOST}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 16}
    config = GPTNeoConfig(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=2, **sizes, **kinds)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path / "neo")
    tokenizer.save_pretrained(tmp_path / "neo")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("why " * 20 + "\n")
    with pytest.warns(UserWarning, match=f"{MOST} positions"):
        main(["sample", str(tmp_path / "neo"), f"--prompts={prompts}"])
    prompts.write_text("xyz " * 40 + "\n")
    assert f"{MOST} positions" in refused(
        capfd, ["sample", str(tmp_path / "neo"), f"--prompts={prompts}", "--overwrite=true"]
    )
    with pytest.raises(ModelError, match="attn_implementation to eager"):
        load_model(ModelSpec(str(tmp_path / "neo")))


def test_a_warning_where_positions_are_rotary(tiny_folder: Path) -> None:
    """They can be computed for any place, but the model was not trained there."""
    model, tokenizer = (load(ModelSpec(str(tiny_folder))) for load in (load_model, load_tokenizer))
    model.config.max_position_embeddings = 8  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="8 positions"):
        ((sample,),) = generate(model, tokenizer, ["why"], max_new_tokens=12, progress=False, seed=1)  # type: ignore[arg-type]
    assert len(sample.completion_ids) == 12 or sample.finished
    with pytest.raises(ModelError, match=r"row 2: .* 8 positions"):
        generate(model, tokenizer, ["why", "why " * 20], names=["row 1", "row 2"], max_new_tokens=1, progress=False)  # type: ignore[arg-type]


@pytest.mark.slow
def test_samples_for_a_reference_point_end_where_the_positions_do(short_folder: Path, tmp_path: Path) -> None:
    words = fit(short_folder, "kto", binary_data(tmp_path / "d.jsonl"), tmp_path / "r", "--trainer.max_steps=1")
    main([*words, "--model.reference_point=SampledKL", "--model.reference_point.max_new_tokens=100"])


@pytest.mark.slow
def test_prompts_of_an_evaluation(short_folder: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "r"
    main(fit(short_folder, "sft", binary_data(tmp_path / "d.jsonl"), run, "--trainer.max_steps=1"))
    (tmp_path / "prompts.txt").write_text("why\n" + "xyz " * 40 + "\n")
    said = refused(capfd, ["evaluate", str(run), f"--prompts={tmp_path}/prompts.txt"])
    assert "prompts.txt:2" in said


@pytest.mark.slow
def test_the_row_that_is_named_is_one_that_is_trained_on(larger_folder: Path, tmp_path: Path) -> None:
    """A row that is dropped does not matter."""
    data = rows_with_a_tool(tmp_path / "data.jsonl", 4, "completion")  # undesirable, which SFT does not use
    with pytest.warns(UserWarning, match="2 tokens without a row"):
        main(fit(larger_folder, "sft", data, tmp_path / "run", "--trainer.max_steps=1"))
    with pytest.raises(ModelError, match="a:2"):
        check_vocabulary(
            load_model(ModelSpec(str(larger_folder))),
            load_tokenizer(ModelSpec(str(larger_folder))),
            [("a:1", [1, 359]), ("a:2", [1, 360])],
        )
