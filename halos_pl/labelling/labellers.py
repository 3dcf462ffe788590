"""Who labels: rules of the user, reward models, and judges at an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

from halos_pl.data.example import DataError
from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import EndpointError, sent_again
from halos_pl.endpoint.settings import EndpointSettings
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
            OSError: A server gives no reply.
        """

    def summary(self) -> str:
        """A line for the log, at the end; empty if there is nothing to report."""


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

    def summary(self) -> str:
        return ""


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
        from halos_pl.policy.identity import model_fingerprint
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

    def summary(self) -> str:
        return ""


class JudgeLabeller:
    """A judge at an endpoint. One that grades single answers gives its grades; one that compares answers sees every two
    completions of a prompt in both orders, and a completion's score is its mean preference over the others.

    Args:
        name: A shipped judge, or a YAML file with a rubric.
        settings: The endpoint.
        transcripts: File of its replies, which a repeated command reuses; None keeps none.

    Raises:
        ValueError: There is no such judge.
        OSError: The endpoint cannot be used.
    """

    def __init__(self, name: str, settings: EndpointSettings, transcripts: Path | None) -> None:
        from halos_pl.judge.named import named_judge
        from halos_pl.judge.panel import Panel
        from halos_pl.judge.settings import JudgeSettings

        self.name, self._judge = name, named_judge(name)
        self._endpoint = Endpoint(settings, transcripts)
        self._panel = Panel(self._judge, self._endpoint, JudgeSettings(again=0))
        self.threshold: float | None = 0.5 if self._judge.compares == "pair" else None

    def load(self) -> dict[str, Any]:
        self._endpoint.check_reachable()
        identity: dict[str, Any] = {"model": self._endpoint.settings.model}
        return identity | ({"sha256": file_digest(Path(self.name))} if Path(self.name).is_file() else {})

    def label(self, groups: Sequence[Group]) -> list[list[float | None]]:
        return self._compared(groups) if self._judge.compares == "pair" else self._graded(groups)

    def _graded(self, groups: Sequence[Group]) -> list[list[float | None]]:
        from halos_pl.judge.base import Answer

        answers = [
            Answer(f"{group.place} completion {i}", group.prompt, text_of(each), group.columns)
            for group in groups
            for i, each in enumerate(group.completions, start=1)
        ]
        judged = self._panel.grade(answers)
        self._refuse(judged.errors)
        grades = iter(judged.grades)
        return [[next(grades) for _ in group.completions] for group in groups]

    def _compared(self, groups: Sequence[Group]) -> list[list[float | None]]:
        from halos_pl.judge.base import Pair

        places = [
            (g, i, j) for g, group in enumerate(groups) for i, j in combinations(range(len(group.completions)), 2)
        ]
        texts = [[text_of(each) for each in group.completions] for group in groups]
        judged = self._panel.compare(
            [
                Pair(
                    f"{groups[g].place} completions {i + 1} and {j + 1}",
                    groups[g].prompt,
                    texts[g][i],
                    texts[g][j],
                    groups[g].columns,
                )
                for g, i, j in places
            ]
        )
        self._refuse(judged.errors)
        wins: list[list[list[float]]] = [[[] for _ in group.completions] for group in groups]
        for (g, i, j), pair in zip(places, judged.pairs, strict=True):
            if pair.preference is not None:
                wins[g][i].append(pair.preference)
                wins[g][j].append(1 - pair.preference)
        return [[sum(each) / len(each) if each else None for each in group] for group in wins]

    def _refuse(self, errors: Sequence[EndpointError]) -> None:
        """Stops if requests failed, so that the same command sends them again instead of recording no verdict."""
        if errors:
            raise EndpointError(f"{len(errors)} requests failed; {sent_again(errors)}: {errors[0]}")

    def summary(self) -> str:
        return self._endpoint.usage.line(self._endpoint.settings)


def named_labeller(
    spec: str, *, batch_size: int, text_prompts: Any, endpoint: EndpointSettings | None, transcripts: Path | None
) -> Labeller:
    """The labeller ``KIND: NAME``.

    Args:
        spec: The kind and the name.
        batch_size, text_prompts: See :class:`RewardLabeller`.
        endpoint, transcripts: See :class:`JudgeLabeller`.

    Raises:
        ValueError: There is no such kind, no such rule or judge, or a judge has no endpoint.
    """
    kind, _, name = (part.strip() for part in spec.partition(":"))
    if kind == "judge" and name:
        if endpoint is None:
            raise ValueError(f"--by {spec!r} needs a server: set --endpoint.url and --endpoint.model")
        return JudgeLabeller(name, endpoint, transcripts)
    if kind == "rule" and name:
        return RuleLabeller(name)
    if kind == "reward" and name:
        return RewardLabeller(name, batch_size, text_prompts)
    raise ValueError(f"--by {spec!r}: it must be 'rule: path/to/file.py:function', 'reward: FOLDER' or 'judge: NAME'")
