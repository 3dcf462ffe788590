"""Asks a judge at an endpoint about pairs of answers, in both orders, or about single answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from halos_pl.common.messages import counted as number_of
from halos_pl.common.messages import plain
from halos_pl.common.progress import counted
from halos_pl.data.example import DataError, short
from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import Choice, EndpointError, Reply, Request, lacks_logprobs, sent_again
from halos_pl.endpoint.usage import estimate
from halos_pl.judge.base import Answer, Judge, Pair
from halos_pl.judge.settings import JudgeSettings
from halos_pl.judge.win_rates import JudgedPair


@dataclass(frozen=True)
class Verdicts:
    """What a judge replied.

    Attributes:
        pairs: the judged pairs, in the order of the input.
        records: for each reply its pair, order and repeat, the preference for the answer, the text, and whether the
            model ended it.
        errors: the error of each request without a reply.
    """

    pairs: list[JudgedPair]
    records: list[dict[str, Any]]
    errors: list[EndpointError]


@dataclass(frozen=True)
class Grades:
    """The grades of answers.

    Attributes:
        grades: the grade of each answer, in the order of the input; None for an abstention or a failed request.
        again: second grades, by index of the answer.
        records, errors: as in :class:`Verdicts`.
    """

    grades: list[float | None]
    again: dict[int, float | None]
    records: list[dict[str, Any]]
    errors: list[EndpointError]


class Comparer(Protocol):
    """Anything that compares pairs of answers, such as :class:`Panel`."""

    def compare(self, pairs: Sequence[Pair]) -> Verdicts:
        """The verdicts on pairs."""
        ...


class Grader(Protocol):
    """Anything that grades answers, such as :class:`Panel`."""

    def grade(self, answers: Sequence[Answer]) -> Grades:
        """The grades of answers."""
        ...


@dataclass(frozen=True)
class _Asked:
    """Place of a request: index of the item, whether the other answer is first, and number of the repeat."""

    item: int
    swapped: bool
    repeat: int
    request: Request = field(repr=False)


_Replied = tuple[_Asked, float | None, Choice]


class Panel:
    """A judge at an endpoint.

    Args:
        judge: the judge.
        endpoint: the endpoint.
        settings: how it is asked.
        on_failure: what a call does if some requests fail: ``raise`` the first error, ``skip`` them and say so, or skip
            them unless ``all`` fail.
    """

    def __init__(
        self,
        judge: Judge,
        endpoint: Endpoint,
        settings: JudgeSettings | None = None,
        on_failure: Literal["raise", "skip", "all"] = "all",
    ) -> None:
        self.judge, self.endpoint, self.settings = judge, endpoint, settings or JudgeSettings()
        self.on_failure = on_failure

    def announce(self, *several: Sequence[Pair] | Sequence[Answer]) -> None:
        """Prints the number of requests, their tokens and the most that they cost, without replies in the transcripts.

        Args:
            several: lists of items, each of which will be judged.

        Raises:
            DataError: as :meth:`compare` does.
        """
        requests = [each.request for items in several for each in self._requests(items)]
        new = self.endpoint.unanswered(requests)
        number = len(requests) - len(new)
        reused = f"{number} {'reply is' if number == 1 else 'replies are'} in the transcripts; " if number else ""
        print(f"halos: {reused}{estimate(new, self.endpoint.settings)}", flush=True)

    def compare(self, pairs: Sequence[Pair]) -> Verdicts:
        """Judges each pair in both orders, and some a second time. Equal answers are a tie, without a request.

        Raises:
            DataError: naming an example, if the judge's prompt needs a column that it lacks.
            EndpointError: if the endpoint cannot be used, or requests fail that ``on_failure`` does not skip; names the
                example.
        """
        self._check("pair")
        asked = self._requests(pairs)
        replies, errors = self._replies(asked, [pair.name for pair in pairs])
        records, by_item = [], {}
        for each, verdict, choice in replies:
            preference = None if verdict is None else 1 - verdict if each.swapped else verdict
            by_item[each.item, each.swapped, each.repeat] = preference
            order = "second" if each.swapped else "first"
            records.append(
                {
                    "row": pairs[each.item].name,
                    "answer_shown": order,
                    "repeat": each.repeat,
                    "preference": preference,
                    "reply": choice.text,
                    "finished": choice.finished,
                }
            )
        judged = []
        for i, pair in enumerate(pairs):
            if pair.answer == pair.other:
                judged.append(JudgedPair(pair.name, 0.5, 0.5, identical=True, example=pair.example))
                continue
            again_first, again_second = (
                (by_item[place],) if (place := (i, swapped, 1)) in by_item else () for swapped in (False, True)
            )
            failed = sum((i, swapped, 0) not in by_item for swapped in (False, True))
            first, second = by_item.get((i, False, 0)), by_item.get((i, True, 0))
            judged.append(
                JudgedPair(pair.name, first, second, again_first, again_second, failed=failed, example=pair.example)
            )
        return Verdicts(judged, records, errors)

    def grade(self, answers: Sequence[Answer]) -> Grades:
        """Grades each answer, and some a second time.

        Raises:
            DataError, EndpointError: as :meth:`compare` does.
        """
        self._check("single")
        asked = self._requests(answers)
        replies, errors = self._replies(asked, [answer.name for answer in answers])
        by_item = {(each.item, each.repeat): grade for each, grade, _ in replies}
        return Grades(
            [by_item.get((i, 0)) for i in range(len(answers))],
            {i: grade for (i, repeat), grade in by_item.items() if repeat},
            [
                {
                    "row": answers[each.item].name,
                    "repeat": each.repeat,
                    "grade": grade,
                    "reply": choice.text,
                    "finished": choice.finished,
                }
                for each, grade, choice in replies
            ],
            errors,
        )

    def _check(self, kind: str) -> None:
        if self.judge.compares != kind:
            what = {"pair": "compares two answers", "single": "grades one answer"}
            raise DataError(f"the judge {self.judge.name} {what[self.judge.compares]}; choose one that {what[kind]}")

    def _requests(self, items: Sequence[Pair] | Sequence[Answer]) -> list[_Asked]:
        """The requests about items, pairs in both orders, those of a second judgement last."""
        orders = (False, True) if self.judge.compares == "pair" else (False,)
        different = [i for i, item in enumerate(items) if not (isinstance(item, Pair) and item.answer == item.other)]
        number = min(self.settings.again, len(different))
        again = [different[k * len(different) // number] for k in range(number)]
        places = [(i, repeat) for repeat, some in enumerate((different, again)) for i in some]
        return [
            _Asked(i, swapped, repeat, self._request(items[i], swapped, repeat))
            for i, repeat in places
            for swapped in orders
        ]

    def _request(self, item: Pair | Answer, swapped: bool, repeat: int) -> Request:
        own, judge = self.settings, self.judge
        return Request(
            messages=judge.messages(item, swapped),
            max_tokens=own.max_tokens or judge.max_tokens,
            temperature=judge.temperature if own.temperature is None else own.temperature,
            seed=None if own.seed is None else own.seed + repeat,
            top_logprobs=judge.top_logprobs if own.logprobs else 0,
            repeat=repeat,
        )

    def _replies(self, asked: Sequence[_Asked], names: Sequence[str]) -> tuple[list[_Replied], list[EndpointError]]:
        """The verdict in each reply, in the order of the requests, and the errors of the others."""
        requests = [each.request for each in asked]
        replies: dict[int, tuple[float | None, Choice]] = {}
        errors: dict[int, EndpointError] = {}
        for number, outcome in _with_progress(self._outcomes(requests), len(requests)):
            if isinstance(outcome, EndpointError):
                errors[number] = outcome.at(names[asked[number].item])
            else:
                choice = outcome.choices[0]
                replies[number] = self.judge.verdict(choice), choice
        if errors:
            failed = f"{number_of(len(errors), 'request')} of {len(requests)} failed; {sent_again([*errors.values()])}"
            first = errors[min(errors)]
            if self.on_failure == "raise" or (self.on_failure == "all" and not replies):
                raise EndpointError(f"{first} ({failed})", fatal=first.fatal, permanent=first.permanent)
            print(f"halos: {plain(f'{failed}. The first: {first}')}")
        if line := _without_verdict([choice for verdict, choice in replies.values() if verdict is None]):
            print(f"halos: {line}")
        return [(asked[i], *replies[i]) for i in sorted(replies)], [errors[i] for i in sorted(errors)]

    def _outcomes(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply | EndpointError]]:
        """The number and the outcome of each request; an error for a reply that lacks log-probs which it needs.

        Raises:
            EndpointError: if the first reply has no log-probs: the others would cost, and fail.
        """
        given = False
        for number, outcome in self.endpoint.complete(requests):
            checked = outcome if isinstance(outcome, EndpointError) else self._checked(requests[number], outcome)
            if isinstance(checked, EndpointError) and checked.fatal and not given:
                raise checked
            given = given or isinstance(checked, Reply)
            yield number, checked

    def _checked(self, request: Request, reply: Reply) -> Reply | EndpointError:
        """A reply with log-probs only if they were asked for; an error if its verdict needs some that it lacks."""
        choice = reply.choices[0]
        text = replace(choice, top_logprobs=None)
        if not request.top_logprobs:  # some servers give them anyway
            return replace(reply, choices=[text])
        none = lacks_logprobs(request, reply)
        if not none and (self.judge.verdict(choice) is not None or self.judge.verdict(text) is None):
            return reply
        what = "has no log-probs" if none else f"is {short(choice.text)}, whose log-prob it lacks"
        why = (
            f"the reply {what}, and {self.judge.name} reads its verdict from log-probs; use a server with them, or"
            " (halos evaluate, halos judge) set --judging.logprobs false"
        )
        return EndpointError(why, fatal=none, permanent=not none)


def _without_verdict(choices: Sequence[Choice]) -> str:
    """How many replies without a verdict were cut off or empty; empty if none was."""
    cut = sum(not choice.finished for choice in choices)
    empty = sum(choice.finished and not choice.text.strip() for choice in choices)
    reasons = [f"{cut} cut off by max_tokens or a filter"] * bool(cut) + [f"{empty} empty"] * bool(empty)
    return f"replies without a verdict: {len(choices)}, of them {' and '.join(reasons)}" if reasons else ""


def _with_progress(outcomes: Iterator[Any], number: int) -> Iterator[Any]:
    for outcome, _ in zip(outcomes, counted(range(number), "judging"), strict=True):
        yield outcome
