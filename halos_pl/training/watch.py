"""Watches a figure over the last steps of a run, and warns once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Generic, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

#: Last steps that are looked at.
LAST = 20
#: A shorter run causes the warning at its end, if it has at least this many steps.
SHORT = 5

Step = TypeVar("Step")


class Watch(ABC, Generic[Step]):
    """Watches the figures of each step, which are already on the host. A step that counts leaves what it showed."""

    def __init__(self) -> None:
        self._last: deque[Step | None] = deque(maxlen=LAST)
        self._warned = False

    @abstractmethod
    def shown(self, figures: Mapping[str, float]) -> Step | None:
        """What the figures of a step show; None for a step that does not count."""

    @abstractmethod
    def warning(self, steps: list[Step], of: int) -> str | None:
        """The warning that the steps call for, in one line; None if they call for none.

        Args:
            steps: what those of the last steps showed that count: more than half of them.
            of: number of the last steps.
        """

    def see(self, figures: Mapping[str, float]) -> None:
        """Records a step.

        Args:
            figures: figures that the step logs.
        """
        self._last.append(self.shown(figures))
        if len(self._last) == LAST:
            self._warn()

    def finish(self) -> None:
        """Issues the warning of a run that was too short for it."""
        if len(self._last) >= SHORT:
            self._warn()

    def _warn(self) -> None:
        steps = [step for step in self._last if step is not None]
        if self._warned or 2 * len(steps) <= len(self._last):
            return
        if warning := self.warning(steps, len(self._last)):
            self._warned = True
            rank_zero_warn(f"halos: {warning}")
