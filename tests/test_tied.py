"""A matrix that is embedding and head gets the gradient of both, in one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_tree import MODELS, NO_DROPOUT, SIZE, V, batches, results
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from halos_pl.outcomes import FlatBatch
from halos_pl.policy import tree
from halos_pl.policy.head import Tie, lookup, tied, token_logps
from halos_pl.policy.logprobs import pack
from halos_pl.policy.tree import parts, tree_logps

PADDING = 3
TIED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama, padding": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True, pad_token_id=PADDING)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, **NO_DROPOUT)),
}


def packed(name: str) -> Any:
    """A model that shares prompts."""
    torch.manual_seed(0)
    model: Any = TIED[name]()
    assert pack(model) is None
    assert tied(model.get_input_embeddings(), parts(model)[1])
    return model


@pytest.mark.parametrize("name", TIED)
@settings(max_examples=20, deadline=None)
@given(batches())
def test_gradients_are_those_that_autograd_adds_up(name: str, batch: FlatBatch) -> None:
    model = packed(name)
    batch.completions[0][0] = PADDING  # whose row an embedding leaves out
    logps, gradient = results(model, batch, tree_logps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "tied", lambda *_: False)
        wanted, by_autograd = results(model, batch, tree_logps)
    assert torch.equal(logps, wanted)
    assert gradient.keys() == by_autograd.keys()
    for key, value in gradient.items():
        torch.testing.assert_close(value, by_autograd[key], rtol=1e-5, atol=1e-5 * (1 + float(value.abs().max())))


class Sizes(TorchDispatchMode):
    """Notes the storages of one shape that operations make."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.seen = shape, set[int]()
        self.held: list[Any] = []  # so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and tuple(out.shape) == self.shape:
            self.seen.add(out.untyped_storage().data_ptr())
            self.held.append(out.untyped_storage())  # of a tensor that is held a copy would be made
        return out


@pytest.mark.parametrize("name", TIED)
def test_a_backward_pass_makes_one_tensor_of_its_size(name: str) -> None:
    model = packed(name)
    loss = tree_logps(model, tree.made_up(model)).sum()
    weight = model.get_input_embeddings().weight
    with Sizes(tuple(weight.shape)) as made:
        loss.backward()
    assert made.seen == {weight.grad.untyped_storage().data_ptr()}


def test_gradients_of_some_parameters_leave_nothing_behind() -> None:
    model = packed("llama")
    loss = tree_logps(model, tree.made_up(model)).sum()
    weight, other = model.get_input_embeddings().weight, model.model.layers[0].mlp.up_proj.weight
    both = torch.autograd.grad(loss, [weight, other], retain_graph=True)
    (alone,) = torch.autograd.grad(loss, [other], retain_graph=True)
    again = torch.autograd.grad(loss, [weight, other])
    torch.testing.assert_close(both[1], alone, rtol=1e-5, atol=1e-6)  # the first one had kept exponentials
    for one, two in zip(both, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_an_embedding_without_its_head_gets_its_own_gradient() -> None:
    embedding = nn.Embedding(7, 4, padding_idx=2)
    ids = torch.tensor([[1, 2, 1]])
    lookup(embedding, ids, Tie()).sum().backward()
    found, embedding.weight.grad = embedding.weight.grad, None
    embedding(ids).sum().backward()
    assert found is not None
    assert torch.equal(found, embedding.weight.grad)


def test_what_is_more_than_one_trained_matrix_is_left_to_autograd() -> None:
    def pair(**options: Any) -> tuple[nn.Embedding, nn.Linear]:
        embedding, head = nn.Embedding(7, 4, **options), nn.Linear(4, 7, bias=False)
        head.weight = embedding.weight
        return embedding, head

    assert tied(*pair())
    assert not tied(*pair(dtype=torch.bfloat16))
    assert not tied(*pair(device="meta"))
    assert not tied(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    for options in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        assert not tied(*pair(**options)), options
    embedding, head = pair()
    embedding.register_forward_hook(lambda *_: None)
    assert not tied(embedding, head)
    embedding, head = pair()
    embedding.weight.requires_grad_(False)
    assert not tied(embedding, head)
    embedding, head = pair()
    head.register_forward_hook(lambda *_: None)
    assert not tied(embedding, head)
    scaled = type("Scaled", (nn.Embedding,), {})(7, 4)
    head.weight = scaled.weight
    assert not tied(scaled, nn.Linear(4, 7, bias=False))


def test_without_a_tie_the_head_gives_its_gradient_itself() -> None:
    head, hidden = nn.Linear(4, 7, bias=False), torch.randn(3, 4)
    token_logps(head, hidden, torch.tensor([1, 2, 3])).sum().backward()
    assert head.weight.grad is not None
    assert bool(head.weight.grad.any())


def test_the_grid_of_models_has_tied_ones() -> None:
    """Which the tests of trees then compare with separate rows."""
    names = [name for name in MODELS if tied((made := MODELS[name]()).get_input_embeddings(), parts(made)[1])]
    assert {"llama, tied", "gpt2"} <= set(names)
