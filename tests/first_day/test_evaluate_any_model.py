"""``halos evaluate`` of runs, folders, adapters and base models: the same figures, and those before training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_halos import binary_data, fit, one_in, pair_data, write_jsonl

from halos_pl.cli.main import main
from halos_pl.data.tokenize import encode_prompt
from halos_pl.evaluation import answers as kept
from halos_pl.evaluation.files import ANSWERS, BEFORE, FILE, MEASURED, ROWS
from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.policy.reference import FixedModel
from halos_pl.policy.sampling import generate, kl_of_samples
from halos_pl.policy.scorer import Scorer
from halos_pl.testing import tiny_tokenizer
from halos_pl.training.trained import load_run

CODE = """
def has_gold(answer, row):
    assert row.text == row["prompt"]
    return row["gold"] in answer

def longer(answer, other, row):
    assert row["gold"]
    return 0.5 if len(answer) == len(other) else len(answer) > len(other)

def fails(answer, row):
    raise KeyError("nope")
"""
SETTINGS = ["--max_new_tokens=6", "--temperature=1", "--seed=3", "--batch_size=4"]
ALONE = {"policy_accuracy", "nll_desirable", "nll_undesirable"}
REWARDS = {"reward_accuracy", "reward_margin", "brier", "reward_auroc", "displacement", "kl_held_out"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run of a LoRA adapter, its two exports, held-out pairs, prompts with a gold answer, rules."""
    home = tmp_path_factory.mktemp("evaluate")
    options = ["--trainer.max_steps=2", "--model.optimizer.init_args.lr=0.05", '--model.policy.lora={"r": 2}']
    main(fit(tiny_folder, "kto", binary_data(home / "train.jsonl"), home / "run", *options))
    main(["export", str(home / "run"), str(home / "merged")])
    main(["export", str(home / "run"), str(home / "adapter"), "--adapter=true"])
    pair_data(home / "pairs.jsonl", 4, seed=1)
    write_jsonl(home / "prompts.jsonl", [{"prompt": f"question {i}", "gold": "e", "id": i} for i in range(5)])
    (home / "mine.py").write_text(CODE, encoding="utf-8")
    return home


def evaluate(home: Path, model: str | Path, *words: str) -> None:
    main(["evaluate", str(model), f"--prompts={home}/prompts.jsonl", *SETTINGS, *words])


def read(folder: Path, name: str = FILE) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((folder / name).read_text())
    return found


def lines(folder: Path, name: str = ANSWERS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def means(values: dict[str, dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean(list(found.values()))) for name, found in values.items()}


def words_of(home: Path) -> list[str]:
    return [f'--held_out=["{home}/pairs.jsonl"]', f"--rule={home}/mine.py:has_gold", f"--judge={home}/mine.py:longer"]


def test_every_kind_of_model_gives_the_figures_of_the_run(home: Path, tiny_folder: Path) -> None:
    evaluate(home, home / "run", *words_of(home))
    run = read(home / "run")
    assert set(run) == ALONE | REWARDS | {"kl", "length", "finished", "rule", "judge"}
    for name in ("merged", "adapter"):
        out = home / f"of {name}"
        evaluate(home, home / name, *words_of(home), f"--reference={tiny_folder}", f"--out={out}")
        found = read(out)
        assert set(found) == set(run)
        for metric, values in run.items():
            assert found[metric] == pytest.approx(values, rel=1e-3, abs=1e-4), (name, metric)
        assert not (out / BEFORE).exists()  # nothing says what it began with
        assert [line["answer"] for line in lines(out)] == [line["answer"] for line in lines(home / "run")]
    # The base itself is what the run was before training.
    evaluate(home, tiny_folder, *words_of(home), f"--reference={tiny_folder}", f"--out={home}/of base")
    before, base = read(home / "run", BEFORE), read(home / "of base")
    assert set(before) == set(base) == set(run)
    for metric, values in before.items():
        assert base[metric] == pytest.approx(values, rel=1e-4, abs=1e-5), metric
    assert means(before)["judge"] == means(before)["reward_accuracy"] == 0.5
    assert all(means(before)[name] == 0 for name in ("kl", "kl_held_out", "reward_margin", "displacement"))
    # A run is a reference, too: the run against itself.
    evaluate(home, home / "merged", *words_of(home), f"--reference={home}/run", f"--out={home}/same")
    assert means(read(home / "same"))["kl"] == pytest.approx(0, abs=1e-4)
    assert means(read(home / "same"))["judge"] == 0.5


def test_figures_before_training_are_those_of_the_model_it_began_with(home: Path, tiny_folder: Path) -> None:
    """By a loop of its own, with the same prompts and seed."""
    evaluate(home, home / "run", *words_of(home))
    model, tokenizer = load_model(ModelSpec(str(tiny_folder))), load_tokenizer(ModelSpec(str(tiny_folder)))
    prompts = [f"question {i}" for i in range(5)]
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "batch_size": 4, "progress": False}
    before, after = read(home / "run", BEFORE), read(home / "run")
    for found, which, values in (
        (generate(model, tokenizer, prompts, **how), "before", before),
        (generate(load_run(home / "run").policy, tokenizer, prompts, **how), None, after),  # type: ignore[arg-type]
    ):
        said = [line[which] if which else line for line in lines(home / "run")]
        assert [line["answer"] for line in said] == [s.text for (s,) in found]
        assert list(values["length"].values()) == [len(s.completion_ids) for (s,) in found]
        assert list(values["rule"].values()) == ["e" in s.text for (s,) in found] == [line["rule"] for line in said]
    assert {*before["rule"]} == {f"prompts.jsonl:{i}" for i in range(1, 6)}
    for record in lines(home / "run", ROWS):
        assert record["policy_logp"] != record["reference_logp"]
    # Opponents' answers are in the file, and so are all columns.
    assert [line["other"]["answer"] for line in lines(home / "run")] == [
        line["before"]["answer"] for line in lines(home / "run")
    ]
    assert [line["columns"] for line in lines(home / "run")] == [{"gold": "e", "id": i} for i in range(5)]


@pytest.mark.slow
def test_another_reference_is_compared_with(home: Path, tiny_folder: Path, tiny_gpt2_folder: Path, capsys: Any) -> None:
    """Of the run and of what it was before; one of another vocabulary is an opponent only."""
    other = load_model(ModelSpec(str(tiny_gpt2_folder))).eval()
    evaluate(home, home / "run", f"--reference={tiny_gpt2_folder}", f"--out={home}/other")
    model, tokenizer = load_model(ModelSpec(str(tiny_folder))), load_tokenizer(ModelSpec(str(tiny_folder)))
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "batch_size": 4, "progress": False}
    samples = [s for (s,) in generate(model, tokenizer, [f"question {i}" for i in range(5)], **how)]
    policy = Scorer(model)
    expected = list(kl_of_samples(policy, FixedModel(other, policy), samples))
    assert list(read(home / "other", BEFORE)["kl"].values()) == pytest.approx(expected, rel=1e-4)
    assert read(home / "other")["kl"] != read(home / "other", BEFORE)["kl"]


def test_a_base_model_as_reference_is_asked_in_the_models_chat_template(
    home: Path, tiny_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """It has none of its own, and --chat_template is the model's."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    answers = []
    asked = [(tmp_path / "base", "chat"), (tiny_folder, "chat"), (tiny_folder, "plain")]
    for number, (reference, text) in enumerate(asked):
        out = tmp_path / f"out{number}"
        words = [f"--reference={reference}", f"--text_prompts={text}", f"--judge={home}/mine.py:longer"]
        evaluate(home, home / "merged", *words, f"--out={out}")
        answers.append([line["other"]["answer"] for line in lines(out)])
        assert ("has no chat template" in capsys.readouterr().out) == (number == 0)
    assert answers[0] == answers[1] != answers[2]


def test_the_time_of_the_divergence_counts_as_scoring(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(policy: Any, reference: Any, samples: list[Any], batch_size: int) -> Iterator[float]:
        for _ in samples:
            time.sleep(0.02)
            yield 0.0

    monkeypatch.setattr("halos_pl.evaluation.measurement.kl_of_samples", slow)
    evaluate(home, home / "run", f"--out={home}/slow")
    assert read(home / "slow", MEASURED)["seconds"]["scoring"] >= 5 * 0.02


def test_held_out_data_may_be_a_single_path(home: Path, tiny_folder: Path) -> None:
    main(["evaluate", str(tiny_folder), f"--held_out={home}/pairs.jsonl", f"--out={home}/single"])
    main(["evaluate", str(tiny_folder), f'--held_out=["{home}/pairs.jsonl"]', f"--out={home}/listed"])
    assert read(home / "single") == read(home / "listed") != {}


def test_nothing_of_an_earlier_evaluation_stays(home: Path, tiny_folder: Path, tmp_path: Path) -> None:
    evaluate(home, tiny_folder, f"--out={tmp_path}")
    assert (tmp_path / ANSWERS).exists()
    main(["evaluate", str(tiny_folder), f"--held_out={home}/pairs.jsonl", f"--out={tmp_path}"])
    assert not (tmp_path / ANSWERS).exists()
    assert (tmp_path / ROWS).exists()


def test_without_a_reference_what_compares_is_skipped_by_name(home: Path, capsys: Any) -> None:
    evaluate(home, home / "merged", f'--held_out=["{home}/pairs.jsonl"]', f"--out={home}/alone")
    assert set(read(home / "alone")) == ALONE | {"length", "finished"}
    said = next(line for line in capsys.readouterr().out.splitlines() if "skipped" in line)
    assert all(name in said for name in (*REWARDS, "kl"))
    assert "--reference" in said


def test_answers_outlive_a_rule_that_fails_and_are_sampled_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out, settings = home / "failing", ["--seed=11"]
    with pytest.raises(SystemExit) as ended:
        evaluate(home, home / "run", f"--rule={home}/mine.py:fails", f"--out={out}", *settings)
    assert ended.value.code == 1
    assert "prompts.jsonl:1: KeyError: 'nope'" in capfd.readouterr().err
    answers = lines(out)
    assert len(answers) == 5
    assert all({"answer", "finished", "before"} <= line.keys() for line in answers)
    assert not (out / FILE).exists()
    monkeypatch.setattr(kept, "generate", lambda *_, **__: pytest.fail("it was sampled again"))
    evaluate(home, home / "run", f"--rule={home}/mine.py:has_gold", f"--out={out}", *settings)
    assert [{k: v for k, v in line.items() if k not in ("rule", "before")} for line in lines(out)] == [
        {k: v for k, v in line.items() if k != "before"} for line in answers
    ]
    monkeypatch.undo()
    called = []
    real = kept.generate
    monkeypatch.setattr(kept, "generate", lambda *a, **k: called.append(1) or real(*a, **k))
    evaluate(home, home / "run", f"--out={out}", "--seed=12")  # another seed: anew, of both models
    assert len(called) == 2


@pytest.mark.slow
def test_kept_answers_that_are_damaged_are_sampled_again(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path))
    evaluate(home, home / "merged", f"--out={home}/first")
    (file,) = (tmp_path / kept.ANSWERS).glob("*.json")
    ids = json.loads(file.read_text())["ids"]
    file.write_text(file.read_text().replace(str(ids[0][0]), str(ids[0][0] + 1), 1))
    evaluate(home, home / "merged", f"--out={home}/second")
    assert lines(home / "first") == lines(home / "second")
    assert json.loads(file.read_text())["ids"] == ids


WRONG = {
    "run --judge=mine.py:longer --reference=nope/nope/nope": "nope/nope/nope",
    "run --reference=empty": "empty",
    "merged --judge=mine.py:longer": "--reference",
    "merged --ckpt_path=best": "checkpoint best",
    "empty": "empty",
    "lost": "config.yaml",
    "mine.py": "mine.py",
    "run --out=mine.py": "mine.py",
    "run --prompt_column=question": "question",
    "run --rule=mine.py:nope": "nope",
    "run --temperature=-1": "temperature",
    "run --max_new_tokens=0": "max_new_tokens",
    "run --beta=inf": "beta",
    "run --text_prompts=maybe": "text_prompts",
}


@pytest.mark.parametrize("words", one_in(3, WRONG))
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    words: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(home)
    (home / "empty").mkdir(exist_ok=True)
    (home / "lost" / "checkpoints").mkdir(parents=True, exist_ok=True)
    for place in ("halos_pl.training.named_model.load_model", "halos_pl.training.models.load_model"):
        monkeypatch.setattr(place, lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *words.split(), "--prompts=prompts.jsonl"])
    said = [line for line in capfd.readouterr().err.splitlines() if line and not line.startswith("All options")]
    assert ended.value.code in (1, 2)
    assert len(said) == 1, said
    assert WRONG[words] in said[0]


def test_a_column_of_another_name_holds_the_prompt(home: Path, tmp_path: Path, capfd: Any) -> None:
    write_jsonl(tmp_path / "q.jsonl", [{"question": "Why?", "answer": "e"}])
    words = ["evaluate", str(home / "merged"), f"--prompts={tmp_path}/q.jsonl", f"--out={tmp_path}/out", *SETTINGS]
    with pytest.raises(SystemExit):
        main(words)
    said = capfd.readouterr().err
    assert "'question', 'answer'" in said
    assert "--prompt_column" in said
    main([*words, "--prompt_column=question", "--text_prompts=chat"])
    assert lines(tmp_path / "out")[0]["prompt"] == [{"role": "user", "content": "Why?"}]
    tokenizer = load_tokenizer(ModelSpec(str(home / "merged")))
    assert "im_start" in tokenizer.decode(encode_prompt(tokenizer, lines(tmp_path / "out")[0]["prompt"]))
