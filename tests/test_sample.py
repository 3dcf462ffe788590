"""Sampling: against a loop written out here, whatever the batch; and the files around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from halos_pl.data.example import DataError, Prompt
from halos_pl.data.prompt_files import read_prompts
from halos_pl.data.tokenize import encode_prompt
from halos_pl.policy.loading import LoRASpec, ModelSpec, load_model, load_tokenizer
from halos_pl.policy.sampling import Sample, generate
from halos_pl.sampling.sample import sample

PROMPTS: list[Prompt] = [
    "Could you tell me",
    "A",
    [{"role": "user", "content": "How many eggs does a duck lay in a day, and how many are left?"}],
    "The answer is forty-two, and the question was",
    [{"role": "system", "content": "Bake."}, {"role": "user", "content": "Bread?"}],
]


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    return load_model(ModelSpec(str(tiny_folder)))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(ModelSpec(str(tiny_folder)))


def ids(found: list[list[Sample]]) -> list[list[list[int]]]:
    return [[sample.completion_ids for sample in samples] for samples in found]


def greedy(model: Any, prompt: list[int], eos: set[int], most: int) -> list[int]:
    """The likeliest token, again and again: no cache, no padding, one prompt."""
    out: list[int] = []
    with torch.no_grad():
        while len(out) < most and not (out and out[-1] in eos):
            out.append(int(model.eval()(torch.tensor([prompt + out])).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_gpt2_folder"])  # rotary and absolute positions
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_is_the_argmax_loop_whatever_the_batch(
    folder: str, batch_size: int, request: pytest.FixtureRequest
) -> None:
    spec = ModelSpec(str(request.getfixturevalue(folder)))
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0, batch_size=batch_size, progress=False)
    for prompt, (one,) in zip(PROMPTS, found, strict=True):
        encoded = encode_prompt(tokenizer, prompt)
        assert one.prompt_ids == encoded
        assert one.completion_ids == greedy(model, encoded, {tokenizer.eos_token_id}, 12)


def test_same_seed_same_samples_whatever_was_drawn_before(model: Any, tokenizer: Any) -> None:
    def drawn(seed: int) -> list[list[list[int]]]:
        return ids(generate(model, tokenizer, PROMPTS, max_new_tokens=8, num_samples=2, seed=seed, progress=False))

    first = drawn(3)
    torch.rand(17)
    state = torch.get_rng_state()
    assert drawn(3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(4) != first
    assert all(a != b for a, b in first)  # the samples of one prompt are not copies


def test_samples_follow_the_models_distribution(model: Any, tokenizer: Any) -> None:
    n = 4000
    (found,) = generate(
        model, tokenizer, ["A"], max_new_tokens=1, temperature=0.7, num_samples=n, batch_size=n, progress=False
    )
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(tokenizer, "A")])).logits[0, -1]
    expected = (logits / 0.7).softmax(0)
    counts = torch.bincount(torch.tensor([s.completion_ids[0] for s in found]), minlength=len(expected))
    standard_error = (expected * (1 - expected) / n).sqrt().clamp(min=1 / n)
    assert ((counts / n - expected).abs() / standard_error).max() < 5


def test_top_p_keeps_to_the_likeliest(model: Any, tokenizer: Any) -> None:
    narrow = generate(model, tokenizer, ["A"], max_new_tokens=6, top_p=1e-6, num_samples=3, progress=False)
    assert ids(narrow) == [[greedy(model, encode_prompt(tokenizer, "A"), {tokenizer.eos_token_id}, 6)] * 3]


def with_end_at(model: Any, tokenizer: Any, prompt: str, step: int) -> int:
    """The token that greedy decoding gives at ``step``, to be made an end."""
    return greedy(model, encode_prompt(tokenizer, prompt), {tokenizer.eos_token_id}, step + 1)[step]


@pytest.mark.parametrize("most", [2, 3, 6])
def test_finished_means_that_an_end_was_given(model: Any, tokenizer: Any, most: int) -> None:
    end = with_end_at(model, tokenizer, "Could you tell me", 2)
    first = greedy(model, encode_prompt(tokenizer, "Could you tell me"), {end}, 6)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]  # as Llama 3: ends of turn and of text
    ((sample,),) = generate(model, tokenizer, ["Could you tell me"], max_new_tokens=most, temperature=0, progress=False)
    assert sample.finished == (most >= len(first))
    assert sample.completion_ids == first[:most]


def test_padding_that_is_eos_does_not_end_an_answer(model: Any, tokenizer: Any, tiny_folder: Path) -> None:
    same = load_tokenizer(ModelSpec(str(tiny_folder)))
    same.pad_token = same.eos_token
    settings: dict[str, Any] = {"max_new_tokens": 10, "temperature": 0, "progress": False}
    expected = generate(model, tokenizer, PROMPTS, **settings)
    assert generate(model, same, PROMPTS, **settings) == expected


def test_text_has_no_special_tokens(model: Any, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    with torch.no_grad():  # a model that says one word and stops
        word = tokenizer("bread", add_special_tokens=False)["input_ids"][0]
        model.lm_head.weight.zero_()
        hidden = model.model(torch.tensor([encode_prompt(tokenizer, "A")])).last_hidden_state[0, -1]
        model.lm_head.weight[word] = hidden
        after = model.model(torch.tensor([[*encode_prompt(tokenizer, "A"), word]])).last_hidden_state[0, -1]
        model.lm_head.weight[eos] = 2 * (after - hidden * (after @ hidden) / (hidden @ hidden))
    ((sample,),) = generate(model, tokenizer, ["A"], max_new_tokens=5, temperature=0, progress=False)
    assert sample.completion_ids == [word, eos]
    assert sample.finished
    assert sample.text == tokenizer.decode([word]).strip()


@pytest.mark.parametrize("lora", [None, LoRASpec(r=2)])
def test_settings_of_the_models_folder_are_set_aside_and_put_back(
    tiny_folder: Path, tokenizer: Any, lora: LoRASpec | None
) -> None:
    model: Any = load_model(ModelSpec(str(tiny_folder), lora=lora))
    inner = model.get_base_model() if lora else model
    plain = ids(generate(model, tokenizer, PROMPTS, max_new_tokens=10, progress=False))
    own = GenerationConfig(repetition_penalty=50.0, min_p=0.9, top_k=1, eos_token_id=tokenizer.eos_token_id)
    inner.generation_config = own
    assert ids(generate(model, tokenizer, PROMPTS, max_new_tokens=10, progress=False)) == plain
    assert inner.generation_config is own


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_put_back_also_after_an_error(model: Any, tokenizer: Any, training: bool) -> None:
    model.train(training)
    generate(model, tokenizer, ["A"], max_new_tokens=2, progress=False)
    assert model.training == training

    def fails(*_: Any, **__: Any) -> None:
        assert not model.training
        raise RuntimeError("planted")

    model.generate = fails
    with pytest.raises(RuntimeError, match="planted"):
        generate(model, tokenizer, ["A"], max_new_tokens=2, progress=False)
    assert model.training == training


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": 0.5, "temperature": 0.0},
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"batch_size": 0},
    ],
)
def test_numbers_out_of_range_are_refused(model: Any, tokenizer: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
        generate(model, tokenizer, ["A"], progress=False, **wrong)


# Files -------------------------------------------------------------------------------------------------


def test_prompts_of_a_text_file_and_of_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffWhy?\r\n\n  \nWie geht's, Jörg?".encode())
    assert read_prompts(text) == ["Why?", "Wie geht's, Jörg?"]
    message = [{"role": "user", "content": "one\u2028line"}]
    lines.write_text(json.dumps({"prompt": message, "other": 1}, ensure_ascii=False) + '\n\n{"prompt": "Why?"}\n')
    assert read_prompts(lines) == [message, "Why?"]


@pytest.mark.parametrize(
    "second",
    [
        b"{",
        b"[]",
        b'"text"',
        b"{}",
        b'{"prompt": 1}',
        b'{"prompt": " "}',
        b'{"prompt": []}',
        b'{"prompt": [{"role": "user"}]}',
        b'{"prompt": [{"role": "user", "content": 5}]}',
        b'{"prompt": "\xff"}',
    ],
)
def test_faults_in_prompts_name_file_and_line(tmp_path: Path, second: bytes) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "Why?"}\n' + second + b"\n")
    with pytest.raises(DataError, match=rf"{file}:2: "):
        read_prompts(file)


@pytest.mark.parametrize(("name", "content"), [("none.txt", None), ("blank.txt", "\n \n")])
def test_missing_and_empty_files_are_refused(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_prompts(tmp_path / name)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_file_in_file_out(tiny_folder: Path, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    """Prompts are written as they were put to the model."""
    file = tmp_path / "p.txt"
    file.write_text("Why?\nHow many eggs?\n")
    texts: list[Prompt] = ["Why?", "How many eggs?"]
    messages: list[Prompt] = [[{"role": "user", "content": text}] for text in texts]
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
    for convention, asked in (("chat", messages), ("plain", texts), (None, texts)):
        sample(str(tiny_folder), prompts=str(file), text_prompts=convention, overwrite=True, **settings)  # type: ignore[arg-type]
        written = rows(tmp_path / "p.completions.jsonl")
        assert [row["prompt"] for row in written] == asked
        expected = generate(model, tokenizer, asked, progress=False, max_new_tokens=6, temperature=0)
        assert [row["completions"] for row in written] == [[s.raw for s in found] for found in expected]
        assert [row["finished"] for row in written] == [[s.finished for s in found] for found in expected]


def test_folder_of_an_adapter(adapter: tuple[Any, Path], tiny_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    policy, own = adapter
    (tmp_path / "p.txt").write_text("Why?\n")
    written = []
    for folder in (own, tiny_folder):
        out = tmp_path / "out.jsonl"
        settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}
        sample(str(folder), prompts=str(tmp_path / "p.txt"), out=str(out), overwrite=True, **settings)
        written.append(rows(out)[0]["completions"])
    expected = generate(policy, tokenizer, ["Why?"], max_new_tokens=8, temperature=0, progress=False)
    assert written[0] == [expected[0][0].raw]
    assert written[0] != written[1]


def test_a_number_out_of_range_leaves_the_earlier_file(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Why?\n")
    (tmp_path / "p.completions.jsonl").write_text("kept\n")
    for wrong in ({"top_p": 1.5}, {"n": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample(str(tiny_folder), prompts=str(tmp_path / "p.txt"), **wrong)  # type: ignore[arg-type]
    assert (tmp_path / "p.completions.jsonl").read_text() == "kept\n"
