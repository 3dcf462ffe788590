"""Who labels: rules of the user, reward models, and judges at an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from halos_pl.common.local_imports import code_digest
from halos_pl.common.messages import counted
from halos_pl.data.example import Prompt
from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import EndpointError
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.evaluation.judging import Row, judged_by
from halos_pl.labelling.groups import Group, text_of
from halos_pl.training.checkpoint_manifest import file_digest

if TYPE_CHECKING:
    from halos_pl.judge.base import Answer, Pair
    from halos_pl.judge.win_rates import JudgedPair


class Labeller(Protocol):
    """Scores the completions of prompts; higher is better.

    Attributes:
        threshold: The score from which a completion is desirable; None if the scores have no natural zero.
        scale: The lowest and the highest score; None if they are unknown.
    """

    threshold: float | None
    scale: tuple[float, float] | None

    def check(self) -> None:
        """Refuses what :meth:`load` would refuse, without reading weights.

        Raises:
            ValueError: The labeller cannot be used.
            OSError: A server gives no reply.
        """

    def load(self) -> dict[str, Any]:
        """Loads what is needed, and returns the labeller's identity: labels of another one are not resumed."""

    def announce(self, groups: Sequence[Group]) -> None:
        """Says what it costs to label these prompts, or what is cut; before the first of them is labelled.

        Raises:
            ValueError: A completion cannot be scored; names its place.
        """

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
    scale: tuple[float, float] | None = (0.0, 1.0)

    def __init__(self, place: str) -> None:
        self._rule, self._file = judged_by(place, "rule"), Path(place.rpartition(":")[0])

    def check(self) -> None:
        return

    def load(self) -> dict[str, Any]:
        return {"sha256": code_digest(self._file)}

    def announce(self, groups: Sequence[Group]) -> None:
        return

    def label(self, groups: Sequence[Group]) -> list[list[float | None]]:
        return [
            [
                self._rule(Row(group.columns | each.columns, group.prompt, each.place, each.finished), text_of(each))
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
    scale: tuple[float, float] | None = None

    def __init__(self, name: str, batch_size: int, text_prompts: Any) -> None:
        self.name, self._batch_size, self._text_prompts = name, batch_size, text_prompts
        self._model: Any = None

    def check(self) -> None:
        from halos_pl.policy.reward_model import RewardModel

        RewardModel.check(self.name)

    def load(self) -> dict[str, Any]:
        from halos_pl.policy.identity import identity
        from halos_pl.policy.reward_model import RewardModel

        self._model = RewardModel.load(self.name, batch_size=self._batch_size, text_prompts=self._text_prompts)
        return identity(self._model.model, self._model.tokenizer)

    def announce(self, groups: Sequence[Group]) -> None:
        rows, finished, names = _rows(groups)
        if cut := self._model.cut(rows, finished, names):
            print(
                f"halos: {self.name} reads {self._model.max_length} tokens: {len(cut)} of"
                f" {counted(len(rows), 'completion')} did not fit with the prompt, which loses its beginning; the first"
                f" is {cut[0]}"
            )

    def label(self, groups: Sequence[Group]) -> list[list[float | None]]:
        scores = iter(self._model.score(*_rows(groups)))
        return [[next(scores) for _ in group.completions] for group in groups]

    def summary(self) -> str:
        return ""


def _rows(groups: Sequence[Group]) -> tuple[list[tuple[Prompt, Prompt]], list[bool], list[str]]:
    """Prompts and completions of groups, whether each is finished, and their names."""
    flat = [(group, each) for group in groups for each in group.completions]
    names = [f"{each.place} completion {each.number}" if group.in_one_row else each.place for group, each in flat]
    return [(group.prompt, each.text) for group, each in flat], [each.finished for _, each in flat], names


class JudgeLabeller:
    """A judge at an endpoint. One that grades single answers gives its grades; one that compares answers sees every two
    completions of a prompt in both orders, and a completion's score is its mean preference over the others.

    Args:
        name: A shipped judge, or a YAML file with a rubric.
        settings: The endpoint.
        transcripts: File of its replies, which a repeated command reuses; None keeps none.
        skip_failed: Whether completions get no verdict if the server rejects a request about them, instead of an error.

    Raises:
        ValueError: There is no such judge.
        OSError: The endpoint cannot be used.
    """

    def __init__(
        self, name: str, settings: EndpointSettings, transcripts: Path | None, skip_failed: bool = False
    ) -> None:
        from halos_pl.judge.base import JudgeError
        from halos_pl.judge.named import judge_classes, named_judge
        from halos_pl.judge.panel import Panel
        from halos_pl.judge.settings import JudgeSettings

        try:
            self.name, self._judge = name, named_judge(name)
        except JudgeError as error:
            if name not in judge_classes():
                raise
            raise JudgeError(
                f"judge {name}: it needs the files of its benchmark, which halos label does not take; use halos"
                f" evaluate --win_rate {name}, or a rubric in a YAML file"
            ) from error
        self._endpoint = Endpoint(settings, transcripts)
        on_failure: Literal["skip", "raise"] = "skip" if skip_failed else "raise"
        self._panel = Panel(self._judge, self._endpoint, JudgeSettings(again=0), on_failure)
        self._judged: list[JudgedPair] = []
        pairwise = self._judge.compares == "pair"
        self.threshold: float | None = 0.5 if pairwise else None
        self.scale: tuple[float, float] | None = (0.0, 1.0) if pairwise else self._judge.scale

    def check(self) -> None:
        self._endpoint.check_reachable()

    def load(self) -> dict[str, Any]:
        self.check()
        settings = self._endpoint.settings
        identity: dict[str, Any] = {"model": settings.model, "extra_body": settings.extra_body or {}}
        return identity | ({"sha256": file_digest(Path(self.name))} if Path(self.name).is_file() else {})

    def announce(self, groups: Sequence[Group]) -> None:
        self._panel.announce(self._pairs(groups) if self._judge.compares == "pair" else self._answers(groups))

    def label(self, groups: Sequence[Group]) -> list[list[float | None]]:
        return self._compared(groups) if self._judge.compares == "pair" else self._graded(groups)

    def _answers(self, groups: Sequence[Group]) -> list[Answer]:
        from halos_pl.judge.base import Answer

        return [
            Answer(f"{each.place} completion {each.number}", group.prompt, text_of(each), group.columns | each.columns)
            for group in groups
            for each in group.completions
        ]

    def _pairs(self, groups: Sequence[Group]) -> list[Pair]:
        """Every two completions of each prompt. Columns in which their rows differ belong to neither question."""
        from halos_pl.judge.base import Pair

        return [
            Pair(
                f"{group.place} completions {first.number} and {second.number}",
                group.prompt,
                text_of(first),
                text_of(second),
                group.columns,
                example=group.place,
            )
            for group in groups
            for first, second in combinations(group.completions, 2)
        ]

    def _graded(self, groups: Sequence[Group]) -> list[list[float | None]]:
        with self._advising():
            grades = iter(self._panel.grade(self._answers(groups)).grades)
        return [[next(grades) for _ in group.completions] for group in groups]

    def _compared(self, groups: Sequence[Group]) -> list[list[float | None]]:
        places = [
            (g, i, j) for g, group in enumerate(groups) for i, j in combinations(range(len(group.completions)), 2)
        ]
        with self._advising():
            judged = self._panel.compare(self._pairs(groups)).pairs
        self._judged += judged
        wins: list[list[list[float]]] = [[[] for _ in group.completions] for group in groups]
        for (g, i, j), pair in zip(places, judged, strict=True):
            if pair.preference is not None:
                wins[g][i].append(pair.preference)
                wins[g][j].append(1 - pair.preference)
        return [[sum(each) / len(each) if each else None for each in group] for group in wins]

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Adds to an error of some requests how to leave them out."""
        try:
            yield
        except EndpointError as error:
            if error.fatal:
                raise
            raise EndpointError(f"{error}; --skip_failed true leaves these completions without a verdict") from error

    def summary(self) -> str:
        from halos_pl.judge.report import position_line

        lines = [self._endpoint.usage.line(self._endpoint.settings), position_line(self._judged)]
        return "\nhalos: ".join(filter(None, lines))


def named_labeller(
    spec: str,
    *,
    batch_size: int | None,
    text_prompts: Any,
    endpoint: EndpointSettings | None,
    transcripts: Path | None,
    skip_failed: bool = False,
) -> Labeller:
    """The labeller ``KIND: NAME``.

    Args:
        spec: The kind and the name.
        batch_size, text_prompts: See :class:`RewardLabeller`; default: 16, and ``plain``.
        endpoint, transcripts, skip_failed: See :class:`JudgeLabeller`.

    Raises:
        ValueError: There is no such kind, no such rule or judge, or a judge has no endpoint.
    """
    kind, _, name = (part.strip() for part in spec.partition(":"))
    if kind == "judge" and name:
        if endpoint is None:
            raise ValueError(f"--by {spec!r} needs a server: set --endpoint.url and --endpoint.model")
        return JudgeLabeller(name, endpoint, transcripts, skip_failed)
    if kind == "rule" and name:
        return RuleLabeller(name)
    if kind == "reward" and name:
        return RewardLabeller(name, 16 if batch_size is None else batch_size, text_prompts or "plain")
    raise ValueError(f"--by {spec!r}: it must be 'rule: path/to/file.py:function', 'reward: FOLDER' or 'judge: NAME'")
