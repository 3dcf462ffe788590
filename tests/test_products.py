"""Linear layers by another library's products are the same layers."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_memory import slopes
from test_tree import MODELS
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from halos_pl.policy import products
from halos_pl.policy.logprobs import pack
from halos_pl.policy.products import Linear, product, quicken

SIZES = st.integers(1, 40)


def layer(k: int, n: int, bias: bool = True) -> nn.Linear:
    """A layer of torch's with weights of its own."""
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and the gradients that a weighted sum of it has."""
    x = x.detach().requires_grad_()
    out = module(x)
    wanted = [x, *module.parameters()]
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


@given(st.lists(st.integers(0, 8), max_size=2), SIZES, SIZES, st.booleans(), st.booleans())
def test_a_layer_and_its_gradients_are_those_in_float64(
    before: list[int], k: int, n: int, bias: bool, contiguous: bool
) -> None:
    quick = layer(k, n, bias)
    exact = copy.deepcopy(quick).double()
    quicken(quick, None)
    x = torch.randn(*before, k, generator=torch.Generator().manual_seed(1))
    if not contiguous and x.dim() > 1:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    for found, wanted in zip(gradients(quick, x), gradients(exact, x.double()), strict=True):
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@given(SIZES, SIZES, SIZES, st.booleans())
def test_a_product_is_that_in_float64(m: int, k: int, n: int, turned: bool) -> None:
    draw = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=draw)
    weight = torch.randn(k, n, generator=draw).t() if turned else torch.randn(n, k, generator=draw)
    torch.testing.assert_close(product(x, weight).double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("there", [True, False], ids=["with it", "without it"])
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_what_it_was(name: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not there:
        monkeypatch.setattr(products, "_has_onednn", lambda: False)
    torch.manual_seed(0)
    model = MODELS[name]()
    packed = pack(model) is None
    logps, wanted = slopes(model, packed, again=False)
    size = max(float(g.abs().max()) for g in wanted.values())
    quicken(model, model.get_output_embeddings())
    results = [slopes(model, packed, again=again) for again in (False, True)]
    for found, of_weights in results:
        torch.testing.assert_close(found, logps, rtol=1e-5, atol=1e-5)
        assert of_weights.keys() == wanted.keys()
        for key, gradient in of_weights.items():
            torch.testing.assert_close(gradient, wanted[key], rtol=0, atol=1e-5 * size)
    # What is made again for the backward pass is bit by bit what was not kept.
    assert all(torch.equal(g, results[1][1][key]) for key, g in results[0][1].items())


@pytest.mark.parametrize("way", ["bfloat16", "float64", "autocast"])
def test_other_dtypes_are_torchs_own(way: str) -> None:
    plain = layer(8, 6)
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(way, torch.float32)
    plain = plain.to(dtype)
    quick = copy.deepcopy(plain)
    quicken(quick, None)
    x = torch.randn(5, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext():
        for found, wanted in zip(gradients(quick, x), gradients(plain, x), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_a_frozen_weight_keeps_no_input() -> None:
    """As an adapter's base layers, whose inputs would otherwise be held for nothing."""
    quick = layer(8, 6, bias=False).requires_grad_(False)
    quicken(quick, None)
    kept: list[tuple[int, ...]] = []

    def pack_(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack_, lambda tensor: tensor):
        quick(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert (5, 8) not in kept


@pytest.mark.parametrize("keep", [False, True], ids=["all", "but for the head"])
def test_only_plain_layers_change_and_nothing_else_of_them(keep: bool) -> None:
    class Quantised(nn.Linear):
        """Stands for a library's own layer."""

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.round(), self.weight, self.bias)

    model = nn.Sequential(layer(8, 6), nn.Tanh(), Quantised(6, 4))
    seen: list[object] = []
    model[0].register_forward_hook(lambda *given: seen.append(given[0]))
    before = copy.deepcopy(model.state_dict())
    quicken(model, model[0] if keep else None)
    assert [type(part) for part in model] == [nn.Linear if keep else Linear, nn.Tanh, Quantised]
    assert isinstance(model[0], nn.Linear)
    model(torch.ones(2, 8))
    assert seen == [model[0]]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    alone = layer(8, 6)
    quicken(alone, None)
    file = io.BytesIO()
    torch.save(nn.Sequential(copy.deepcopy(alone), nn.Tanh()), file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)[0]) is Linear
