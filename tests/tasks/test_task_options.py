"""Benchmarks without the harness: options, draws, published files, contamination, and comparisons of evaluations."""

from __future__ import annotations

import gzip
import json
import zipfile
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from run_halos import refused, write_jsonl

from halos_pl.data.example import DataError
from halos_pl.evaluation.arguments import USERS, check_arguments
from halos_pl.evaluation.evaluate import ARGUMENTS, evaluate
from halos_pl.evaluation.metrics import is_share, metric_of
from halos_pl.judge.settings import JudgeSettings
from halos_pl.study.finished import finished
from halos_pl.study.read import load_study
from halos_pl.study.spec import StudyError
from halos_pl.tasks import raw
from halos_pl.tasks.contamination import overlaps
from halos_pl.tasks.humaneval import pass_at_1
from halos_pl.tasks.load import Benchmark, draw
from halos_pl.tasks.options import SUITES, Benchmarks, benchmarks_of
from halos_pl.tasks.unused import without_effect


@pytest.fixture(autouse=True)
def _harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos_pl.tasks.options.find_spec", lambda name: object())
    monkeypatch.delenv(raw.VARIABLE, raising=False)


def test_tasks_and_suite_are_joined() -> None:
    assert benchmarks_of({"tasks": None}) is None
    benchmarks = benchmarks_of({"tasks": "ifeval", "suite": "paper", "limit": 3})
    assert benchmarks == Benchmarks((*SUITES["paper"], "ifeval"), limit=3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"limit": 5}, "limit"),
        ({"suite": "papers"}, "papers"),
        ({"tasks": "mmlu", "limit": 0}, "limit is 0"),
        ({"tasks": "mmlu", "limit": {"mmlu": -1}}, "mmlu is -1"),
        ({"tasks": "mmlu", "num_fewshot": -1}, "num_fewshot"),
        ({"tasks": "mmlu", "max_gen_toks": 0}, "max_gen_toks"),
        ({"tasks": "mmlu", "apply_chat_template": True, "text_prompts": "plain"}, "text_prompts"),
        ({"tasks": "mmlu", "fewshot_as_multiturn": True, "apply_chat_template": False}, "fewshot_as_multiturn"),
        ({"tasks": "mmlu", "system": "Be brief.", "apply_chat_template": False}, "system"),
        ({"tasks": "mmlu", "system": "Be brief.", "text_prompts": "plain"}, "system"),
        ({"tasks": "mmlu,ifeval, mmlu"}, "mmlu twice"),
        ({"tasks": "ifeval,mmlu", "suite": "paper"}, "mmlu.* suite paper"),
        ({"tasks": "mmlu", "eval_data": "no/such"}, "no/such"),
        ({"tasks": "mmlu,ifeval", "limit": "paper"}, "limit paper has no effect on mmlu, ifeval"),
    ],
)
def test_useless_and_invalid_options_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        benchmarks_of(arguments)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"reference": "m"}, "reference .*held_out"),
        ({"max_new_tokens": 9}, "max_new_tokens .*prompts.*max_gen_toks"),
        ({"temperature": 0.1}, "temperature .*prompts"),
        ({"judging": JudgeSettings(max_tokens=5)}, r"judging\.max_tokens .*win_rate"),
        ({"beta": 0.2}, "beta .*held_out"),
        ({"max_length": 9}, "max_length .*held_out"),
        ({"seed": 1}, "seed .*limit"),
        ({"rule": "f.py:f"}, "rule .*prompts"),
    ],
)
def test_arguments_that_benchmarks_do_not_use_are_refused(given: dict[str, Any], named: str) -> None:
    defaults = {name: each.default for name, each in signature(evaluate).parameters.items() if name in ARGUMENTS}
    assert {name: default for name, (default, _) in USERS.items()}.items() <= defaults.items()
    arguments = {**defaults, "tasks": "mmlu"}
    check_arguments(**arguments)
    with pytest.raises(DataError, match=named):
        check_arguments(**arguments | given)


def loaded(**configs: dict[str, Any]) -> list[Benchmark]:
    """Benchmarks of one task each."""
    tasks = {name: SimpleNamespace(get_config=config.get) for name, config in configs.items()}
    return [Benchmark(name, task, {name: task}, {name: None}) for name, task in tasks.items()]


@pytest.mark.parametrize("option", ["num_fewshot", "max_gen_toks"])
def test_an_option_is_refused_if_no_task_uses_it_and_else_those_that_do_not_are_named(option: str) -> None:
    one = {"num_fewshot": 3, "output_type": "generate_until"}
    other = {"num_fewshot": 0, "output_type": "multiple_choice"}
    for tasks, idle in (({"a": one}, ""), ({"a": one, "b": other}, "b"), ({"b": other, "a": one, "c": other}, "b, c")):
        lines = without_effect(Benchmarks(tuple(tasks), **{option: 3}), loaded(**tasks))
        assert [line.partition(" on ")[2] for line in lines] == [idle] * bool(idle)
    with pytest.raises(DataError, match=f"{option} .* b, c"):
        without_effect(Benchmarks(("b", "c"), **{option: 3}), loaded(b=other, c=other))
    assert without_effect(Benchmarks(("b",), num_fewshot=0), loaded(b=other)) == []


@pytest.mark.parametrize("option", ["allow_code_execution", "fewshot_as_multiturn", "eval_data"])
def test_an_option_that_no_task_uses_is_refused(option: str) -> None:
    one = {"num_fewshot": 3, "custom_dataset": raw.humaneval, "metric_list": [{"metric": pass_at_1}]}
    options: dict[str, Any] = {option: "folder" if option == "eval_data" else True}
    with pytest.raises(DataError, match=option):
        without_effect(Benchmarks(("b",), **options), loaded(b={"num_fewshot": 0}))
    assert without_effect(Benchmarks(("a", "b"), **options), loaded(a=one, b={"num_fewshot": 0})) == []


def test_without_the_extra_the_command_names_it(
    capfd: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, no_model: None
) -> None:
    monkeypatch.setattr("halos_pl.tasks.options.find_spec", lambda name: None)
    assert "halos_pl[eval]" in refused(capfd, ["evaluate", str(tiny_folder), "--tasks=gsm8k"])


def test_the_chat_template_follows_the_text_prompts_unless_set() -> None:
    benchmarks = Benchmarks(("mmlu",))
    assert (benchmarks.chat("chat"), benchmarks.chat("plain")) == (True, False)
    assert Benchmarks(("mmlu",), apply_chat_template=True).chat("plain")
    assert (benchmarks.multiturn(True), benchmarks.multiturn(False)) == (True, False)


def test_a_larger_limit_draws_the_questions_of_a_smaller_one_and_more() -> None:
    sizes = {"a": 30, "b": 50, "c": 2}
    few, many = draw("group", sizes, 20, 0), draw("group", sizes, 40, 0)
    for drawn, number in ((few, 20), (many, 40)):
        assert sum(len(each or ()) for each in drawn.values()) == number
        assert all(each == sorted(set(each)) and each[-1] < sizes[leaf] for leaf, each in drawn.items() if each)
    assert all(set(each or ()) <= set(many[leaf] or ()) for leaf, each in few.items())
    assert few != draw("group", sizes, 20, 1)
    assert draw("group", sizes, 82, 0) == dict.fromkeys(sizes), "all questions are not a draw"


def test_every_question_is_drawn_equally_often() -> None:
    counts = dict.fromkeys("ab", 0)
    for seed in range(300):
        for leaf, each in draw("group", {"a": 10, "b": 30}, 8, seed).items():
            counts[leaf] += len(each or ())
    assert counts["a"] / (300 * 8) == pytest.approx(0.25, abs=0.03)


def test_the_limit_of_the_paper() -> None:
    tasks = {f"bbh_{i}": 250 for i in range(27)}
    assert sum(len(each or ()) for each in draw("bbh_cot_fewshot", tasks, "paper", 0).values()) == 40 * 27
    assert len(draw("gsm8k_cot", {"gsm8k_cot": 1319}, "paper", 0)["gsm8k_cot"] or ()) == 200
    assert draw("mmlu", {"mmlu_anatomy": 135}, "paper", 0) == {"mmlu_anatomy": None}


# -- published files --------------------------------------------------------------------------------------------------


def subset(folder: Path, name: str) -> str:
    """A task file that names a subset, and a function as lm-eval's do."""
    path = folder / "task.yaml"
    path.write_text(f"dataset_name: {name}\nprocess_docs: !function utils.x\n")
    return str(path)


def test_headerless_csv_of_mmlu(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        for split in ("dev", "val", "test"):
            archive.writestr(f"data/{split}/anatomy_{split}.csv", f'"Which, {split}?\nReally?",1,two,"3,0",D4,C\n')
    splits = raw.mmlu(subset(tmp_path, "anatomy"), str(tmp_path), version=1)
    assert set(splits) == {"dev", "validation", "test"}
    assert splits["test"][0] == {
        "question": "Which, test?\nReally?",
        "subject": "anatomy",
        "choices": ["1", "two", "3,0", "D4"],
        "answer": 2,
    }
    with pytest.raises(DataError, match=r"mmlu\.zip"):
        raw.mmlu(subset(tmp_path, "astronomy"), str(tmp_path))


def test_other_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "navigate.json").write_text(
        json.dumps({"canary": "x", "examples": [{"input": "a", "target": "b"}]})
    )
    write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "q", "answer": "#### 1"}])
    write_jsonl(tmp_path / "gsm8k_train500.jsonl", [{"question": "t", "answer": "#### 2"}])
    monkeypatch.setenv(raw.VARIABLE, str(tmp_path))
    assert raw.bbh(subset(tmp_path, "navigate"))["test"][0] == {"input": "a", "target": "b"}
    assert [raw.gsm8k()[split][0]["question"] for split in ("test", "train")] == ["q", "t"]
    with pytest.raises(DataError, match=r"ifeval_input_data\.jsonl.*no such file"):
        raw.ifeval()
    (tmp_path / "gsm8k_test.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"gsm8k_test\.jsonl"):
        raw.gsm8k()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("gsm8k_test.jsonl", "", r"gsm8k_test\.jsonl has no questions"),
        ("gsm8k_test.jsonl", '{"question": "q", "answer": "#### 1"}\n\n7\n', r"gsm8k_test\.jsonl:3: 7"),
        ("gsm8k_test.jsonl", '{"question": "q", "answer": "#### 1"}\n{\n', r"gsm8k_test\.jsonl:2 .*JSON"),
        ("gsm8k_test.jsonl", '{"question": "q", "answr": "#### 1"}', r"gsm8k_test\.jsonl:1: 'answer' is missing"),
        ("gsm8k_test.jsonl", '{"question": " ", "answer": "#### 1"}', r"gsm8k_test\.jsonl:1: 'question' is ' '"),
        ("gsm8k_test.jsonl", '{"question": "q", "answer": "1"}', r"gsm8k_test\.jsonl:1: 'answer' .*####"),
        ("gsm8k_train.jsonl", '{"question": "q", "answer": 1}', r"gsm8k_train\.jsonl:1: 'answer' is 1"),
        ("HumanEval.jsonl.gz", '{"prompt": "p", "test": "t"}', r"HumanEval\.jsonl\.gz:1: 'entry_point' is missing"),
        (
            "bbh/task.json",
            json.dumps({"examples": [{"input": "a", "target": "b", "x": x} for x in (1, "y")]}),
            r"task\.json",
        ),
        ("bbh/task.json", "[]", r"task\.json: .*'examples'"),
        ("bbh/task.json", '{"examples": []}', r"task\.json has no questions"),
        ("bbh/task.json", '{"examples": ["a"]}', r"task\.json: example 1: 'a'"),
        ("bbh/task.json", '{"examples": [{"input": "a"}]}', r"task\.json: example 1: 'target' is missing"),
        ("mmlu.zip", "Q,1,2,3,4,A\nQ,1,2,3,4,\n", r"mmlu\.zip: data/test/task_test\.csv:2: .*''"),
        ("mmlu.zip", "Q,1,2,3,4,BC", r"task_test\.csv:1: .*'BC'"),
        ("mmlu.zip", "Q,1,2,,4,A", r"task_test\.csv:1: .*empty"),
        ("mmlu.zip", "Q,1,2,3,A", r"task_test\.csv:1: 5 columns"),
        ("mmlu.zip", "\n", r"task_test\.csv has no questions"),
    ],
)
def test_a_fault_in_a_published_file_is_named_with_its_place(
    tmp_path: Path, name: str, content: str, named: str
) -> None:
    (tmp_path / "bbh").mkdir()
    write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "q", "answer": "#### 1"}])
    write_jsonl(tmp_path / "gsm8k_train.jsonl", [{"question": "q", "answer": "#### 1"}])
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/test/task_test.csv", content)
    else:
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    reader = getattr(raw, Path(name).parts[0].partition(".")[0].partition("_")[0].lower())
    with pytest.raises(DataError, match=named):
        reader(config_source=subset(tmp_path, "task"), eval_data=str(tmp_path))


# -- contamination ----------------------------------------------------------------------------------------------------


def benchmark(*questions: str, drawn: list[int] | None = None) -> Benchmark:
    rows = [{"question": question, "choices": ["yes", "no"]} for question in questions]
    task = SimpleNamespace(eval_docs=rows)
    return Benchmark("task", task, {"task": task}, {"task": drawn})


def run_on(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = write_jsonl(folder / "train.jsonl", rows)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"train": [{"path": path}]}}))
    return folder


def test_thirteen_words_of_a_question_in_the_training_data_are_found(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(20)]
    seen, unseen, short = " ".join(words), " ".join(f"other{i}" for i in range(20)), " ".join(words[:12])
    spelled = "He said: " + ", ".join(words[3:16]).upper() + "!"
    rows = [{"prompt": [{"role": "user", "content": short}], "completion": "no", "label": True}]
    rows += [{"prompt": "so", "completion": spelled, "label": False}]
    (overlap,) = overlaps(run_on(tmp_path, rows), [benchmark(unseen, seen, short)])
    assert (overlap.name, overlap.seen, overlap.questions, overlap.example) == ("task", 1, 3, "task/1")
    assert overlap.place.endswith("train.jsonl:2")
    assert overlaps(run_on(tmp_path, rows[:1]), [benchmark(unseen, seen, short)]) == []


@pytest.mark.parametrize(("drawn", "among"), [(None, 2), ([0], 0), ([1, 2], 1), ([1, 3], 2)])
def test_whether_a_benchmark_was_trained_on_does_not_depend_on_the_draw(
    tmp_path: Path, drawn: list[int] | None, among: int
) -> None:
    questions = [" ".join(f"word{k}of{i}" for k in range(15)) for i in range(4)]
    rows = [{"prompt": questions[i], "completion": "a", "label": True} for i in (1, 3)]
    run = run_on(tmp_path, rows)
    (overlap,) = overlaps(run, [benchmark(*questions, drawn=drawn)])
    assert (overlap.seen, overlap.questions) == (2, 4)
    assert (overlap.drawn_seen, overlap.drawn) == (among, len(drawn or questions))
    assert ("drawn" in overlap.line(run)) is (drawn is not None)


def test_what_many_questions_share_does_not_count(tmp_path: Path) -> None:
    shared = " ".join(f"instruction{i}" for i in range(15))
    run = run_on(tmp_path, [{"prompt": shared, "completion": "a", "label": True}])
    assert overlaps(run, [benchmark(*(f"{shared} {i}" for i in range(30)))]) == []
    assert overlaps(run, [benchmark(*(f"{shared} {i}" for i in range(3)))])[0].seen == 3


def test_training_data_that_are_gone_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_on(tmp_path, [{"prompt": "a", "completion": "b", "label": True}])
    (tmp_path / "train.jsonl").unlink()
    assert overlaps(run, [benchmark("a")]) == []
    assert "train.jsonl" in capsys.readouterr().out


# -- comparisons ------------------------------------------------------------------------------------------------------


def evaluation(folder: Path, values: dict[str, dict[str, float]], **about: Any) -> Path:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(values))
    (folder / "measured.json").write_text(json.dumps({"evaluate": {"temperature": 0.7}, "tasks": about}))
    return folder


def test_comparisons_name_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from halos_pl.evaluation.compare import compare

    keys = [f"gsm8k/{i}" for i in range(40)]
    one = evaluation(
        tmp_path / "one",
        {"gsm8k": dict.fromkeys(keys, 1.0), "kl": {"a": 1.0}, "gsm8k/other": {"a": 1.0}},
        gsm8k={"num_fewshot": 8},
        mmlu={"trained_on": "12 questions"},
    )
    two = evaluation(
        tmp_path / "two", {"gsm8k": dict.fromkeys(keys[5:], 0.0), "kl": {"a": 2.0}}, gsm8k={"num_fewshot": 5}
    )
    compare(str(one), str(two))
    trained, fewshot, gsm8k = capsys.readouterr().out.splitlines()
    assert "mmlu" in trained
    assert "12 questions" in trained
    assert all(word in fewshot for word in ("gsm8k.num_fewshot", "8", "5"))
    assert all(word in gsm8k for word in ("gsm8k", "n = 35", "significant", "5 examples"))


def test_evaluations_without_a_common_question_are_refused(tmp_path: Path, capfd: Any) -> None:
    one = evaluation(tmp_path / "one", {"gsm8k": {"a": 1.0}})
    two = evaluation(tmp_path / "two", {"gsm8k": {"b": 1.0}})
    assert "in common" in refused(capfd, ["compare", str(one), str(two)])
    (two / "evaluation.json").unlink()
    assert "evaluation.json" in refused(capfd, ["compare", str(one), str(two)])


# -- studies ----------------------------------------------------------------------------------------------------------


def study(folder: Path, **content: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"arms": {"a": {}, "b": {"options": {"data.batch_size": 2}}}, **content}))
    return path


def test_benchmarks_are_metrics_of_a_study(tmp_path: Path) -> None:
    evaluate = {"tasks": ["gsm8k", "ifeval"], "limit": 50, "prompts": "p.txt", "rule": "rule.py:f"}
    metrics = ["rule", "gsm8k", "ifeval/prompt_level_loose_acc,none"]
    loaded = load_study(study(tmp_path, evaluate=evaluate, metrics=metrics, primary="gsm8k", equivalence=0.02))
    assert loaded.metrics == tuple(metrics)
    assert metric_of("gsm8k").higher_is_better
    assert is_share("gsm8k")
    assert not is_share("kl")


def test_a_benchmark_that_is_not_evaluated_is_no_metric(tmp_path: Path) -> None:
    for measured in ({"tasks": "gsm8k"}, {"suite": "paper"}):
        with pytest.raises(StudyError, match=r"study\.yaml:\d+.*'ifeval'.*gsm8k"):
            load_study(study(tmp_path, evaluate=measured, metrics=["ifeval"]))


def test_a_run_that_was_trained_on_the_questions_is_skipped_with_that_reason(tmp_path: Path) -> None:
    loaded = load_study(study(tmp_path, evaluate={"tasks": "gsm8k"}, metrics=["gsm8k"], seeds=[0]))
    for run, values in zip(loaded.runs(tmp_path), ({"gsm8k": {"gsm8k/1": 1.0}}, {}), strict=True):
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text("{}")
        (run.folder / "evaluation.json").write_text(json.dumps(values))
        about = {} if values else {"trained_on": "7 questions"}
        (run.folder / "measured.json").write_text(json.dumps({"tasks": {"gsm8k": about}}))
    kept, faults = finished(loaded, tmp_path)
    assert [run.arm.name for run in kept] == ["a"]
    assert [(run.arm.name, "7 questions of gsm8k" in why) for run, why in faults.items()] == [("b", True)]


def test_a_flag_needs_no_value(capfd: Any, tiny_folder: Path, no_model: None) -> None:
    words = ["evaluate", str(tiny_folder), "--apply_chat_template", "--tasks=mmlu", "--text_prompts=plain"]
    assert "text_prompts plain" in refused(capfd, words)
