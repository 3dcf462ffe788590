"""``halos evaluate --win_rate``: a run, a judge at an endpoint, and answers to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import Server, completion, serving
from run_halos import binary_data, fit, write_jsonl

from halos_pl.cli.main import main
from halos_pl.evaluation.files import ANSWERS, BEFORE, FILE, MEASURED, TRANSCRIPTS, VERDICTS, WIN_RATE

RUBRIC = """
prompt: "Q: {question}\\nA: {answer_a}\\nB: {answer_b}\\nGold: {gold}"
choices: {first: A, second: B, tie: C}
"""
SETTINGS = ["--max_new_tokens=6", "--temperature=1", "--seed=3", "--batch_size=4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run, and prompts with answers to compare with."""
    pytest.importorskip("openai")
    home = tmp_path_factory.mktemp("judged")
    options = ["--trainer.max_steps=2", "--model.optimizer.init_args.lr=0.05", '--model.policy.lora={"r": 2}']
    main(fit(tiny_folder, "kto", binary_data(home / "train.jsonl"), home / "run", *options))
    rows = [{"prompt": f"question {i}", "gold": i, "chosen": f"answer {i}"} for i in range(5)]
    write_jsonl(home / "prompts.jsonl", rows)
    (home / "rubric.yaml").write_text(RUBRIC)
    return home


@pytest.fixture
def server() -> Iterator[Server]:
    """A judge that prefers the longer of two answers, and abstains on the question 3."""
    with serving() as server:

        def reply(body: dict[str, Any]) -> dict[str, Any]:
            text = body["messages"][-1]["content"]
            assert "Gold: " in text
            a, b = text.split("\nA: ")[1].split("\nGold: ")[0].split("\nB: ")
            verdict = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
            return completion("Who knows?" if "question 3" in text else verdict)

        server.reply = reply
        yield server


def evaluate(home: Path, server: Server, model: Path, *words: str, prompts: bool = True) -> None:
    some = [f"--prompts={home}/prompts.jsonl"] if prompts else []
    at = [f"--endpoint.url={server.url}", "--endpoint.model=judge"]
    main(["evaluate", str(model), *some, f"--win_rate={home}/rubric.yaml", *at, *SETTINGS, *words])


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_answers_are_compared_with_a_column_and_nothing_is_asked_twice(
    home: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(home, server, home / "run", "--against=chosen", "--judging.again=2")
    values, before, answers = read(home / "run", FILE), read(home / "run", BEFORE), lines(home / "run", ANSWERS)
    for found, key in ((values, None), (before, "before")):
        for i, line in enumerate(answers):
            length, name = len((line[key] if key else line)["answer"]), f"prompts.jsonl:{i + 1}"
            expected = 0.5 * ((length > len(f"answer {i}")) + (length >= len(f"answer {i}")))
            assert (name not in found["win_rate"]) if i == 3 else found["win_rate"][name] == expected
    report = read(home / "run", WIN_RATE)
    for name, found in (("model", values), ("before training", before)):
        rate = report[name]["rate"]
        assert rate["value"] == pytest.approx(sum(found["win_rate"].values()) / 4)
        assert (rate["n"], report[name]["left_out"], report[name]["abstentions"]) == (4, 1, 2)
        assert (report[name]["position_bias"]["value"], report[name]["consistency"]["value"]) == (0, 1)
    assert {"judge": "rubric", "by": "judge", "against": "chosen"}.items() <= report.items()
    verdicts, asked = lines(home / "run", VERDICTS), len(server.requests)
    assert {v["of"] for v in verdicts} == {"model", "before training"}
    assert {v["reply"] for v in verdicts if v["preference"] is None} == {"Who knows?"}
    measured = read(home / "run", MEASURED)["evaluate"]
    assert (measured["endpoint"]["model"], measured["against"]) == ("judge", "chosen")
    printed = capsys.readouterr().out
    assert "win rate" in printed
    assert "position bias" in printed
    # The same again, from the transcripts alone.
    evaluate(home, server, home / "run", "--against=chosen", "--judging.again=2")
    assert len(server.requests) == asked
    assert read(home / "run", WIN_RATE) == report
    # Without a judge, its files would pass for this evaluation's.
    main(["evaluate", str(home / "run"), f"--prompts={home}/prompts.jsonl", *SETTINGS])
    assert not (home / "run" / WIN_RATE).exists()
    assert "win_rate" not in read(home / "run", FILE)
    assert (home / "run" / TRANSCRIPTS).exists()


def test_answers_are_compared_with_a_model(home: Path, server: Server, tiny_folder: Path) -> None:
    """By default the one before training, which ties with itself."""
    evaluate(home, server, home / "run")
    assert {*read(home / "run", BEFORE)["win_rate"].values()} == {0.5}
    evaluate(home, server, home / "run", f"--against={tiny_folder}", f"--out={home}/named")
    assert read(home / "named", FILE)["win_rate"] == read(home / "run", FILE)["win_rate"]
    evaluate(home, server, tiny_folder, f"--reference={home}/run", f"--out={home}/turned")
    turned = read(home / "turned", FILE)["win_rate"]
    assert turned == {name: 1 - value for name, value in read(home / "run", FILE)["win_rate"].items()}


def test_a_run_that_was_stopped_goes_on_where_it_was(home: Path, server: Server) -> None:
    out = f"--out={home}/stopped"
    server.plan = ["good"] * 3 + [(401, {}, {"error": {"message": "no such key"}})] * 100
    with pytest.raises(SystemExit):
        evaluate(home, server, home / "run", "--against=chosen", out, "--endpoint.concurrency=1", "--judging.again=0")
    kept = len(lines(home / "stopped", TRANSCRIPTS))
    assert kept == 3
    assert not (home / "stopped" / FILE).exists()
    server.plan = []
    evaluate(home, server, home / "run", "--against=chosen", out, "--judging.again=0")
    keys = [line["key"] for line in lines(home / "stopped", TRANSCRIPTS)]
    assert len(keys) == len({*keys})
    assert read(home / "stopped", WIN_RATE)["model"]["rate"]["n"] == 4


def test_single_answers_are_graded(home: Path, server: Server, tiny_folder: Path) -> None:
    server.reply = lambda body: completion("[[7]]" if "question 2" in body["messages"][-1]["content"] else "[[4]]")
    evaluate(home, server, tiny_folder, "--win_rate=quality", f"--out={home}/graded")
    assert [*read(home / "graded", FILE)["grade"].values()] == [4, 4, 7, 4, 4]
    assert read(home / "graded", WIN_RATE)["model"]["grade"]["value"] == pytest.approx(4.6)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--win_rate=nope"], "nope"),
        (["--win_rate=quality", "--against=chosen"], "--against"),
        (["--win_rate=mt_bench_pair"], "--mt_bench"),
        (["--against=nothing"], "nothing"),
        (["--judging.again=-1"], "again"),
        (["--endpoint.url=localhost"], "endpoint.url"),
        (["--endpoint.model="], "endpoint.model"),
        (["--against=gold"], "gold"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sampled(
    words: list[str], named: str, home: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate(home, server, home / "run", *words, f"--out={home}/wrong")
    assert ended.value.code
    error = capsys.readouterr().err.strip().splitlines()
    assert named in error[-1]
    assert not server.requests
    assert not (home / "wrong" / ANSWERS).exists()


def test_what_a_judge_needs_is_named(home: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = f"--prompts={home}/prompts.jsonl"
    for words, named in (
        ([prompts, "--win_rate=kto"], "endpoint.url"),
        ([prompts, "--against=chosen"], "--win_rate"),
        (["--win_rate=kto", "--endpoint.url=http://localhost:1/v1", "--endpoint.model=x"], "--prompts"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(tiny_folder), *words])
        assert named in capsys.readouterr().err


def test_a_server_that_is_down_is_named_before_anything_is_sampled(
    home: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        url = server.url
    words = [f"--prompts={home}/prompts.jsonl", "--win_rate=kto", "--against=chosen", f"--out={home}/down"]
    with pytest.raises(SystemExit):
        main(["evaluate", str(tiny_folder), *words, f"--endpoint.url={url}", "--endpoint.model=x"])
    assert url in capsys.readouterr().err
    assert not (home / "down" / ANSWERS).exists()
