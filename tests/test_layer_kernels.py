"""Compiled layers and Liger's kernels: what runs in place of a model's own layers, and where."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import halos_pl.policy.liger
from halos_pl.batch import TokenBatch
from halos_pl.cli.main import main
from halos_pl.labels import Labels
from halos_pl.policy.architecture import blocks, layer_parts
from halos_pl.policy.compilation import compile_layers, compiles_whole
from halos_pl.policy.liger import apply_liger, check_liger
from halos_pl.policy.loading import ModelError, ModelSpec, load_model
from halos_pl.policy.prefix_sharing import NAME
from halos_pl.policy.scorer import Scorer


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes, **settings)).train()


def step(seed: int) -> TokenBatch:
    """A batch with a number of prompts and rows of its own."""
    draw = torch.Generator().manual_seed(seed)

    def length(least: int, most: int) -> int:
        return int(torch.randint(least, most, (1,), generator=draw))

    def ids(count: int) -> torch.Tensor:
        return torch.randint(0, 100, (count,), generator=draw)

    prompts, rows = [ids(length(3, 20)) for _ in range(2 + seed)], 3 + seed
    return TokenBatch(
        prompts=prompts,
        completions=[ids(length(2, 20)) for _ in range(rows)],
        prompt=torch.randint(0, len(prompts), (rows,), generator=draw),
        labels=Labels(desirable=torch.ones(rows, dtype=torch.bool), mismatched=torch.arange(rows) == rows - 1),
    )


@pytest.fixture
def attention() -> Any:
    """Restores the attention function, which compiling keeps out of its graphs."""
    before = ALL_ATTENTION_FUNCTIONS[NAME]
    yield
    ALL_ATTENTION_FUNCTIONS.register(NAME, before)


@pytest.mark.slow
@pytest.mark.usefixtures("attention")
def test_whole_compiled_layers_give_the_same_numbers_and_soon_stop_compiling() -> None:
    """Shapes differ in every step, but graphs for any shape are few."""
    plain, compiled = Scorer(llama()), Scorer(llama())
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compile_layers(compiled.model, whole=True, backend=backend)  # type: ignore[arg-type]
    compiled._whole = True
    seen = []
    for seed in range(4):
        gradients = []
        for scorer in (plain, compiled):
            scorer.zero_grad()
            scorer(step(seed)).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None]))
        assert torch.equal(*gradients)
        seen.append(len(graphs))
    assert 0 < seen[1] == seen[-1] < 20


def test_whole_layers_are_compiled_on_a_gpu_and_parts_without_attention_elsewhere() -> None:
    model = llama()
    assert compiles_whole(model, "cuda")
    assert not compiles_whole(model, "cpu")
    layers, parts = blocks(model), layer_parts(model)
    assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 2
    assert len(parts) == 6  # two normalisations and a feed-forward part in each layer
    compile_layers(model, whole=False)
    assert [m for m in model.modules() if m._compiled_call_impl] == sorted(parts, key=list(model.modules()).index)


def test_a_copy_of_a_compiled_model_is_compiled(tiny_folder: Path) -> None:
    """Else policy and reference would round differently, and rewards would not start at 0."""
    policy = Scorer(load_model(ModelSpec(str(tiny_folder))), compiled=True)
    with torch.compiler.set_stance("force_eager"):
        for scorer in (policy, policy.copy()):
            scorer(step(0))
            assert all(part._compiled_call_impl is not None for part in layer_parts(scorer.model))


@pytest.mark.usefixtures("no_model")
def test_liger_is_refused_on_a_cpu_before_a_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = binary_data(tmp_path / "data.jsonl")
    with pytest.raises(SystemExit) as end:
        main(fit(tiny_folder, "kto", data, tmp_path / "run", "--model.policy.liger=true"))
    assert end.value.code not in (0, None)
    error = capsys.readouterr().err
    assert "model.policy.liger" in error
    assert "cpu" in error
    assert "Traceback" not in error


def test_liger_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halos_pl.policy.liger, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"halos_pl\[liger\]"):
        check_liger(torch.device("cuda"))


def test_a_scorer_with_liger_does_not_run_on_a_cpu(tiny_folder: Path) -> None:
    """It would otherwise run without its kernels."""
    scorer = Scorer(load_model(ModelSpec(str(tiny_folder))), liger=True)
    with pytest.raises(ModelError, match="liger"):
        scorer(step(0))


def test_compiled_layers_and_liger_are_not_combined() -> None:
    with pytest.raises(ModelError, match=r"compile.*liger"):
        ModelSpec("some/model", compile=True, liger=True)


def test_liger_replaces_layers_but_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    for module in (ModuleType("liger_kernel"), package, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(halos_pl.policy.liger, "check_liger", lambda device: None)  # there is no GPU here
    model = llama()
    apply_liger(model)
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    model.config.model_type = "gpt2"
    with pytest.raises(ModelError, match="gpt2"):
        apply_liger(model)
