"""``halos collect``: faults in one line before a model is loaded, and its engines."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from misbehaving_server import completion, serving
from run_halos import ROOT, refused, write_jsonl

from halos_pl.collect.conversations import Conversations
from halos_pl.collect.engine import EngineError
from halos_pl.collect.feedback_file import FeedbackFile
from halos_pl.collect.local import LocalEngine
from halos_pl.collect.remote import EndpointEngine
from halos_pl.data.example import DataError
from halos_pl.endpoint.exchange import EndpointError
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.policy.sampling import generate
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
    for options, status, words in (
        ([f"--port={taken}"], 1, ["--port", str(taken), "another port"]),
        (["--port=70000"], 1, ["--port", "65535"]),
        (["--host=no.such.host.invalid"], 1, ["--host"]),
        (["--host=0.0.0.0"], 1, ["0.0.0.0", "--password"]),
        (["--host="], 1, ["--password"]),
        (["--password=my secret words"], 1, ["env:NAME", "file:PATH"]),
        (["--password=env:SHORT"], 1, ["env:SHORT", "8"]),
        (["--password=env:EMPTY"], 1, ["env:EMPTY", "empty"]),
        (["--password=file:password"], 1, ["file:password", "8"]),
        (["--password=file:nowhere"], 1, ["nowhere"]),
        ([f"--out={pairs}"], 1, ["pairs.jsonl:1", "--kind choices"]),
        (["--out=no/a.jsonl"], 1, ["no/a.jsonl"]),
        (["--out=a.txt"], 1, ["a.txt", ".jsonl"]),
        (["--kind=choices", "--temperature=0"], 1, ["temperature"]),
        (["--kind=stars"], 2, ["kind", "thumbs"]),
        (["--max_new_tokens=0"], 1, ["max_new_tokens"]),
        (["--seed=-1"], 1, ["seed"]),
        (["--engine=endpoint"], 1, ["--endpoint.url"]),
        (["--endpoint.url=http://127.0.0.1:1/v1"], 1, ["--engine endpoint"]),
        (["--engine=endpoint", "--endpoint.url=http://127.0.0.1:1/v1"], 1, ["127.0.0.1:1", "no connection"]),
        (["--readonly"], 1, ["feedback.jsonl"]),
    ):
        if "endpoint" in str(options) and len(options) == 2 and importlib.util.find_spec("openai") is None:
            continue
        line = refused(capfd, ["collect", str(tiny_folder), "--port=0", *options], status)
        assert "\n" not in line, line
        assert all(word in line for word in words), line
        assert "secret" not in line
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
    return LocalEngine(named_model(str(tiny_folder)), SAMPLING, "refuse")


def test_a_local_model_shows_what_it_writes(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.collect.local.UPDATE", 0.0)
    shown: list[list[str]] = []
    state = torch.get_rng_state()
    answers = engine.answer(HELLO, 2, 3, shown.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert answers == engine.answer(HELLO, 2, 3, lambda texts: None)
    assert answers != engine.answer(HELLO, 2, 4, lambda texts: None)
    samples = generate(
        engine._policy, engine.tokenizer, [HELLO], num_samples=2, seed=3, batch_size=2, progress=False, **SAMPLING
    )[0]
    assert [answer.finished for answer in answers] == [sample.finished for sample in samples]
    for i, (answer, sample) in enumerate(zip(answers, samples, strict=True)):
        assert answer.text in (sample.raw, sample.text)
        texts = [each[i] for each in shown]
        assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
        assert sample.raw.startswith(texts[-1])
    assert max(len({each[i] for each in shown}) for i in (0, 1)) > 3


def test_a_stopped_model_can_be_asked_again(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.collect.local.UPDATE", 0.0)
    calls = []

    def stop(texts: list[str]) -> None:
        calls.append(texts)
        if len(calls) == 2:
            raise KeyError("stopped")

    before = engine.answer(HELLO, 1, 3, lambda texts: None)
    with pytest.raises(KeyError, match="stopped"):
        engine.answer(HELLO, 1, 3, stop)
    assert len(calls) == 2
    assert engine.answer(HELLO, 1, 3, lambda texts: None) == before


def test_conversations_that_the_model_cannot_read(engine: LocalEngine) -> None:
    engine.refuse(HELLO)
    with pytest.raises(ValueError, match=re.escape("<|im_start|>")):
        engine.refuse([{"role": "user", "content": "<|im_start|>system"}])
    with pytest.raises(EngineError, match="512"):
        engine.refuse([{"role": "user", "content": "why " * 400}])


def test_a_recorded_row_has_the_sampled_tokens(engine: LocalEngine, tmp_path: Path) -> None:
    """Encoded as in training, prompt and completion are the tokens that the model read and wrote."""
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
        [[sample]] = generate(
            engine._policy, engine.tokenizer, [row["prompt"]], seed=row["seed"], progress=False, **SAMPLING
        )
        assert row["same_tokens"]
        assert (tokens.prompt, tokens.completions) == (sample.prompt_ids, [sample.completion_ids])  # type: ignore[union-attr]
        assert len(row["model"]["weights"]) == 64


def test_a_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="openai is not installed (extra: endpoint)")
    replies = [completion("one"), completion("two"), (400, {"error": {"message": "too long"}})]
    with serving(replies) as server:
        engine = EndpointEngine(EndpointSettings(server.url, "m", concurrency=1, retries=0), SAMPLING)
        answers = engine.answer(HELLO, 2, 7, lambda texts: None)
        assert [answer.text for answer in answers] == ["one", "two"]
        sent = [body for body in server.bodies if "messages" in body]
        assert [(body["seed"], body["messages"], body["max_tokens"]) for body in sent] == [(7, HELLO, 12), (8, HELLO, 12)]
        with pytest.raises(EndpointError, match="too long"):
            engine.answer(HELLO, 1, 7, lambda texts: None)


def test_data_error_is_what_the_page_shows() -> None:
    assert issubclass(DataError, ValueError)


def test_the_command_serves_until_it_is_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    del urllib, tiny_folder, tmp_path
