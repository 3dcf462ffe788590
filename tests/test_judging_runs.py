"""Runs of a judge: orders, repeats, failures, what is reused, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from misbehaving_server import completion, serving

from halos_pl.data.example import DataError
from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import Choice, EndpointError, Reply, Request
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.endpoint.usage import Usage
from halos_pl.judge.base import Answer, Pair
from halos_pl.judge.named import named_judge
from halos_pl.judge.panel import Panel
from halos_pl.judge.settings import JudgeSettings
from halos_pl.judge.simulated import SimulatedJudge
from halos_pl.judge.win_rates import win_rate

Replying = Callable[[Request], str | Choice | EndpointError]


class FakeEndpoint:
    """Replies by a function of the request, in reverse order."""

    settings = EndpointSettings("http://localhost:1", "fake", price_in=1.0, price_out=2.0)

    def __init__(self, replying: Replying) -> None:
        self.replying, self.usage, self.requests = replying, Usage(), list[Request]()

    def unanswered(self, requests: Iterable[Request]) -> list[Request]:
        return [*requests]

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply | EndpointError]]:
        self.requests += requests
        for number, request in reversed([*enumerate(requests)]):
            reply = self.replying(request)
            choice = Choice(reply, True) if isinstance(reply, str) else reply
            yield number, choice if isinstance(choice, EndpointError) else Reply([choice], 10, 2)


def panel(replying: Replying, judge: str = "kto", **settings: Any) -> Panel:
    return Panel(named_judge(judge), FakeEndpoint(replying), JudgeSettings(**settings))  # type: ignore[arg-type]


def pairs(number: int) -> list[Pair]:
    return [Pair(f"row {i}", f"Why {i}?", f"good {i}", f"bad {i}") for i in range(number)]


def good_first(request: Request) -> bool:
    text = request.messages[-1]["content"]
    return text.index("good") < text.index("bad")


def test_each_pair_is_judged_in_both_orders_and_some_again() -> None:
    asked = panel(lambda request: "Response A" if good_first(request) else "Response B", again=2, seed=5)
    verdicts = asked.compare([*pairs(4), Pair("same", "Why?", "equal", "equal")])
    report = win_rate(verdicts.pairs)
    assert (report.wins, report.ties, report.identical, report.consistency.value) == (4, 1, 1, 1)
    assert report.position_bias.value == 0
    requests = asked.endpoint.requests  # type: ignore[attr-defined]
    assert len(requests) == 2 * 4 + 2 * 2
    assert [(r.repeat, r.seed) for r in requests] == [(0, 5)] * 8 + [(1, 6)] * 4
    assert [good_first(request) for request in requests] == [True, False] * 6
    assert {record["preference"] for record in verdicts.records} == {1.0}
    assert sum(bool(p.again_first) for p in verdicts.pairs) == 2


def test_a_judge_that_follows_the_position_has_a_win_rate_of_a_half() -> None:
    report = win_rate(panel(lambda _: "Response A").compare(pairs(20)).pairs)
    assert (report.rate.value, report.position_bias.value, report.follows_position.value) == (0.5, 1, 1)
    assert report.position_bias.low > 0.6


def test_abstentions_and_failures_are_counted_and_no_ties() -> None:
    def reply(request: Request) -> str | EndpointError:
        text = request.messages[-1]["content"]
        if "Why 1?" in text and good_first(request):
            return "I cannot say."
        if "Why 2?" in text:
            return EndpointError("too long")
        return "Response A" if good_first(request) else "Response B"

    verdicts = panel(reply, again=0).compare(pairs(5))
    report = win_rate(verdicts.pairs)
    assert (report.rate.value, report.rate.n, report.left_out) == (1, 3, 2)
    assert (report.abstentions, report.failures, len(verdicts.errors)) == (1, 2, 2)
    assert [p.preference for p in verdicts.pairs] == [1, None, None, 1, 1]


def test_replies_that_were_cut_off_or_empty_are_told_from_others_without_a_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    replies = iter([Choice("Respon", False), Choice("", True), Choice("Hm.", True), Choice("", False)])
    asked = panel(lambda _: next(replies), again=0)
    report = win_rate(asked.compare(pairs(2)).pairs)
    assert report.abstentions == 4
    said = capsys.readouterr().out
    assert all(word in said for word in ("4", "2 cut off", "1 empty"))


def test_an_endpoint_that_answers_nothing_is_an_error() -> None:
    with pytest.raises(EndpointError, match="too long"):
        panel(lambda _: EndpointError("too long")).compare(pairs(3))


def test_a_judge_is_asked_only_what_it_can_answer() -> None:
    with pytest.raises(DataError, match="quality"):
        panel(lambda _: "[[5]]", "quality").compare(pairs(1))
    with pytest.raises(DataError, match="kto"):
        panel(lambda _: "Response A").grade([Answer("row 0", "Why?", "good")])


def test_answers_are_graded_and_some_again() -> None:
    def reply(request: Request) -> str | EndpointError:
        text = request.messages[-1]["content"]
        return "[[9]]" if "Yes!" in text else "No grade." if "Odd!" in text else EndpointError("down")

    answers = [Answer(f"row {i}", "Why?", answer) for i, answer in enumerate(("Yes!", "Odd!", "Lost!"))]
    grades = panel(reply, "quality", again=1).grade(answers)
    assert (grades.grades, grades.again) == ([9, None, None], {0: 9})
    assert len(grades.errors) == 1


def test_a_simulated_judge_at_the_endpoint_is_recovered() -> None:
    """Through prompts and replies: the whole way that a real judge's verdicts take."""
    simulated, rng = SimulatedJudge(accuracy=0.8, position_bias=0.3, abstains=0.1), np.random.default_rng(0)

    def reply(request: Request) -> str:
        verdict = simulated.verdict(good_first(request), rng)
        return "Hard to say." if verdict is None else f"Response {'A' if verdict else 'B'}"

    report = win_rate(panel(reply, again=0).compare(pairs(1500)).pairs)
    assert report.rate.contains(simulated.agreement)
    assert report.position_bias.contains(0.3)
    assert report.abstentions == pytest.approx(300, abs=60)


def test_log_probs_of_the_names_come_from_the_server(tmp_path: Path) -> None:
    """Each reply is kept with them, so that a second run needs no server."""
    pytest.importorskip("openai")
    pytest.importorskip("alpaca_eval")
    top = [{"token": name, "logprob": float(np.log(p))} for name, p in (("m", 0.6), ("M", 0.2))]
    logprobs = {"content": [{"token": "m", "logprob": -0.5, "top_logprobs": top}]}
    for running in (True, False):
        with serving() as server:
            server.reply = lambda body: completion("m", logprobs=logprobs)
            url = server.url if running else "http://localhost:1"
            endpoint = Endpoint(EndpointSettings(url, "gpt"), tmp_path / "transcripts.jsonl")
            verdicts = Panel(named_judge("alpaca_eval2"), endpoint, JudgeSettings(again=0)).compare(pairs(2))
        assert [(p.shown_first, p.shown_second) for p in verdicts.pairs] == [pytest.approx((0.75, 0.25))] * 2
        assert win_rate(verdicts.pairs).position_bias.value == pytest.approx(0.5)
        assert all(body["top_logprobs"] == 5 and body["logprobs"] for body in server.requests)
        assert len(server.requests) == 4 * running


@pytest.fixture
def alpaca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """AlpacaEval's judge with another prompt, so that its package is not needed."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("<|im_start|>user\n{instruction} m: {output_1} M: {output_2}\n<|im_end|>")
    monkeypatch.setattr("halos_pl.judge.judges.alpaca_eval.package_file", lambda path: prompt)
    return "alpaca_eval2"


#: What a server says of its tokens: nothing, not the most likely ones, only one of them, and in another spelling.
NONE: dict[str, Any] = {}
WITHOUT: dict[str, Any] = {"logprobs": {"content": [{"token": "m", "logprob": -0.5}]}}


def top(*names: str) -> dict[str, Any]:
    most = [{"token": name, "logprob": -0.7} for name in names]
    return {"logprobs": {"content": [{"token": names[0], "logprob": -0.7, "top_logprobs": most}]}}


@pytest.mark.parametrize("fields", [NONE, WITHOUT, top("m"), top(" m", " M")])
def test_a_verdict_is_not_read_from_the_text_where_log_probs_were_asked_for(
    fields: dict[str, Any], alpaca: str, tmp_path: Path
) -> None:
    """A server that has them later is asked again."""
    pytest.importorskip("openai")
    path = tmp_path / "transcripts.jsonl"
    with serving() as server:
        server.reply = lambda body: completion("m", **fields)

        def judged(logprobs: bool) -> list[float | None]:
            endpoint = Endpoint(EndpointSettings(server.url, "gpt", concurrency=1), path)
            settings = JudgeSettings(again=0, logprobs=logprobs)
            found = Panel(named_judge(alpaca), endpoint, settings).compare(pairs(3)).pairs
            return [pair.preference for pair in found]

        with pytest.raises(EndpointError, match=r"judging\.logprobs false"):
            judged(logprobs=True)
        assert judged(logprobs=False) == [0.5] * 3
        if fields != top(" m", " M"):  # these are log-probs, if of no use
            server.reply = lambda body: completion("m", **top("m", "M"))
            assert judged(logprobs=True) == [0.5] * 3


def test_a_few_replies_without_log_probs_are_failures_and_no_verdicts(alpaca: str) -> None:
    good = Choice("m", True, [-0.1], [{"m": -0.1, "M": -2.5}])
    replies = iter([good, Choice("m", True), Choice("", True), good])
    report = win_rate(panel(lambda _: next(replies), alpaca, again=0).compare(pairs(2)).pairs)
    assert (report.failures, report.abstentions, report.left_out) == (1, 1, 2)


@pytest.mark.parametrize("settings", [{"again": -1}, {"max_tokens": 0}, {"temperature": -0.1}])
def test_wrong_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        JudgeSettings(**settings)


def test_the_price_of_all_models_is_printed_before(capsys: pytest.CaptureFixture[str]) -> None:
    asked = panel(lambda _: "Response A", again=1)
    asked.announce(pairs(2), pairs(1))
    printed = capsys.readouterr().out
    assert "10 requests" in printed
    assert "USD" in printed
