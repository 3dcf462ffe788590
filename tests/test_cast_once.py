"""Casts of frozen weights that are kept change no number, and follow the weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from halos_pl.policy.cast_once import cast, cast_once


def network() -> nn.Sequential:
    """A frozen layer, a trained one, and a frozen one without bias."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 8, bias=False))
    layers[0].requires_grad_(False)
    layers[4].requires_grad_(False)
    return layers


def passes(model: nn.Module, autocast: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a pass."""
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return out.detach(), list(torch.autograd.grad(out.float().square().sum(), [x, *trained]))


def equal(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_same_outputs_and_gradients_bit_by_bit(autocast: bool) -> None:
    plain, kept = network(), network()
    cast_once(kept)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        kept(torch.ones(1, 24))  # what is kept here must serve passes with gradients
    for _ in range(2):
        assert equal(passes(plain, autocast), passes(kept, autocast))
    for model in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        assert not equal(passes(model, autocast), passes(plain, autocast))
        assert equal(passes(kept, autocast), passes(plain, autocast))


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 5] += 1


def merged(weight: nn.Parameter) -> None:
    weight.data += 0.125


def replaced(weight: nn.Parameter) -> None:
    weight.data = weight.data + 0.125


def loaded(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.copy_(torch.ones_like(weight))


@pytest.mark.parametrize("change", [in_place, merged, replaced, loaded])
def test_changed_weights_are_cast_again(change: object) -> None:
    plain, kept = network(), network()
    cast_once(kept)
    before = passes(kept)
    for model in (plain, kept):
        change(model[0].weight)  # type: ignore[operator]
    assert not equal(before, passes(kept))
    assert equal(passes(plain), passes(kept))


def test_only_frozen_weights_are_kept() -> None:
    weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    assert cast(weight, torch.bfloat16) is cast(weight, torch.bfloat16)
    assert cast(weight, torch.float32) is weight
    weight.requires_grad_(True)
    assert cast(weight, torch.bfloat16).requires_grad
    frozen = torch.randn(4, 4)
    half = cast(frozen, torch.bfloat16)
    assert torch.equal(cast(frozen, torch.float16), frozen.half())
    assert torch.equal(cast(frozen, torch.bfloat16), half)
