"""A value function with a trained parameter. Chosen on the command line by its dotted path."""

from __future__ import annotations

import torch

from value_functions import Logistic


class Learnt(Logistic):
    """A logistic whose beta is trained."""

    def __init__(self) -> None:
        super().__init__()
        del self.beta
        self.beta = torch.nn.Parameter(torch.tensor(0.5))
