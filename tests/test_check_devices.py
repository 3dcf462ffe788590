"""The check of another device: what stays on the CPU is found, and what follows its input is not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos_pl.conformance.devices import DEVICE, on_another_device

FOLLOWS = {
    "parameter and buffer": lambda part, u: torch.sigmoid(u) * part.weight + part.kept,
    "a number": lambda part, u: u * torch.tensor(2.0),
    "zeros on its device": lambda part, u: u + torch.zeros(3, device=u.device),
    "a list on its device": lambda part, u: u * torch.tensor([1.0, 2.0, 3.0], device=u.device),
    "new_tensor": lambda part, u: u + u.new_tensor([1.0, 2.0, 3.0]),
    "indices on the CPU": lambda part, u: u[torch.tensor([0, 1])],
    "reads a number": lambda part, u: u * u.max().item() if bool((u > 0).all()) else part.constant,
    "in place": lambda part, u: u.clone().clamp_(0, 0.5),
    "log-sigmoid": lambda part, u: F.logsigmoid(u),
}
STAYS = {
    "a constant": lambda part, u: u * part.constant,
    "zeros": lambda part, u: torch.where(u > 0, u, torch.zeros(3)),
    "zeros on the CPU": lambda part, u: u + torch.zeros(3, device="cpu"),
    "a table that it indexes": lambda part, u: part.constant[u.long()],
    "its input on the CPU": lambda part, u: u.cpu() * 2,
    "its numbers": lambda part, u: 2 * torch.tensor(u.tolist()),
    "NumPy": lambda part, u: torch.from_numpy(u.detach().numpy()),
}


class Part(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.ones(3))
        self.constant = torch.ones(3)

    def forward(self, u: Tensor) -> Tensor:
        return self.function(self, u)


def found(function) -> str | None:
    return on_another_device(Part(function), lambda part: part(torch.ones(2, 3).to(DEVICE)))


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_follows_its_input_passes(name):
    result = FOLLOWS[name](Part(FOLLOWS[name]), torch.ones(2, 3))
    assert result.shape == (2, 3)
    assert found(FOLLOWS[name]) is None


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_on_the_cpu_is_found(name):
    assert found(STAYS[name])


def test_an_objective_is_checked_without_torch_loading_its_compiler():
    """Loading it takes longer than all clauses of a part."""
    code = (
        "import sys; from halos_pl.conformance import check_halo; from halos_pl.objective.rewards import LogRatio;"
        " check_halo(LogRatio(), max_examples=10); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
