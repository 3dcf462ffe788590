"""The client of endpoints, against a server that misbehaves on purpose; no test sleeps."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import Answer, FakeClock, Server, completion, serving

pytest.importorskip("openai")

from halos_pl.endpoint.client import Endpoint
from halos_pl.endpoint.exchange import EndpointError, Reply, Request
from halos_pl.endpoint.pace import FIRST, MOST, Pace, backoff
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.endpoint.transcripts import content_key
from halos_pl.endpoint.usage import estimate

KEY = "sk-secret-0123456789"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def settings(server: Server, **changes: Any) -> EndpointSettings:
    return replace(EndpointSettings(server.url, "tiny", concurrency=1, timeout=10), **changes)


def request(text: str = "Why?", **changes: Any) -> Request:
    return replace(Request([{"role": "user", "content": text}], max_tokens=4, temperature=0.5), **changes)


def asked(
    server: Server, clock: FakeClock, requests: list[Request], path: Path | None = None, **changes: Any
) -> list[Reply | EndpointError]:
    """The outcomes in the order of the requests."""
    endpoint = Endpoint(settings(server, **changes), path, Pace(clock, seed=0))
    outcomes = dict(endpoint.complete(requests))
    assert sorted(outcomes) == list(range(len(requests)))
    return [outcomes[i] for i in range(len(requests))]


def texts(outcomes: list[Reply | EndpointError]) -> list[str]:
    return [outcome.choices[0].text for outcome in outcomes if isinstance(outcome, Reply)]


def test_a_request_is_sent_as_it_is_and_its_reply_read(server: Server, clock: FakeClock) -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1}]}
    server.reply = lambda body: completion("one", None, reason="length", logprobs=logprobs)
    (reply,) = asked(server, clock, [request(n=2, seed=3, top_p=0.9, logprobs=True)], extra_body={"top_k": 5})
    assert isinstance(reply, Reply)
    assert [(c.text, c.finished, c.logprobs) for c in reply.choices] == [
        ("one", False, [-0.5, -1.0]),
        ("", False, [-0.5, -1.0]),
    ]
    assert (reply.prompt_tokens, reply.completion_tokens, reply.reused) == (5, 4, False)
    (body,) = server.requests
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Why?"}],
        **{"max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 2, "logprobs": True, "top_k": 5},
    }


def test_extra_fields_replace_and_remove_others(server: Server, clock: FakeClock) -> None:
    asked(server, clock, [request()], extra_body={"max_tokens": None, "max_completion_tokens": 9})
    assert "max_tokens" not in server.requests[0]
    assert server.requests[0]["max_completion_tokens"] == 9


def message(**fields: Any) -> dict[str, Any]:
    body = completion(None)
    body["choices"][0]["message"] |= fields
    return body


@pytest.mark.parametrize(
    "body",
    [
        completion(None, reason="tool_calls"),
        message(tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]),
        message(refusal="I will not."),
        message(reasoning_content="First, I"),
        message(reasoning="First, I", content="\n"),
        completion("half?", reason="a new reason"),
        completion("half?", reason=""),
    ],
    ids=str,
)
def test_a_reply_that_is_no_completion_is_refused_without_repeating(
    server: Server, clock: FakeClock, body: dict[str, Any]
) -> None:
    server.plan = [body]
    (error,) = asked(server, clock, [request()])
    assert isinstance(error, EndpointError)
    assert not error.fatal
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reason", "finished"),
    [("stop", True), ("eos", True), ("length", False), ("model_length", False), ("content_filter", False)],
)
def test_the_reason_tells_whether_the_model_ended(
    server: Server, clock: FakeClock, reason: str, finished: bool
) -> None:
    server.plan = [completion("text", reason=reason)]
    (reply,) = asked(server, clock, [request()])
    assert isinstance(reply, Reply)
    assert reply.choices[0].finished == finished


@pytest.mark.parametrize("value", [True, "-1", None, -math.inf, math.nan, -1.7e308])
def test_a_token_without_a_log_prob_is_a_malformed_reply(server: Server, clock: FakeClock, value: Any) -> None:
    server.plan = [completion("m", logprobs={"content": [{"token": "m", "logprob": value}]})]
    (error,) = asked(server, clock, [request(logprobs=True)], retries=0)
    assert isinstance(error, EndpointError)


def test_a_text_with_log_probs_of_no_token_has_none(server: Server, clock: FakeClock) -> None:
    server.plan = [completion("text", logprobs={"content": []})]
    (reply,) = asked(server, clock, [request(logprobs=True)])
    assert isinstance(reply, Reply)
    assert reply.choices[0].logprobs is None


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_the_log_probs_of_reasoning_are_not_those_of_the_text(server: Server, clock: FakeClock, field: str) -> None:
    logprobs = {"content": [{"token": t, "logprob": -1, "top_logprobs": [{"token": t, "logprob": -1}]} for t in "ab"]}
    body = completion("b", logprobs=logprobs)
    body["choices"][0]["message"][field] = "a"
    server.plan = [body]
    (reply,) = asked(server, clock, [request(logprobs=True)])
    assert isinstance(reply, Reply)
    (choice,) = reply.choices
    assert (choice.text, choice.logprobs, choice.top_logprobs) == ("b", None, None)


def test_another_server_is_named_and_not_asked(server: Server, clock: FakeClock) -> None:
    server.plan = [(302, {"Location": "http://elsewhere.invalid/v1"}, None)]
    with pytest.raises(EndpointError, match="elsewhere") as caught:
        asked(server, clock, [request()])
    assert caught.value.fatal


ABORTED = completion("half", reason="abort")


@pytest.mark.parametrize(
    "answer",
    [
        (429, {}, {"error": {"message": "slow down"}}),
        (500, {}, None),
        (503, {}, "loading"),
        "cut",
        "malformed",
        {"choices": []},
        {"choices": [{}]},
        {"error": {"message": "overloaded"}},
        [1],
        ABORTED,
    ],
    ids=str,
)
def test_a_passing_failure_is_repeated(server: Server, clock: FakeClock, answer: Answer) -> None:
    server.plan = [answer, answer]
    assert texts(asked(server, clock, [request()])) == ["echo: Why?"]
    assert len(server.requests) == 3
    assert clock.slept == [pytest.approx(0.75 * FIRST, rel=0.34), pytest.approx(1.5 * FIRST, rel=0.34)]


def test_a_timeout_is_repeated(server: Server, clock: FakeClock) -> None:
    server.plan = ["hang"]
    assert texts(asked(server, clock, [request()], timeout=0.2)) == ["echo: Why?"]
    assert len(server.requests) == 2


def test_after_the_last_attempt_the_error_is_yielded_and_the_rest_goes_on(server: Server, clock: FakeClock) -> None:
    server.plan = [(500, {}, {"error": {"message": "cuda"}})] * 3
    error, reply = asked(server, clock, [request("a"), request("b")], retries=2)
    assert isinstance(error, EndpointError)
    assert all(word in str(error) for word in ("cuda", "500", "3 attempts", server.url))
    assert not error.fatal
    assert texts([reply]) == ["echo: b"]


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
def test_retry_after_is_honoured(server: Server, clock: FakeClock, form: str) -> None:
    header = {
        "seconds": {"Retry-After": "90"},
        "milliseconds": {"retry-after-ms": "90000", "Retry-After": "1"},
        "date": {"Retry-After": formatdate(time.time() + 91, usegmt=True)},
    }[form]
    server.plan = [(429, header, None)]
    assert texts(asked(server, clock, [request()])) == ["echo: Why?"]
    assert 89 <= sum(clock.slept) <= 93


def test_all_threads_wait_when_the_server_asks_for_a_pause(server: Server) -> None:
    clock = FakeClock()
    pace = Pace(clock, seed=0)
    pace.pause(30)
    pace.wait(threading.Event())
    assert 30 <= clock.slept[0] <= 31
    pace.wait(threading.Event())  # over
    assert len(clock.slept) == 1


def test_a_long_pause_is_not_waited_out(server: Server, clock: FakeClock) -> None:
    server.plan = [(429, {"Retry-After": "7200"}, None)]
    with pytest.raises(EndpointError, match="7200 s"):
        asked(server, clock, [request()])
    assert clock.slept == []


def test_backoff_doubles_up_to_its_cap_with_jitter() -> None:
    assert [backoff(i, 1.0) for i in (0, 1, 2, 5, 6, 50)] == [1, 2, 4, 32, MOST, MOST]
    assert backoff(3, 0.0) == 4


@pytest.mark.parametrize(
    ("status", "body", "word"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "api_key_env"),
        (403, None, "api_key_env"),
        (404, {"error": {"message": "The model does not exist"}}, "tiny"),
        (404, {"detail": "Not Found"}, "/v1"),
        (429, {"error": {"code": "insufficient_quota", "message": "m"}}, "credit"),
        (501, None, "chat completions"),
    ],
)
def test_what_fails_for_all_requests_stops_at_once(
    server: Server, clock: FakeClock, status: int, body: Any, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.plan = [(status, {}, body)] * 9
    with pytest.raises(EndpointError, match=word) as caught:
        asked(server, clock, [request(str(i)) for i in range(5)])
    assert "\n" not in str(caught.value)
    assert caught.value.fatal
    assert len(server.requests) == 1
    assert clock.slept == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_bad_request_fails_alone_and_once(server: Server, clock: FakeClock, status: int) -> None:
    server.plan = [(status, {}, {"error": {"message": "prompt too long"}})]
    error, reply = asked(server, clock, [request("a"), request("b")])
    assert isinstance(error, EndpointError)
    assert "prompt too long" in str(error)
    assert texts([reply]) == ["echo: b"]
    assert len(server.requests) == 2


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_choices_is_refused_without_repeating(server: Server, clock: FakeClock, number: int) -> None:
    server.reply = lambda body: completion(*["x"] * number)
    (error,) = asked(server, clock, [request(n=2)])
    assert isinstance(error, EndpointError)
    assert f"{number} choices instead of 2" in str(error)
    assert len(server.requests) == 1


def test_a_server_that_is_down_is_found_by_the_first_probe(clock: FakeClock) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    endpoint = Endpoint(EndpointSettings(url, "tiny"), None, Pace(clock))
    with pytest.raises(EndpointError, match=url):
        next(endpoint.complete([request()]))
    assert clock.slept == []


def test_the_probe_refuses_a_wrong_key_and_nothing_else(server: Server, clock: FakeClock) -> None:
    server.models = (401, {}, None)
    with pytest.raises(EndpointError, match="without a key"):
        asked(server, clock, [request()])
    for models in ((404, {}, None), (503, {}, "loading"), "malformed", [1]):
        server.models = models
        assert texts(asked(server, clock, [request()])) == ["echo: Why?"]


def test_requests_run_at_the_same_time_up_to_the_limit(server: Server, clock: FakeClock) -> None:
    barrier = threading.Barrier(3)

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(20)  # broken unless three requests are here at once
        return completion("x")

    server.reply = reply
    assert texts(asked(server, clock, [request(str(i)) for i in range(9)], concurrency=3)) == ["x"] * 9
    assert server.most == 3


def test_a_key_is_sent_and_otherwise_appears_nowhere(
    server: Server, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, name)
    leak = {"error": {"message": f"bad request with Authorization: Bearer {KEY}"}}
    server.plan = [(400, {}, leak), completion(f"your key is {KEY}"), (500, {}, leak)]
    path = tmp_path / "t.jsonl"
    requests = [request("a"), request("b"), request(f"I am {KEY}")]
    outcomes = asked(server, clock, requests, path, api_key_env="MY_KEY")
    assert all(each["authorization"] == f"Bearer {KEY}" for each in server.headers)
    error = outcomes[0]
    assert isinstance(error, EndpointError)
    seen = ["".join(traceback.format_exception(error)), repr(outcomes), path.read_text(), *capfd.readouterr()]
    seen.append(caplog.text.replace(f"I am {KEY}", ""))  # the client's log of the message that was sent
    server.plan = [(401, {}, leak)]
    try:
        asked(server, clock, [request("c")], api_key_env="MY_KEY")
    except EndpointError as fatal:
        cause: BaseException | None = fatal
        while cause is not None:
            seen += [repr(cause), str(vars(cause)), "".join(traceback.format_exception(cause))]
            cause = cause.__cause__ or cause.__context__
    seen.append(repr(settings(server, api_key_env="MY_KEY")))
    assert len(seen) > 8
    assert not [text for text in seen if KEY in text]


def test_a_variable_that_is_named_must_have_a_key(monkeypatch: Any) -> None:
    for value in (None, " "):
        monkeypatch.delenv("MY_KEY", raising=False) if value is None else monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(ValueError, match=r"endpoint\.api_key_env") as caught:
            EndpointSettings("http://host/v1", "m", api_key_env="MY_KEY").api_key()
        assert "MY_KEY" not in str(caught.value)


def test_without_a_key_a_local_server_answers(server: Server, clock: FakeClock, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert texts(asked(server, clock, [request()])) == ["echo: Why?"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "localhost:8000"),
        ("url", "http://user:secret@host/v1"),
        ("url", "http://host/v1?key=secret"),
        ("api_key_env", "sk-secret"),
        ("concurrency", 0),
        ("timeout", 0.0),
        ("timeout", float("nan")),
        ("retries", -1),
        ("price_in", 1.0),
        ("extra_body", {"model": "x"}),
        ("extra_body", {"max_tokens": "many"}),
    ],
)
def test_wrong_settings_are_named_and_secrets_not_repeated(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"endpoint\.{field}") as caught:
        EndpointSettings(**{"url": "http://host/v1", "model": "m", field: value})
    assert "secret" not in str(caught.value)


def test_a_model_must_be_named(server: Server) -> None:
    with pytest.raises(ValueError, match=r"endpoint\.model"):
        Endpoint(EndpointSettings(server.url))


# Transcripts -------------------------------------------------------------------------------------------


def test_a_repeated_command_reuses_replies_and_asks_for_the_rest(
    server: Server, clock: FakeClock, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    requests = [request(str(i)) for i in range(4)]
    endpoint = Endpoint(settings(server), path, Pace(clock))
    for number, _ in endpoint.complete(requests):
        if number == 1:
            break  # as if killed
    first = path.read_bytes()
    outcomes = asked(server, clock, requests, path)
    assert path.read_bytes().startswith(first)
    assert [isinstance(each, Reply) and each.reused for each in outcomes] == [True, True, False, False]
    assert texts(outcomes) == [f"echo: {i}" for i in range(4)]
    assert sorted(body["messages"][0]["content"] for body in server.requests) == list("0123")


def test_a_failure_is_asked_again_next_time(server: Server, clock: FakeClock, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    server.plan = [(400, {}, None)]
    (error,) = asked(server, clock, [request()], path)
    assert isinstance(error, EndpointError)
    assert texts(asked(server, clock, [request()], path)) == ["echo: Why?"]


def test_a_torn_last_line_is_dropped_and_reported(
    server: Server, clock: FakeClock, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "t.jsonl"
    asked(server, clock, [request("a"), request("b")], path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert texts(asked(server, clock, [request("a"), request("b")], path)) == ["echo: a", "echo: b"]
    assert str(path) in capsys.readouterr().err
    assert path.read_bytes() == whole
    assert len(server.requests) == 3


def test_another_file_is_refused_and_left(server: Server, clock: FakeClock, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1 "):
        asked(server, clock, [request()], path)
    assert path.read_text() == '{"prompt": "Why?"}\n'


def test_the_key_is_a_function_of_the_content_alone() -> None:
    base = content_key("m", request())
    assert base == content_key("m", request())
    others = [request("other"), request(seed=1), request(n=2), request(max_tokens=5), request(repeat=1)]
    keys = {base, content_key("other", request()), content_key("m", request(), {"top_k": 1})}
    assert len(keys | {content_key("m", each) for each in others}) == 8


def test_requests_of_the_same_content_agree(server: Server, clock: FakeClock, tmp_path: Path) -> None:
    """Two replies to one question would make a resumed command differ from an uninterrupted one."""
    numbers = iter(range(9))
    server.reply = lambda body: completion(str(next(numbers)))
    requests = [request(), request(), request(repeat=1)]
    first = asked(server, clock, requests, tmp_path / "t.jsonl", concurrency=3)
    again = asked(server, clock, requests, tmp_path / "t.jsonl", concurrency=3)
    assert texts(first)[0] == texts(first)[1] != texts(first)[2]
    assert texts(again) == texts(first)


# Tokens and prices -------------------------------------------------------------------------------------


def test_tokens_and_prices_are_counted(server: Server, clock: FakeClock, tmp_path: Path) -> None:
    prices = {"price_in": 2.0, "price_out": 10.0}
    server.plan = ["good", {**completion("x"), "usage": None}, (400, {}, None)]
    requests = [request(text) for text in "abc"]
    endpoint = Endpoint(settings(server, **prices), tmp_path / "t.jsonl", Pace(clock))
    list(endpoint.complete(requests))
    usage = endpoint.usage
    assert (usage.replies, usage.reused, usage.failed, usage.uncounted) == (2, 0, 1, 1)
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 2)
    assert "3e-05 USD" in usage.line(endpoint.settings)  # 5 * 2 + 2 * 10 millionths
    again = Endpoint(settings(server, **prices), tmp_path / "t.jsonl", Pace(clock))
    list(again.complete(requests[:2]))
    assert (again.usage.replies, again.usage.reused, again.usage.prompt_tokens) == (0, 2, 0)
    line = estimate([request("x" * 4000, n=2)] * 3, endpoint.settings)
    assert all(word in line for word in ("3 requests", "3,000 prompt", "24 completion", "0.00624 USD"))
    assert "USD" not in estimate(requests, settings(server))


def test_transcripts_are_json_lines(server: Server, clock: FakeClock, tmp_path: Path) -> None:
    asked(server, clock, [request("ä")], tmp_path / "t.jsonl")
    (entry,) = map(json.loads, (tmp_path / "t.jsonl").read_text().splitlines())
    assert entry["request"]["messages"] == [{"role": "user", "content": "ä"}]
    assert entry["reply"]["choices"][0]["text"] == "echo: ä"
    assert entry["model"] == "tiny"
