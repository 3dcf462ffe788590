"""``halos collect``: faults in one line before a model is loaded, and its engines."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from misbehaving_server import completion, serving
from run_halos import ROOT, refused, write_jsonl

from halos_pl.collect.command import collect
from halos_pl.collect.conversations import Conversations
from halos_pl.collect.engine import EngineError
from halos_pl.collect.feedback_file import FeedbackFile
from halos_pl.collect.local import LocalEngine
from halos_pl.collect.remote import EndpointEngine
from halos_pl.data.turns import stop_ids
from halos_pl.endpoint.exchange import EndpointError
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.policy.drawing import Decoding, draw
from halos_pl.policy.loading import ModelSpec, load_model
from halos_pl.policy.sampling import as_samples, encode_prompts
from halos_pl.testing import tiny_tokenizer
from halos_pl.training.named_model import named_model

SAMPLING = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0}
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("starlette", "uvicorn"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra: collect)")

    def load_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("halos_pl.training.named_model.load_model", load_model)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.usefixtures("never_loaded")
def test_faults_are_one_line(
    tiny_folder: Path, tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHORT", "secret7")
    monkeypatch.setenv("EMPTY", "")
    (tmp_path / "password").write_text("short\n")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    server = EndpointSettings("http://127.0.0.1:1/v1", "")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"port": taken}, ["--port", str(taken), "another port"]),
        ({"port": 70000}, ["--port", "65535"]),
        ({"host": "192.0.2.1"}, ["--host", "192.0.2.1", "no address of this machine"]),
        ({"host": "0.0.0.0"}, ["0.0.0.0", "--password"]),
        ({"host": ""}, ["--password"]),
        ({"password": "my secret words"}, ["env:NAME", "file:PATH"]),
        ({"password": "env:SHORT"}, ["env:SHORT", "8"]),
        ({"password": "env:EMPTY"}, ["env:EMPTY", "empty"]),
        ({"password": "file:password"}, ["file:password", "8"]),
        ({"password": "file:nowhere"}, ["nowhere"]),
        ({"out": pairs}, ["pairs.jsonl:1", "--kind choices"]),
        ({"out": "no/a.jsonl"}, ["no/a.jsonl"]),
        ({"out": "a.txt"}, ["a.txt", ".jsonl"]),
        ({"kind": "choices", "temperature": 0.0}, ["temperature"]),
        ({"system": "See <image>."}, ["<image>"]),
        ({"system": "<|im_end|>"}, ["--system", "<|im_end|>"]),
        ({"max_new_tokens": 0}, ["max_new_tokens"]),
        ({"seed": -1}, ["seed"]),
        ({"engine": "endpoint"}, ["--endpoint.url"]),
        ({"endpoint": server}, ["--engine endpoint"]),
        ({"engine": "endpoint", "endpoint": server, "ckpt_path": "best"}, ["--ckpt_path"]),
        ({"readonly": True, "system": "Be brief."}, ["--system"]),
        ({"readonly": True}, [str(tiny_folder), "folder"]),
        *[
            ({"readonly": True, name: value}, [f"--{name}"])
            for name, value in {"out": pairs, "kind": "choices", "max_new_tokens": 3, "temperature": 0.0}.items()
        ],
    ]
    if importlib.util.find_spec("openai"):
        cases.append(({"engine": "endpoint", "endpoint": server}, ["127.0.0.1:1", "no connection"]))
    unseeded = replace(server, extra_body={"seed": None})
    cases.append(({"engine": "endpoint", "endpoint": unseeded, "seed": 0}, ["--seed", "extra_body"]))
    for options, words in cases:
        with pytest.raises((ValueError, OSError)) as raised:
            collect(str(tiny_folder), **{"port": 0, **options})
        line = str(raised.value)
        assert "\n" not in line, line
        assert all(word in line for word in words), line
        assert "secret" not in line
    assert "--port" in refused(capfd, ["collect", str(tiny_folder), f"--port={taken}"])
    assert "thumbs" in refused(capfd, ["collect", str(tiny_folder), "--kind=stars"], status=2)
    (tmp_path / "feedback.jsonl").touch()  # never shown in place of the file that is named
    assert "nowhere.ndjson" in refused(capfd, ["collect", "nowhere.ndjson", "--port=0", "--readonly"])
    (tmp_path / "feedback.jsonl").unlink()
    (tmp_path / "scored").mkdir()
    scored = tmp_path / "scored" / "rows.jsonl"
    scored.write_text('\n{"prompt": "a", "completions": ["b"], "scores": [1]}\n')
    assert "rows.jsonl: line 2" in refused(capfd, ["collect", str(scored), "--port=0", "--readonly"])
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["pairs.jsonl"]


@pytest.mark.usefixtures("never_loaded")
def test_a_model_without_a_chat_template(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "base"
    load_model(ModelSpec(str(tiny_folder))).save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    line = refused(capfd, ["collect", str(folder), f"--out={tmp_path}/a.jsonl", "--port=0"])
    assert "chat template" in line
    assert "--chat_template" in line
    assert str(folder) in line


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert "halos_pl[collect]" in refused(capfd, ["collect", str(tmp_path)])


def test_the_page_is_packaged() -> None:
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert "page/*" in tomllib.load(file)["tool"]["setuptools"]["package-data"]["*"]


# Engines -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> LocalEngine:
    named = named_model(str(tiny_folder))
    return LocalEngine(named, named.tokenizer(), SAMPLING, "refuse")


def alone(engine: LocalEngine, messages: Any, seed: int) -> tuple[list[int], list[int]]:
    """Prompt and completion that the model draws with this seed, without the page."""
    [ids] = encode_prompts(engine.tokenizer, [messages], ["x"], "", "refuse")
    decoding = Decoding(tuple(stop_ids(engine.tokenizer)), None, *SAMPLING.values())
    return ids, draw(engine._policy, [ids], ["x"], decoding, [seed])[0].ids


def test_a_local_model_shows_what_it_writes(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.collect.local.UPDATE", 0.0)
    shown: list[list[str]] = []
    state = torch.get_rng_state()
    answers = engine.answer(HELLO, [3, 4], shown.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert answers == engine.answer(HELLO, [3, 4], lambda texts: None)
    assert answers[0].text != answers[1].text
    for i, answer in enumerate(answers):
        ids = alone(engine, HELLO, 3 + i)[1]
        [sample] = as_samples(engine._policy, engine.tokenizer, [[]], [ids])
        assert answer.finished == sample.finished
        texts = [each[i] for each in shown]
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert sample.raw.startswith(texts[-1])
        assert sample.text in answer.text
    assert max(len({each[i] for each in shown}) for i in (0, 1)) > 3


def test_a_stopped_model_can_be_asked_again(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.collect.local.UPDATE", 0.0)
    calls = []

    def stop(texts: list[str]) -> None:
        calls.append(texts)
        if len(calls) == 2:
            raise KeyError("stopped")

    before = engine.answer(HELLO, [3], lambda texts: None)
    with pytest.raises(KeyError, match="stopped"):
        engine.answer(HELLO, [3], stop)
    assert len(calls) == 2
    assert engine.answer(HELLO, [3], lambda texts: None) == before


def test_conversations_that_the_model_cannot_read(engine: LocalEngine) -> None:
    engine.refuse(HELLO)
    with pytest.raises(ValueError, match=re.escape("<|im_start|>")):
        engine.refuse([{"role": "user", "content": "<|im_start|>system"}])
    with pytest.raises(EngineError, match="512"):
        engine.refuse([{"role": "user", "content": "why " * 400}])


def test_a_row_tells_whether_it_has_the_sampled_tokens(engine: LocalEngine, tmp_path: Path) -> None:
    """Encoded as in training, against the tokens that the model read and wrote."""
    from halos_pl.data.read import read
    from halos_pl.data.source import Source
    from halos_pl.data.tokenize import Encoder

    file = FeedbackFile(tmp_path / "a.jsonl", "thumbs")
    conversations = Conversations(engine, file, seed=1)
    chat = conversations.new("session", "Ada")
    try:
        for i in range(2):
            conversations.say(chat, f"Hello {i}?")
            while chat.turns[i].status != "done":
                assert chat.turns[i].status in ("waiting", "writing"), chat.turns[i].error
                threading.Event().wait(0.005)
            conversations.judge(chat, i, True)
    finally:
        conversations.close()
        file.close()
    examples: list[Any] = list(read(Source(str(file.path))))
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    for tokens, row in zip(Encoder(engine.tokenizer).encode(examples), rows, strict=True):
        ids, drawn = alone(engine, row["prompt"], row["seed"])
        equal = (tokens.prompt, tokens.completions) == (ids, [drawn])  # type: ignore[union-attr]
        assert row["same_tokens"] == equal
        assert len(row["model"]["weights"]) == 64


def test_a_server_answers() -> None:
    pytest.importorskip("openai", reason="openai is not installed (extra: endpoint)")
    with serving() as server:
        server.plan = [completion("one"), completion("two"), (400, {}, {"error": {"message": "too long"}})]
        engine = EndpointEngine(EndpointSettings(server.url, "m", concurrency=1, retries=0), SAMPLING)
        answers = engine.answer(HELLO, [7, 8], lambda texts: None)
        assert [answer.text for answer in answers] == ["one", "two"]
        sent = [(body["seed"], body["messages"], body["max_tokens"]) for body in server.requests]
        assert sent == [(7, HELLO, 12), (8, HELLO, 12)]
        with pytest.raises(EndpointError, match="too long"):
            engine.answer(HELLO, [9], lambda texts: None)


def test_the_recorded_settings_are_those_of_the_request(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="openai is not installed (extra: endpoint)")
    extra = {"top_k": 5, "seed": None, "max_tokens": None, "max_completion_tokens": 9}
    with serving() as server:
        engine = EndpointEngine(EndpointSettings(server.url, "m", retries=0, extra_body=extra), SAMPLING)
        conversations = Conversations(engine, FeedbackFile(tmp_path / "a.jsonl", "thumbs"), seed=None)
        chat = conversations.new("session", "Ada")
        conversations.say(chat, "Hello?")
        while chat.turns[0].status != "done":
            assert chat.turns[0].status in ("waiting", "writing"), chat.turns[0].error
            threading.Event().wait(0.005)
        conversations.judge(chat, 0, True)
        conversations.close()
        conversations.file.close()
    row, (sent,) = json.loads((tmp_path / "a.jsonl").read_text()), server.requests
    assert "seed" not in row
    assert row["sampling"].pop("engine") == "endpoint"
    assert row["sampling"].pop("extra_body") == extra
    assert row["sampling"] == {name: sent[name] for name in ("temperature", "top_p")}
    assert "max_tokens" not in sent


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(tiny_folder: Path, tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: collect)")
    words = [sys.executable, "-m", "halos_pl", "collect", str(tiny_folder), "--out=a.jsonl", "--port=0"]
    words += ["--max_new_tokens=16", "--host=0.0.0.0", "--password=env:PAGE"]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PAGE": "correct horse", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        while not (match := re.search(r"http://0\.0\.0\.0:(\d+)", lines[-1] if lines else "")):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        with httpx.Client(base_url=f"http://127.0.0.1:{match[1]}", timeout=60) as browser:
            assert browser.post("/enter", data={"name": "Ada", "password": "correct horse"}).status_code == 303
            chat = browser.post("/chats", json={}).json()["id"]
            browser.post(f"/chats/{chat}/messages", json={"text": "Hello?"}).raise_for_status()
            for _ in range(50):  # a random model may write nothing
                assert "event: end" in browser.get(f"/chats/{chat}/events").text
                if browser.get(f"/chats/{chat}").json()["turns"][0]["status"] == "done":
                    break
                browser.post(f"/chats/{chat}/0/again", json={}).raise_for_status()
            browser.post(f"/chats/{chat}/0/verdict", json={"value": False}).raise_for_status()
        process.send_signal(signal.SIGINT)
        output = "".join(lines) + process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "correct horse" not in output
    (row,) = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert (row["annotator"], row["label"]) == ("Ada", False)
