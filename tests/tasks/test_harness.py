"""Benchmarks through lm-eval, on tiny models: equal to lm-eval's own command line, and kept question by question."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from run_halos import fit, refused, run_here, write_jsonl

pytest.importorskip("lm_eval")

from halos_pl.data.example import DataError
from halos_pl.evaluation.compare import compare
from halos_pl.tasks import ifeval
from halos_pl.tasks.load import load, unscored
from halos_pl.tasks.names import YAMLS, check_names
from halos_pl.tasks.options import benchmarks_of
from halos_pl.tasks.raw import ifeval as ifeval_rows

DATA = Path(os.environ.get("HALOS_TEST_DATA", "no")) / "eval"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="HALOS_TEST_DATA names no data")]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def roomy(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for eight examples, and a chat template."""
    folder = tmp_path_factory.mktemp("roomy") / "model"
    shutil.copytree(tiny_folder, folder)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {key: 6144}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def options(**more: Any) -> list[str]:
    settings = {"eval_data": str(DATA), "max_gen_toks": 8, "batch_size": 2} | more
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]


def samples(folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The prompts, answers and scores in lm-eval's files, by task, question and filter."""
    kept_rows = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = path.stem.removeprefix("samples_").partition("_2")[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kept = ("arguments", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target", *row["metrics"])
            kept_rows[task, row["doc_id"], row["filter"]] = {name: row[name] for name in kept}
    return kept_rows


@pytest.mark.parametrize("chat", [False, True])
def test_every_answer_and_score_is_that_of_lm_evals_own_command(
    capfd: Any, roomy: Path, tmp_path: Path, chat: bool
) -> None:
    tasks = "gsm8k_cot,mmlu_anatomy,ifeval,humaneval"
    settings = {"tasks": tasks, "limit": 3, "allow_code_execution": True}
    settings |= {"apply_chat_template": True, "system": "Be brief."} if chat else {}
    ended = run_here(capfd, ["evaluate", str(roomy), f"--out={tmp_path / 'ours'}", *options(**settings)])
    assert ended.status == 0, ended
    ours = samples(tmp_path / "ours" / "benchmarks")
    assert len(ours) == 3 * 5, "gsm8k_cot has two filters"
    drawn: dict[str, list[int]] = {}
    for task, question, _ in sorted(ours):
        drawn.setdefault(task, []).append(question)
    files = shutil.copytree(YAMLS, tmp_path / "tasks")
    (files / "part.yaml").write_text(
        "group: part_of_mmlu\ntask: [mmlu_anatomy]\ncustom_dataset: !function halos_pl.tasks.raw.mmlu\n"
    )
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "2"),
        *("--model_args", f"pretrained={roomy},dtype=float32", "--include_path", str(files), "--log_samples"),
        *("--tasks", "gsm8k_cot_local,part_of_mmlu,ifeval,humaneval", "--output_path", str(tmp_path / "theirs")),
        *("--samples", json.dumps({task: sorted(set(each)) for task, each in drawn.items()})),
        *("--gen_kwargs", "max_gen_toks=8", "--confirm_run_unsafe_code"),
        *(["--apply_chat_template", "--system_instruction", "Be brief."] if chat else []),
    ]
    env = os.environ | {"HALOS_EVAL_DATA": str(DATA), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, cwd=tmp_path, capture_output=True)
    assert samples(tmp_path / "theirs") == ours
    scores = [
        json.loads(path.read_text())["results"]
        for path in (tmp_path / "ours/benchmarks/results.json", *(tmp_path / "theirs").rglob("results_*.json"))
    ]
    assert scores[0].keys() <= scores[1].keys()
    for task in scores[0]:
        assert scores[0][task] == scores[1][task]


def test_a_run_is_compared_with_its_start_but_not_on_what_it_was_trained_on(
    capfd: Any, roomy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [json.loads(line)["question"] for line in (DATA / "gsm8k_test.jsonl").open(encoding="utf-8")]
    rows = [{"prompt": questions[i], "completion": f"It is {i}.", "label": i % 2 == 0} for i in range(len(questions))]
    run = tmp_path / "run"
    steps = ["--trainer.max_steps=2", "--data.max_length=512"]
    ended = run_here(capfd, fit(roomy, "kto", write_jsonl(tmp_path / "train.jsonl", rows), run, *steps))
    assert ended.status == 0, ended
    limit = {"gsm8k_cot_zeroshot": 2, "mmlu": 6}
    words = ["evaluate", str(run), *options(tasks="gsm8k_cot_zeroshot,mmlu", limit=limit)]
    assert run_here(capfd, words).status == 0
    after, before, how = (
        json.loads((run / name).read_text()) for name in ("evaluation.json", "before.json", "measured.json")
    )
    assert set(after) == set(before) == {"mmlu"}
    assert len(after["mmlu"]) == 6
    assert after["mmlu"].keys() == before["mmlu"].keys()
    assert 1000 < int(how["tasks"]["gsm8k_cot_zeroshot"]["trained_on"].removesuffix(" questions")) <= 1319
    assert how["by"]["versions"]["lm_eval"] == version("lm_eval")
    assert "trained_on" not in how["tasks"]["mmlu"]
    assert how["tasks"]["mmlu"]["questions"] == 6
    assert {path.name for path in run.glob("benchmarks*/results.json")} == {"results.json"}
    assert len(list(run.glob("benchmarks*"))) == 2
    wider = {"gsm8k_cot_zeroshot": 2, "mmlu": 9}
    out = tmp_path / "other"
    words = ["evaluate", str(roomy), f"--out={out}", *options(tasks="gsm8k_cot_zeroshot,mmlu", limit=wider)]
    assert run_here(capfd, words).status == 0
    other = json.loads((out / "evaluation.json").read_text())
    assert after["mmlu"].keys() < other["mmlu"].keys(), "the same questions have the same names"
    assert {name: other["mmlu"][name] for name in before["mmlu"]} == before["mmlu"]
    compare(str(run), str(out))
    assert "n = 6" in capfd.readouterr().out
    files = {path: path.read_bytes() for path in run.glob("benchmarks*/*")}
    for path in files:
        path.unlink()
    with monkeypatch.context() as patched:  # both models' answers are in the cache
        patched.setattr("halos_pl.tasks.kept.run", lambda *_: pytest.fail("questions were answered again"))
        words = ["evaluate", str(run), *options(tasks="gsm8k_cot_zeroshot,mmlu", limit=limit)]
        assert run_here(capfd, words).status == 0
        assert json.loads((run / "evaluation.json").read_text()) == after
        assert {path: path.read_bytes() for path in files} == files
        with pytest.raises(pytest.fail.Exception):
            run_here(capfd, [*words, "--num_fewshot=1"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tasks": "gsm8kk"}, ["gsm8kk", "gsm8k"]),
        ({"tasks": "humaneval"}, ["humaneval", "allow_code_execution"]),
        ({"tasks": "mbpp"}, ["mbpp", "sandbox"]),
        ({"tasks": "hellaswag"}, ["hellaswag", "eval_data"]),
        ({"tasks": "mmlu,mmlu_anatomy"}, ["mmlu_anatomy", "twice"]),
        ({"tasks": "gsm8k_cot", "limit": {"gsm8k": 3}}, ["limit", "gsm8k_cot"]),
        ({"tasks": "ifeval", "num_fewshot": 2}, ["ifeval", "num_fewshot"]),
        ({"tasks": "mmlu_anatomy", "limit": 2}, ["mmlu_anatomy", "max_gen_toks"]),
        ({"tasks": "ifeval", "include_path": str(DATA)}, ["ifeval", "include_path"]),
        ({"tasks": "gsm8k_cot", "num_fewshot": 9}, ["gsm8k_cot", "num_fewshot"]),
        ({"tasks": "gsm8k_cot", "limit": 2, "max_gen_toks": 6000}, ["gsm8k_cot", "2 of 2", "6144", "6000"]),
        ({"tasks": "gsm8k_cot", "limit": 2, "eval_data": str(YAMLS)}, ["gsm8k"]),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    capfd: Any, roomy: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], named: list[str]
) -> None:
    monkeypatch.setattr("halos_pl.training.named_model.load_model", lambda spec: pytest.fail("a model was loaded"))
    message = refused(capfd, ["evaluate", str(roomy), *options(**settings)])
    assert all(word in message for word in named), message


def test_every_name_that_lm_eval_indexes_is_in_a_file_that_the_search_reads() -> None:
    from lm_eval.tasks import TaskManager

    check_names(TaskManager().all_tasks)
    with pytest.raises(DataError, match=r"gsm8kk.*gsm8k"):
        check_names(["gsm8k", "gsm8kk"])


OWN = """
from datasets import Dataset

def rows(**_): return {"test": Dataset.from_list([{"prompt": "def f():", "answer": "x"}] * 2)}
def score(references, predictions): return 0.0
"""
OWN_TASK = """
custom_dataset: !function own.rows
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
unsafe_code: true
metric_list:
  - {metric: !function own.score, aggregation: mean, higher_is_better: true}
"""


def indented(text: str, columns: int) -> str:
    return text.strip().replace("\n", "\n" + " " * columns)


@pytest.mark.parametrize(
    ("content", "permitted"),
    [
        (f"task: own\n{OWN_TASK}", None),
        (f"group: own\ntask:\n  - task: inside\n    {indented(OWN_TASK, 4)}", None),
        (f"group: own\ntask:\n  - group: inner\n    task:\n      - task: x\n        {indented(OWN_TASK, 8)}", None),
        (f"group: own\ntask:\n  - task: humaneval\n    {indented(OWN_TASK, 4)}", None),
        (f"include: {YAMLS / 'humaneval.yaml'}\ntask: own\nunsafe_code: false", 164),
        ("group: own\ntask: [humaneval_instruct]", 164),
    ],
)
def test_code_of_the_model_runs_only_in_the_sandbox_and_with_permission(
    tmp_path: Path, content: str, permitted: int | None
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(content)
    options = {"tasks": "own", "include_path": str(tmp_path), "eval_data": str(DATA)}
    for allow in (False, True):
        benchmarks = benchmarks_of(options | {"allow_code_execution": allow})
        assert benchmarks is not None
        if allow and permitted:
            assert load(benchmarks, 0)[0].count == permitted
        else:
            with pytest.raises(DataError, match=r"task own executes .*sandbox"):
                load(benchmarks, 0)


def test_only_the_named_subjects_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mmlu.zip", "w") as archive:
        for split in ("dev", "val", "test"):
            for subject in ("anatomy", "virology"):
                archive.writestr(f"data/{split}/{subject}_{split}.csv", "Which?,1,2,3,4,C\n" * 5)
    (tmp_path / "own.yaml").write_text("group: own\ntask: [mmlu_anatomy, mmlu_virology]\n")
    for name, subjects in (("mmlu_virology", ["mmlu_virology"]), ("own", ["mmlu_anatomy", "mmlu_virology"])):
        own = {"include_path": str(tmp_path)} if name == "own" else {}
        benchmarks = benchmarks_of({"tasks": name, "eval_data": str(tmp_path), **own})
        assert benchmarks is not None
        (benchmark,) = load(benchmarks, 0)
        assert list(benchmark.leaves) == subjects


def test_instructions_that_need_missing_data_of_nltk_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = benchmarks_of({"tasks": "ifeval", "eval_data": str(DATA)})
    assert benchmarks is not None
    (benchmark,) = load(benchmarks, 0)
    monkeypatch.setattr(ifeval, "has_punkt", lambda: False)
    counts = unscored(benchmark)
    assert set(counts) == set(ifeval.NEEDS_PUNKT)
    rows = [doc for _, _, doc in benchmark.docs()]
    answer = "First, I agree.\n\nP.S. *Well*, that is all."
    for doc in rows:
        names = doc["instruction_id_list"]
        missing = [name for name in names if name in ifeval.NEEDS_PUNKT]
        metrics = ifeval.process_results(doc, [answer])
        assert ("prompt_level_strict_acc" in metrics) == (not missing)
        assert len(metrics.get("inst_level_strict_acc", [])) == len(names) - len(missing)
    assert sum(len(doc["instruction_id_list"]) for doc in rows) == 834
    assert counts == {kind: sum(doc["instruction_id_list"].count(kind) for doc in rows) for kind in ifeval.NEEDS_PUNKT}


@pytest.mark.parametrize(
    ("names", "arguments", "named"),
    [
        (["no:such"], [{}], "no:such"),
        (["punctuation:no_comma"], [], "same length"),
        (["length_constraints:number_words"], [{"num_words": 3}], "relation"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], "about"),
        (["punctuation:no_comma"], [{"num_words": 3}], "num_words"),
    ],
)
def test_an_instruction_that_cannot_be_scored_is_refused(
    tmp_path: Path, names: list[str], arguments: list[dict[str, Any]], named: str
) -> None:
    good = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rows = [good, good | {"instruction_id_list": names, "kwargs": arguments}]
    write_jsonl(tmp_path / "ifeval_input_data.jsonl", rows)
    with pytest.raises(DataError, match=rf"ifeval_input_data\.jsonl:2: .*{named}"):
        ifeval_rows(str(tmp_path))


def test_every_task_file_loads_all_questions() -> None:
    benchmarks = benchmarks_of(
        {
            "tasks": "gsm8k,gsm8k_cot_zeroshot,gsm8k_cot_llama,mmlu,bbh_fewshot,bbh_zeroshot,bbh_cot_zeroshot,"
            "bbh_cot_fewshot,humaneval,humaneval_instruct,ifeval",
            "eval_data": str(DATA),
            "allow_code_execution": True,
        }
    )
    assert benchmarks is not None
    sizes = {"gsm8k": 1319, "mmlu": 14042, "bbh": 6511, "humaneval": 164, "ifeval": 541}
    for benchmark in load(benchmarks, 0):
        assert benchmark.count == benchmark.total == sizes[benchmark.name.partition("_")[0]], benchmark.name
