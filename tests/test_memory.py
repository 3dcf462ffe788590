"""What is made again in the backward pass, and what is added up in place, is what it was."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import MODELS, SIZE
from run_halos import binary_data, fit, metrics
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

import halos_pl.policy.head
from halos_pl.batch import TokenBatch
from halos_pl.cli.main import main
from halos_pl.labels import Labels
from halos_pl.policy.architecture import base_model
from halos_pl.policy.head import token_logps
from halos_pl.policy.loading import ModelError, ModelSpec
from halos_pl.policy.logprobs import padded_logps
from halos_pl.policy.memory import recomputed
from halos_pl.policy.prefix_sharing import NAME, shared_logps
from halos_pl.policy.self_test import sharing_fault


def batch() -> TokenBatch:
    """Four rows, two of them of one prompt, and a mismatched one."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 101, (n,), generator=draw) for n in (7, 4, 5, 1, 6, 3, 4)]
    return TokenBatch(
        prompts=ids[:2],
        completions=ids[2:],
        prompt=torch.tensor([0, 0, 1, 1, 0]),
        labels=Labels(
            desirable=torch.tensor([True, False, True, False, False]),
            mismatched=torch.tensor([False, False, False, False, True]),
        ),
    )


def slopes(model: nn.Module, shared: bool, again: bool, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and the gradient of their weighted sum."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(), recomputed() if again else nullcontext():
        base_model(model).config._attn_implementation = NAME if shared else "sdpa"
        logps = (shared_logps if shared else padded_logps)(model, batch())
    (logps * torch.arange(1, 1 + logps.numel()).view_as(logps)).sum().backward()
    return logps.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_bit_by_bit_the_same_without_keeping_what_is_cheap(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    for shared in (False, True):
        if shared and sharing_fault(model) is not None:
            return
        logps, gradient = slopes(model, shared, again=False, autocast=autocast)
        same, other = slopes(model, shared, again=True, autocast=autocast)
        assert torch.equal(logps, same)
        assert gradient.keys() == other.keys()
        for key, value in gradient.items():
            assert torch.equal(value, other[key]), key


def test_two_fifths_less_is_kept_of_a_llama() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {"intermediate_size": 85}))
    kept = {}
    for what, hooks in (("all", nullcontext()), ("less", recomputed())):
        pointers: dict[int, int] = {}

        def note(tensor: Tensor, hooks: object = hooks, pointers: dict[int, int] = pointers) -> object:
            found = hooks.pack_hook(tensor) if isinstance(hooks, recomputed) else tensor
            if isinstance(found, Tensor) and not any(tensor.data_ptr() == p.data_ptr() for p in model.parameters()):
                pointers[found.data_ptr()] = found.untyped_storage().nbytes()
            return found

        with saved_tensors_hooks(note, lambda kept: kept):
            out = model.model(input_ids=torch.arange(64)[None]).last_hidden_state  # noqa: F841  (keeps the graph)
        kept[what] = sum(pointers.values())
    assert kept["less"] < 0.7 * kept["all"], kept


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--trainer.precision=bf16-mixed",), ("--model.policy.lora.r=4",)])
def test_compiled_layers_take_the_same_steps(options: tuple[str, ...], tiny_folder: Path, tmp_path: Path) -> None:
    data = binary_data(tmp_path / "data.jsonl")
    figures = {}
    for name in ("false", "true"):
        words = fit(tiny_folder, "kto", data, tmp_path / name, f"--model.policy.compile={name}", *options)
        main(words)
        figures[name] = metrics(tmp_path / name)
    assert float(figures["true"][0]["outcome/reward"]) == 0
    near = {"rel": 1e-3, "abs": 5e-2 if "bf16" in str(options) else 1e-5}
    for one, other in zip(figures["false"], figures["true"], strict=True):
        for figure in ("loss", "outcome/reward", "logps/chosen"):
            assert float(other[figure]) == pytest.approx(float(one[figure]), nan_ok=True, **near), figure


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match=r"C\+\+ compiler"):
        ModelSpec("some/model", compile=True)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    most=st.sampled_from([1, 60, 130, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_log_probs_by_parts_are_those_of_the_cross_entropy(rows: int, most: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    head = nn.Linear(16, 53, bias=False).to(dtype)
    hidden = torch.randn(rows, 16).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, 53, (rows,)), torch.randn(rows)
    found = {}
    for name in ("parts", "whole"):
        hidden.grad = head.weight.grad = None
        if name == "parts":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(halos_pl.policy.head, "LOGITS", most)
                logps = token_logps(head, hidden, targets)
                (logps * weights).sum().backward()
        else:
            logps = -F.cross_entropy(head(hidden).float(), targets, reduction="none")
            (logps * weights).sum().backward()
        assert logps.dtype == torch.float32
        found[name] = (logps.detach(), hidden.grad.clone().float(), head.weight.grad.clone().float())
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found["parts"], found["whole"], strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near * (1 + float(other.abs().max())))


def test_frozen_weights_and_hidden_states_without_gradient_get_none() -> None:
    head = nn.Linear(4, 7, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    token_logps(head, hidden, torch.tensor([1, 2, 3])).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    assert not token_logps(head, hidden.detach(), torch.tensor([1, 2, 3])).requires_grad


@pytest.mark.parametrize("most", [1, 60, 10**6])
def test_exponentials_that_were_kept_serve_one_backward_pass_and_the_next_makes_them_again(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halos_pl.policy.head, "LOGITS", most)
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 53, bias=False), torch.randn(5, 16, requires_grad=True)
    loss = token_logps(head, hidden, torch.tensor([0, 52, 7, 7, 1])) @ torch.randn(5)
    found = []
    for again in (False, True):
        hidden.grad = head.weight.grad = None
        loss.backward(retain_graph=not again)
        found.append((hidden.grad, head.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_of_one_part_are_gone_before_the_next_ones_are_made(
    gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    logits = halos_pl.policy.head._logits

    def alone(hidden: Tensor, weight: Tensor) -> Tensor:
        assert all(earlier() is None for earlier in made)
        found = logits(hidden, weight)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(halos_pl.policy.head, "LOGITS", 60)
    monkeypatch.setattr(halos_pl.policy.head, "_logits", alone)
    head, hidden = nn.Linear(16, 53, bias=False), torch.randn(5, 16)
    with torch.set_grad_enabled(gradient):
        found = token_logps(head, hidden, torch.tensor([0, 52, 7, 7, 1]))
    forward = len(made)
    assert forward == 5
    if gradient:
        assert made[-1]() is not None
        found.sum().backward()
        assert len(made) == forward + 4  # but for those that were kept
    assert all(each() is None for each in made)
