"""``halos evaluate --win_rate``: a run, a judge at an endpoint, and answers to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
    (home / "other.yaml").write_text(RUBRIC.replace("{gold}", "{silver}"))
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
    again = read(home / "run", WIN_RATE)
    assert (again.pop("usage")["replies"], report.pop("usage")["replies"]) == (0, asked)
    assert again == report
    # Without a judge, its files would pass for this evaluation's.
    main(["evaluate", str(home / "run"), f"--prompts={home}/prompts.jsonl", *SETTINGS])
    assert not (home / "run" / WIN_RATE).exists()
    assert "win_rate" not in read(home / "run", FILE)
    assert (home / "run" / TRANSCRIPTS).exists()


def test_answers_are_compared_with_a_model(home: Path, server: Server, tiny_folder: Path) -> None:
    """By default the one before training, which ties with itself."""
    evaluate(home, server, home / "run")
    assert {*read(home / "run", BEFORE)["win_rate"].values()} == {0.5}
    evaluate(home, server, tiny_folder, f"--against={home}/run", f"--out={home}/turned")
    turned = read(home / "turned", FILE)["win_rate"]
    assert turned == {name: 1 - value for name, value in read(home / "run", FILE)["win_rate"].items()}


def test_an_evaluation_that_was_stopped_resumes(home: Path, server: Server, tiny_folder: Path) -> None:
    words = ["--against=chosen", "--judging.again=0", f"--out={home}/stopped"]
    server.plan = ["good"] * 3 + [(401, {}, {"error": {"message": "no such key"}})] * 100
    with pytest.raises(SystemExit):
        evaluate(home, server, tiny_folder, *words, "--endpoint.concurrency=1")
    kept = len(lines(home / "stopped", TRANSCRIPTS))
    assert kept == 3
    assert not (home / "stopped" / FILE).exists()
    server.plan = []
    evaluate(home, server, tiny_folder, *words)
    keys = [line["key"] for line in lines(home / "stopped", TRANSCRIPTS)]
    assert len(keys) == len({*keys})
    assert read(home / "stopped", WIN_RATE)["model"]["rate"]["n"] == 4


def test_single_answers_are_graded(home: Path, server: Server, tiny_folder: Path) -> None:
    server.reply = lambda body: completion("[[7]]" if "question 2" in body["messages"][-1]["content"] else "[[4]]")
    evaluate(home, server, tiny_folder, "--win_rate=quality", f"--out={home}/graded")
    assert [*read(home / "graded", FILE)["grade"].values()] == [4, 4, 7, 4, 4]
    assert read(home / "graded", WIN_RATE)["model"]["grade"]["value"] == pytest.approx(4.6)


MT_PROMPTS = {
    "pair-v2": "{question} {answer_a} | {answer_b}",
    "pair-math-v1": "Gold {ref_answer_1}: {question} {answer_a} | {answer_b}",
    "pair-v2-multi-turn": "{question_1} {answer_a_1} {question_2} {answer_a_2} | {answer_b_1} {answer_b_2}",
    "pair-math-v1-multi-turn": "Gold {ref_answer_2}: {question_1} {question_2} {answer_a_2} | {answer_b_2}",
    "single-v1": "{question} | {answer}",
    "single-math-v1": "Gold {ref_answer_1}: {question} | {answer}",
    "single-v1-multi-turn": "{question_1} {answer_1} {question_2} | {answer_2}",
    "single-math-v1-multi-turn": "Gold {ref_answer_2}: {question_1} {answer_1} {question_2} | {answer_2}",
}


def test_a_benchmark_of_conversations_brings_its_questions(
    home: Path, server: Server, tiny_folder: Path, tiny_gpt2_folder: Path
) -> None:
    """The second question follows the model's own answer to the first; both turns are one example."""
    folder = home / "mt"
    folder.mkdir()
    prompts = [{"name": name, "system_prompt": "", "prompt_template": text} for name, text in MT_PROMPTS.items()]
    write_jsonl(folder / "mt_bench_judge_prompts.jsonl", prompts)
    questions = [
        {"question_id": i, "category": category, "turns": [f"first {i}?", f"second {i}?"]}
        for i, category in enumerate(("writing", "math"))
    ]
    write_jsonl(folder / "mt_bench_question.jsonl", questions)
    gold = [{"question_id": 1, "choices": [{"turns": ["one", "two"]}]}]
    write_jsonl(folder / "mt_bench_reference_gpt4.jsonl", gold)
    words = [f"--mt_bench={folder}", "--text_prompts=chat", "--chat_template=chatml", "--judging.again=0"]
    server.reply = lambda body: completion("[[8]]" if "second" in body["messages"][-1]["content"] else "[[4]]")
    graded = [*words, "--win_rate=mt_bench_single", f"--out={home}/mt single"]
    evaluate(home, server, tiny_folder, *graded, prompts=False)
    names = [f"mt_bench_question.jsonl:{i}" for i in range(2)]
    assert read(home / "mt single", FILE)["grade"] == dict.fromkeys(names, 6)
    answers = [line["answer"] for line in lines(home / "mt single", ANSWERS)]
    asked = [body["messages"][-1]["content"] for body in server.requests]
    assert sum("Gold one" in text for text in asked) == sum("Gold two" in text for text in asked) == 1
    for i, answer in enumerate(answers):
        assert sum(f"first {i}? {answer} second {i}? |" in text for text in asked) == 1
    server.reply = lambda body: completion("[[A]]")
    compared = [*words, "--win_rate=mt_bench_pair", f"--against={tiny_gpt2_folder}", f"--out={home}/mt pair"]
    evaluate(home, server, tiny_folder, *compared, prompts=False)
    assert read(home / "mt pair", FILE)["win_rate"] == dict.fromkeys(names, 0.5)
    assert read(home / "mt pair", WIN_RATE)["model"]["position_bias"]["value"] == 1
    with pytest.raises(SystemExit):
        evaluate(home, server, tiny_folder, *compared, "--text_prompts=plain", prompts=False)


def test_alpaca_eval_brings_its_questions_and_baseline(home: Path, server: Server, tiny_folder: Path) -> None:
    pytest.importorskip("alpaca_eval")
    pandas = pytest.importorskip("pandas")
    folder = home / "alpaca"
    folder.mkdir()
    questions = [{"instruction": f"Do {i}!", "output": "done " * (i + 1), "generator": "gpt"} for i in range(12)]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(questions))
    gamed = [
        {"index": i, "model": m, "preference": (i % 5) / 4, "std_delta_len": d, "instruction_difficulty": i - 6.0}
        for m, d in (("concise", -1.0), ("verbose", 1.0))
        for i in range(12)
    ]
    pandas.DataFrame(gamed).assign(not_gamed_baseline=False).to_csv(folder / "df_gamed.csv", index=False)

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        """The model's answer, whose place is that of the other's, is preferred on even questions."""
        text = body["messages"][-1]["content"]
        number = int(text.split("Do ")[1].split("!")[0])
        baseline_first = text.index("done ") < text.index('"M"')
        p = 0.9 if baseline_first == bool(number % 2) else 0.1
        top = [{"token": name, "logprob": float(np.log(each))} for name, each in (("m", p), ("M", 1 - p))]
        return completion("m", logprobs={"content": [{"token": "m", "logprob": 0.0, "top_logprobs": top}]})

    server.reply = reply
    words = ["--win_rate=alpaca_eval2", f"--alpaca_data={folder}", f"--out={home}/alpaca out"]
    evaluate(home, server, tiny_folder, *words, "--text_prompts=plain", prompts=False)
    values = read(home / "alpaca out", FILE)["win_rate"]
    assert [*values.values()] == pytest.approx([0.9, 0.1] * 6)
    report = read(home / "alpaca out", WIN_RATE)
    assert report["against"] == "output"
    assert report["model"]["position_bias"]["value"] == pytest.approx(0)
    assert 0 < report["model"]["length_controlled"]["value"] < 1


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
        (["--against=chosen", "--win_rate=HOME/other.yaml"], "other.yaml needs the column 'silver'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sampled(
    words: list[str], named: str, home: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate(home, server, home / "run", *(w.replace("HOME", str(home)) for w in words), f"--out={home}/wrong")
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
