"""Who labels: rules of the user and reward models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from halos_pl.data.example import DataError
from halos_pl.evaluation.judging import Row, judged_by
from halos_pl.labelling.groups import Group, text_of
from halos_pl.training.checkpoint_manifest import file_digest


class Labeller(Protocol):
    """Scores the completions of prompts; higher is better.

    Attributes:
        threshold: The score from which a completion is desirable; None if the scores have no natural zero.
    """

    threshold: float | None

    def load(self) -> dict[str, Any]:
        """Loads what is needed, and returns the labeller's identity: labels of another one are not resumed."""

    def label(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """The score of each completion of each prompt; None for one without a verdict.

        Raises:
            ValueError: A completion cannot be scored; names its place.
        """


class RuleLabeller:
    """A rule ``path/to/file.py:function(answer, row) -> float``.

    Args:
        place: Place of the function.

    Raises:
        ValueError: There is no such function, or its parameters do not fit.
    """

    threshold: float | None = 0.5

    def __init__(self, place: str) -> None:
        self._rule, self._file = judged_by(place, "rule"), Path(place.rpartition(":")[0])

    def load(self) -> dict[str, Any]:
        return {"sha256": file_digest(self._file)}

    def label(self, groups: Sequence[Group]) -> list[list[float | None]]:
        return [
            [
                self._rule(Row(group.columns, group.prompt, group.place, each.finished), text_of(each))
                for each in group.completions
            ]
            for group in groups
        ]


class RewardLabeller:
    """A reward model: a sequence classifier with one label, in a folder or on the hub.

    Args:
        name: Its folder or name.
        batch_size: Number of completions in a pass.
        text_prompts: How a prompt that is plain text is encoded: ``plain`` or ``chat``.
    """

    threshold: float | None = None

    def __init__(self, name: str, batch_size: int, text_prompts: Any) -> None:
        self.name, self._batch_size, self._text_prompts = name, batch_size, text_prompts
        self._model: Any = None

    def load(self) -> dict[str, Any]:
        from halos_pl.policy.reference import model_fingerprint
        from halos_pl.policy.reward_model import RewardModel

        self._model = RewardModel.load(self.name, batch_size=self._batch_size, text_prompts=self._text_prompts)
        return {"model": model_fingerprint(self._model.model)}

    def label(self, groups: Sequence[Group]) -> list[list[float | None]]:
        flat = [(group, each) for group in groups for each in group.completions]
        rows = [(group.prompt, each.text) for group, each in flat]
        try:
            scores = iter(self._model.score(rows, [each.finished for _, each in flat]))
        except ValueError as error:
            raise DataError(f"{groups[0].place} and the rows after it: {error}") from error
        return [[next(scores) for _ in group.completions] for group in groups]


def named_labeller(spec: str, *, batch_size: int, text_prompts: Any) -> Labeller:
    """The labeller ``KIND: NAME``.

    Raises:
        ValueError: There is no such kind, or no such rule.
    """
    kind, _, name = (part.strip() for part in spec.partition(":"))
    if kind == "rule" and name:
        return RuleLabeller(name)
    if kind == "reward" and name:
        return RewardLabeller(name, batch_size, text_prompts)
    raise ValueError(f"--by {spec!r}: it must be 'rule: path/to/file.py:function' or 'reward: FOLDER'")
