"""Replies that no file or figure could hold, replies that never end, waits, and files that another process uses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import Answer, FakeClock, Server, completion, serving

pytest.importorskip("openai")

from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import Choice, EndpointError, Reply, Request, sent_again
from halos_pl.endpoint.pace import Pace
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.endpoint.transcripts import Transcripts
from halos_pl.endpoint.usage import estimate

REQUEST = Request([{"role": "user", "content": "Why?"}], max_tokens=4, temperature=0.5)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def asked(server: Server, path: Path | None = None, **changes: Any) -> Reply | EndpointError:
    endpoint = Endpoint(EndpointSettings(server.url, "tiny", **changes), path, Pace(FakeClock(), seed=0))
    [(_, outcome)] = endpoint.complete([REQUEST])
    return outcome


@pytest.mark.parametrize("value", [math.nan, math.inf, 9999, 10**400])
@pytest.mark.parametrize("top", [False, True])
def test_a_log_prob_that_is_none_is_never_recorded(server: Server, tmp_path: Path, value: float, top: bool) -> None:
    """Neither that of the token nor that of an alternative."""
    place = {"token": "m", "logprob": -1 if top else value}
    place |= {"top_logprobs": [{"token": "m", "logprob": value}]} if top else {}
    server.plan = [completion("m", logprobs={"content": [place]})]
    outcome = asked(server, tmp_path / "t.jsonl", retries=0)
    assert isinstance(outcome, EndpointError)
    assert not outcome.fatal
    assert not (tmp_path / "t.jsonl").read_bytes()


@pytest.mark.parametrize("count", [-1, 1.5, True, "9", None, 10**400])
def test_an_impossible_number_of_tokens_is_no_count(server: Server, count: Any) -> None:
    server.plan = [completion("m") | {"usage": {"prompt_tokens": count, "completion_tokens": count}}]
    outcome = asked(server)
    assert isinstance(outcome, Reply)
    assert outcome.prompt_tokens is outcome.completion_tokens is None


def test_a_recorded_log_prob_that_is_none_is_named(tmp_path: Path) -> None:
    Transcripts(tmp_path / "t.jsonl").find("k")
    stored = {"choices": [{"text": "m", "finished": True, "logprobs": [math.nan], "top_logprobs": None}]}
    entry = {"key": "k", "reply": stored | {"prompt_tokens": 1, "completion_tokens": 1}}
    (tmp_path / "t.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:1 "):
        Transcripts(tmp_path / "t.jsonl")


@pytest.mark.parametrize("text", ["A \ud800", "\udfff", "\ude00\ud83d"])
def test_half_a_character_does_not_stop_a_file_from_being_written(server: Server, tmp_path: Path, text: str) -> None:
    server.plan = [completion(text)]
    outcome = asked(server, tmp_path / "t.jsonl")
    assert isinstance(outcome, Reply)
    outcome.choices[0].text.encode("utf-8")
    assert len(outcome.choices[0].text) == len(text)
    assert Choice("ä \U0001f600", True).text == "ä \U0001f600"


@pytest.mark.parametrize("answer", ["drip", "headers", (500, {}, "drip")], ids=str)
def test_a_reply_that_never_ends_is_given_up(server: Server, answer: Answer) -> None:
    server.plan = [answer]
    outcome = asked(server, timeout=0.3, retries=0)
    assert "timeout" in str(outcome)


def test_a_long_wait_is_reported_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.plan = [(429, {"Retry-After": "25"}, {"error": {"message": "slow down"}})]
    assert isinstance(asked(server), Reply)
    said = capsys.readouterr().err
    assert all(word in said for word in ("25 s", "slow down", server.url))
    pace = Pace(FakeClock(), seed=0)
    for _ in range(3):
        pace.say("busy", 30.0)
    pace.say("brief", 1.0)
    assert capsys.readouterr().err.count("\n") == 1


def test_what_fails_for_good_is_told_from_what_the_same_command_may_mend(server: Server) -> None:
    server.plan = [(400, {}, None), (500, {}, None)]
    errors = [asked(server, retries=0) for _ in range(2)]
    assert [isinstance(e, EndpointError) and e.permanent for e in errors] == [True, False]
    bad, passing = EndpointError("x", permanent=True), EndpointError("x")
    assert len({sent_again(e) for e in ([bad], [passing], [bad, passing])}) == 3


def test_the_estimate_is_that_of_the_request_that_is_sent(server: Server) -> None:
    """``extra_body`` replaces and removes limits."""

    def line(**extra: Any) -> str:
        settings = EndpointSettings(server.url, "tiny", price_in=1.0, price_out=1e6, extra_body=extra or None)
        return estimate([REQUEST] * 2, settings)

    for extra, most in (({}, 8), ({"max_tokens": 300}, 600), ({"max_tokens": None, "max_completion_tokens": 9}, 18)):
        assert f"at most {most} completion" in line(**extra)
        assert f"at most about {most} USD" in line(**extra)
    assert "at most" not in line(max_tokens=None)


def test_a_file_that_another_process_writes_is_waited_for_and_its_replies_used(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    other = (
        "import sys, time; from pathlib import Path; from halos_pl.endpoint.transcripts import Transcripts\n"
        "t = Transcripts(Path(sys.argv[1])); t.find('k'); print('held', flush=True); sys.stdin.readline()\n"
        "open(sys.argv[1], 'ab').write(Path(sys.argv[2]).read_bytes())"
    )
    asked(server, tmp_path / "first.jsonl")
    words = [sys.executable, "-c", other, str(path), str(tmp_path / "first.jsonl")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        outcomes: list[Any] = []
        waiting = threading.Thread(target=lambda: outcomes.append(asked(server, path)))
        waiting.start()
        waiting.join(0.3)
        process.stdin.write("\n")
        process.stdin.flush()
        waiting.join(30)
    [outcome] = outcomes
    assert isinstance(outcome, Reply)
    assert outcome.reused
    assert len(server.requests) == 1


def test_a_folder_is_no_file_of_replies(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"is a folder"):
        asked(server, tmp_path)
