# %% [markdown]
# # Invent a value function
#
# Write a value function, check it against the definition of human-aware losses, plot it, and train with it.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from halos_pl import HALO, ValueFunction, check_halo, testing
from halos_pl.objective.feedback import Binary
from halos_pl.objective.reference_points import MismatchedKL
from halos_pl.objective.rewards import LogRatio
from value_functions import Logistic


class Arctangent(ValueFunction):
    """v(u) = 1/2 + atan(beta * u) / pi: like the logistic, with heavier tails."""

    def __init__(self, *, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return 0.5 + torch.atan(self.beta * u) / torch.pi


# %% [markdown]
# `check_halo` tries to refute each clause of the definition and shows the smallest counterexample. This function
# passes: it never decreases, and it is concave on gains.

# %%
report = check_halo(Arctangent())
print(report)
assert report.verdict == "halo"

# %%
u = torch.linspace(-100, 100, 401)
for function in (Arctangent(), Logistic(beta=0.1)):
    plt.plot(u, function(u), label=type(function).__name__)
plt.xlabel("outcome u (nats)")
plt.ylabel("value v(u)")
plt.legend()
plt.show()

# %% [markdown]
# This is KTO with the new value function. `testing.fit` trains a tiny random model for a few steps. To train a real
# one, put the class in a file and run `halos fit --objective kto --model.value_function Arctangent`.

# %%
objective = HALO(
    reward=LogRatio(),
    reference_point=MismatchedKL(),
    value_function=Arctangent(),
    feedback=Binary(),
    reflect_undesirable=True,
    loss_offset=1.0,
)
folder = testing.tiny_model(Path(tempfile.mkdtemp()))
rows = testing.binary_rows(12)
trained = testing.fit(objective, rows, folder, steps=6, lr=0.5)
losses = [step["loss"] for step in trained.steps]
print([round(loss, 4) for loss in losses])
assert losses[0] == 0.5  # every reward is 0 before the first step
