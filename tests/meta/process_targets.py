"""Value functions that end, block or overload the process that checks them, and sound ones that print or fork.

As in every file for ``benchmarks/conformance.py``, ``CLAUSE`` marks a faulty target and names what should notice.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import torch
from torch import Tensor

from value_functions import ValueFunction


class _Acts(ValueFunction):
    calls = 0

    def act(self, u: Tensor) -> None:
        raise NotImplementedError

    def forward(self, u: Tensor) -> Tensor:
        self.act(u)
        type(self).calls += 1
        return torch.tanh(u)


class _GivesNoAnswer(_Acts):
    CLAUSE = "process"


class Leaves(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        os._exit(0)


class LeavesLater(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        if self.calls > 100:
            os._exit(1)


class LeavesAChild(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        subprocess.Popen(["sleep", "987"], start_new_session=True)
        os._exit(0)


class IsKilled(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Terminates(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Closes(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        os.closerange(3, 256)


class Loops(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        while True:
            pass


class Sleeps(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        time.sleep(1e5)


class Generator(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        raise GeneratorExit


class Interrupts(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        raise KeyboardInterrupt


class Large(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        torch.ones(10**9, dtype=torch.float64)


class LargeForLarge(_GivesNoAnswer):
    def act(self, u: Tensor) -> None:
        if u.numel() > 64:
            torch.ones(10**9, dtype=torch.float64)


class _ActsOnce(_Acts):
    KIND = "the process"

    def forward(self, u: Tensor) -> Tensor:
        return torch.tanh(u) if self.calls else super().forward(u)


class Prints(_ActsOnce):
    def act(self, u: Tensor) -> None:
        print("in Python")


class Writes(_ActsOnce):
    def act(self, u: Tensor) -> None:
        os.write(1, b"to the descriptor")


class Runs(_ActsOnce):
    def act(self, u: Tensor) -> None:
        subprocess.run(["echo", "in a process of its own"], check=True)


class Forks(_ActsOnce):
    def act(self, u: Tensor) -> None:
        os.fork()
