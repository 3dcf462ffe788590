"""`halos ablate` on `policy: candidates`: a sweep from files to its report."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from scipy import stats

from halos_pl.candidates.differences import differences
from halos_pl.candidates.measure import METRICS, features_of
from halos_pl.candidates.read import Preferences, read_preferences
from halos_pl.candidates.spec import load_sweep
from halos_pl.candidates.values import Values
from halos_pl.cli.ablate import ablate, report, status
from halos_pl.common.experiments import EXPERIMENTS
from halos_pl.data.example import DataError
from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.study.spec import StudyError


def rows(first: int, count: int) -> list[dict[str, Any]]:
    """Preferences for the answer that says yes; the tiny tokenizer knows letters."""
    return [
        {"prompt": f"question {i}?", "chosen": f"yes {i % 3}", "rejected": f"no {i % 5} no"}
        for i in range(first, first + count)
    ]


def saved(study: dict[str, Any], folder: Path) -> Path:
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def completions(tokenizer: Any, text: str) -> list[list[int]]:
    """A completion's tokens, with and without what ends it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids, [*ids, tokenizer.eos_token_id]]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def study_in(folder: Path, model: Path) -> dict[str, Any]:
    return {
        "policy": "candidates",
        "train": [write(folder / "train.jsonl", rows(0, 12))],
        "held_out": [write(folder / "held_out.jsonl", rows(100, 8))],
        "model": {"path": str(model)},
        "reference": False,
        "votes": 8,
        "seeds": 3,
        "steps": 10,
        "words": 4,
        "rates": [0.001, 0.1],
        "seeds_per_round": 2,
        "tune_seeds": 2,
        "arms": {"kto": {"objective": "kto", "reference_point": "CandidateKL"}, "dpo": {"objective": "dpo"}},
        "axes": {"value_function.init_args.beta": [0.5, 1.0]},
        "noise": [0.0, 0.25],
    }


@pytest.fixture
def study(tmp_path: Path, tiny_folder: Path) -> dict[str, Any]:
    return study_in(tmp_path, tiny_folder)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of a finished sweep over the fixture ``study``; tests change only copies."""
    folder = tmp_path_factory.mktemp("swept")
    return run(study_in(folder, tiny_folder), folder)


@pytest.fixture
def out(swept: Path, tmp_path: Path) -> Path:
    """A copy of that folder, which a sweep over ``study`` in ``tmp_path`` continues."""
    return Path(shutil.copytree(swept, tmp_path / "out"))


def run(study: dict[str, Any], folder: Path) -> Path:
    """The folder of the sweep."""
    ablate(str(saved(study, folder)), out=str(folder / "out"))
    return folder / "out"


def table(out: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(gzip.open(out / f"{name}.csv.gz", "rt")))


def test_a_sweep_measures_each_cell_at_its_best_rate(out):
    values, rates, prompts = (table(out, name) for name in ("values", "rates", "prompts"))
    assert (len(values), len(rates), len(prompts)) == (8 * 3, 8 * 2, 8 * 2)  # rounds of 2 seeds and 1
    assert {line["value_function.init_args.beta"] for line in values} == {"0.5", "1.0"}
    text = (out / "report.md").read_text()
    for cell in range(8):
        curve = {line["rate"]: float(line["figure"]) for line in rates[2 * cell : 2 * cell + 2]}
        assert f"{max(curve, key=curve.__getitem__)}, edge" in text
    clean = [float(line["accuracy"]) for line in values if line["noise"] == "0.0"]
    assert min(clean) == 1  # the words tell which answer is preferred
    assert all(float(line["kl"]) >= 0 for line in values)
    for cell in range(8):  # the two ways to average agree
        rounds = [line for line in prompts if list(line.values())[:4] == list(prompts[cell].values())[:4]]
        sums = [int(line["seeds"]) * mean for line in rounds for mean in map(float, line["means"].split())]
        mine = [float(v["accuracy"]) for v in values if list(v.values())[:4] == list(prompts[cell].values())[:4]]
        assert sum(sums) / len(prompts[0]["means"].split()) == pytest.approx(sum(mine), abs=1e-3)


def test_an_interrupted_sweep_resumes_to_the_same_values(study, out, tmp_path):
    whole = {name: sorted(map(str, table(out, name))) for name in ("values", "rates")}
    packed = (out / "values.csv.gz").read_bytes()
    (out / "values.csv.gz").write_bytes(packed[: len(packed) * 2 // 3])  # in the middle of a piece
    run(study, tmp_path)
    assert {name: sorted(map(str, table(out, name))) for name in whole} == whole


@pytest.mark.parametrize("left", [0.0, 0.6])
def test_lost_means_of_prompts_are_computed_again(study, out, tmp_path, left):
    """Or the differences would be those of fewer seeds, or missing."""

    def prompts():
        return {tuple(v for k, v in line.items() if k != "seconds") for line in table(out, "prompts")}

    whole, packed = prompts(), (out / "prompts.csv.gz").read_bytes()
    (out / "prompts.csv.gz").write_bytes(packed[: int(len(packed) * left)])
    run(study, tmp_path)
    assert prompts() == whole


def test_reading_a_table_changes_nothing(study, out):
    """Another process may be adding a piece to it."""
    packed = (out / "values.csv.gz").read_bytes()[:-5]
    (out / "values.csv.gz").write_bytes(packed)
    status(str(out))
    report(str(out))
    assert (out / "values.csv.gz").read_bytes() == packed


def damaged(old: bytes, new: bytes, name: str = "values.csv.gz"):
    def damage(out: Path) -> None:
        text = gzip.decompress((out / name).read_bytes())
        assert old in text
        (out / name).write_bytes(gzip.compress(text.replace(old, new, 1)))

    return damage


def changed(**parts):
    def damage(out: Path) -> None:
        record = json.loads((out / "record.json").read_text()) | parts
        kept = {key: value for key, value in record.items() if value is not None}
        (out / "record.json").write_text(json.dumps(kept))

    return damage


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        *((damaged(b",1,", text), "values.csv.gz") for text in (b",many,", b",nan,", b",inf,", b",,")),
        (damaged(b"dpo,", b"d\xffo,"), "values.csv.gz"),
        (damaged(b"accuracy,", b"accuracy,x ", "prompts.csv.gz"), "prompts.csv.gz"),
        (damaged(b",0.001,", b",0.001,x", "rates.csv.gz"), "rates.csv.gz"),
        *((lambda out, text=text: (out / "record.json").write_text(text), "record.json") for text in ("{", "[]", "{}")),
        *((changed(**part), "record.json") for part in ({"settings": 3}, {"training": None}, {"prompts": 2})),
    ],
)
def test_a_damaged_file_of_a_sweep_is_named(study, out, tmp_path, damage, file):
    damage(out)
    with pytest.raises(StudyError, match=re.escape(str(out / file))) as error:
        run(study, tmp_path)
    assert "\n" not in str(error.value)


def test_values_of_more_seeds_are_refused(study, out, tmp_path):
    with pytest.raises(StudyError, match="3 seeds, not 1"):
        run(study | {"seeds": 1}, tmp_path)


def test_splits_of_a_saved_data_set_can_be_trained_and_measured_on(study, tmp_path):
    splits = {"train": rows(0, 12), "test": rows(100, 8)}
    saved_set = datasets.DatasetDict({name: datasets.Dataset.from_list(each) for name, each in splits.items()})
    saved_set.save_to_disk(str(tmp_path / "set"))
    whole = table(run(study, tmp_path), "values")
    shutil.rmtree(tmp_path / "out")
    named = {"train": "train", "held_out": "test"}
    study |= {key: [{"path": str(tmp_path / "set"), "split": split}] for key, split in named.items()}
    assert table(run(study, tmp_path), "values") == whole


def test_more_seeds_keep_those_that_are_done(study, out, tmp_path):
    before = table(out, "values")
    after = table(run(study | {"seeds": 4}, tmp_path), "values")
    assert after[: len(before)] == before
    seeds = {(line["arm"], line["noise"], line["value_function.init_args.beta"], line["seed"]) for line in after}
    assert len(seeds) == 8 * 4


def test_report_and_status_need_only_the_folder(out, capsys):
    text = (out / "report.md").read_text()
    (out / "report.md").unlink()
    report(str(out))
    assert (out / "report.md").read_text() == text
    (out / "values.csv.gz").unlink()
    status(str(out))
    assert "seeds 0 to 1: 0 of 8 cells" in capsys.readouterr().out
    with pytest.raises(StudyError, match="no cell has been measured"):
        report(str(out))


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"steps": 11}, "steps 10, not 11"), ({"train": ["other"]}, "other data"), ({"noise": [0.0]}, "noise")],
)
def test_values_of_other_settings_or_data_are_refused(study, out, change, fault, tmp_path):
    packed = (out / "values.csv.gz").read_bytes()
    if "train" in change:
        change = {"train": [write(tmp_path / "other.jsonl", rows(0, 11))]}
    with pytest.raises(StudyError, match=fault):
        run(study | change, tmp_path)
    assert (out / "values.csv.gz").read_bytes() == packed


STEEPER = """
from value_functions.base import ValueFunction


class SteeperOfTest(ValueFunction):
    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, u):
        return (FACTOR * self.beta * u).tanh()
"""


@pytest.mark.parametrize("part", ["objective", "plug-in"])
def test_values_of_an_edited_loss_are_refused(study, tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = f"steeper_{part.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(STEEPER.replace("FACTOR", "1.0"))
    text = (EXPERIMENTS / "objectives/kto.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    function = {"class_path": f"{module}.SteeperOfTest", "init_args": {"beta": 0.5}}
    arms = {"mine": {"objective": "mine.yaml", "reference_point": "CandidateKL", "value_function": function}}
    study |= {"arms": arms, "axes": {}, "noise": [0.0], "seeds": 2}
    out = run(study, tmp_path)
    packed = (out / "values.csv.gz").read_bytes()
    run(study, tmp_path)
    assert (out / "values.csv.gz").read_bytes() == packed
    if part == "objective":
        (tmp_path / "mine.yaml").write_text(text.replace("lambda_undesirable: 1.0", "lambda_undesirable: 5.0"))
    else:
        (tmp_path / f"{module}.py").write_text(STEEPER.replace("FACTOR", "2.0"))
    with pytest.raises(StudyError, match=r"mine \(their YAML or Python files have changed"):
        run(study | {"seeds": 4}, tmp_path)
    assert (out / "values.csv.gz").read_bytes() == packed


def test_classes_can_be_an_axis(study, tmp_path):
    arms = {"kto": {"objective": "kto", "reference_point": "CandidateKL"}}
    out = run(study | {"arms": arms, "axes": {"value_function": ["Logistic", "Tanh"]}, "noise": [0.0]}, tmp_path)
    assert {line["value_function"] for line in table(out, "values")} == {"Logistic", "Tanh"}
    assert "value_function Tanh" in (out / "report.md").read_text()


def test_a_folder_without_values_takes_other_settings(study, out, tmp_path):
    for name in ("values", "rates", "prompts"):
        (out / f"{name}.csv.gz").unlink()
    run(study | {"steps": 11}, tmp_path)
    assert json.loads((out / "record.json").read_text())["settings"]["steps"] == 11


def test_completions_that_are_cut_to_the_same_tokens_are_refused(study, tmp_path):
    lines = [line | {"chosen": "yes " * 30 + "a", "rejected": "yes " * 30 + "b"} for line in rows(0, 12)]
    with pytest.raises(DataError, match="max_length cuts both completions"):
        run(study | {"train": [write(tmp_path / "long.jsonl", lines)], "max_length": 24}, tmp_path)


def test_a_folder_with_other_files_is_refused(study, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="is not empty"):
        run(study, tmp_path)


def test_states_are_means_over_a_completion_and_come_with_log_probs(tmp_path, tiny_folder, monkeypatch):
    """Against the model's own hidden states, row by row."""
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "votes.jsonl", rows(0, 3))
    spec = ModelSpec(str(tiny_folder))
    read = read_preferences([path], spec, reference=True, states=True)
    plain = read_preferences([path], spec, reference=True)
    assert read.reference_logps == pytest.approx(plain.reference_logps, abs=1e-3)
    model, tokenizer = load_model(spec).eval().requires_grad_(False), load_tokenizer(spec)
    for row, text in enumerate(read.texts):
        question = tokenizer(f"question {read.prompt[row]}?", add_special_tokens=True)["input_ids"]
        found = [
            model(torch.tensor([[*question, *ids]]), output_hidden_states=True).hidden_states[-1][0, len(question) :]
            for ids in completions(tokenizer, text)
        ]
        nearest = min(float((each.mean(0) - read.states[row]).abs().max()) for each in found)
        assert nearest < 1e-4
    again = read_preferences([path], spec, reference=True, states=True)
    assert (again.scored, again.stored) == (0, 6)
    assert torch.equal(torch.stack(again.states), torch.stack(read.states))


def test_components_are_those_of_training(study, tmp_path, monkeypatch):
    """Held-out completions do not move the features of training."""
    read = Preferences(
        prompt=[0, 0, 1, 1, 2, 2],
        texts=["a"] * 6,
        tokens=[1, 2, 3, 4, 5, 6],
        states=[*torch.randn(6, 5, generator=torch.Generator().manual_seed(0))],
        pairs=[(0, 1), (2, 3), (4, 5)],
    )
    spec = load_sweep(saved(study | {"states": 3, "reference": True, "words": 0}, tmp_path))[0]
    first = features_of(spec, read, [0, 1])
    read.states[4] = 100 * read.states[4]
    second = features_of(spec, read, [0, 1])
    assert torch.equal(first[:4], second[:4])
    assert first[:4].std(0).tolist() == pytest.approx([1] * 4)
    centred = first[:4, 1:] - first[:4, 1:].mean(0)
    assert (centred.T @ centred).fill_diagonal_(0).abs().max() < 1e-4  # components do not correlate


def test_log_probs_are_those_of_the_model_and_computed_once(study, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    twice = [*rows(0, 3), rows(0, 1)[0] | {"chosen": "no 0 no", "rejected": "yes 0"}]
    path = write(tmp_path / "votes.jsonl", twice)
    read = read_preferences([path], ModelSpec(str(tiny_folder)), reference=True)
    assert (len(read.texts), read.pairs[3]) == (6, read.pairs[0][::-1])  # the same candidates, contradicted
    again = read_preferences([path], ModelSpec(str(tiny_folder)), reference=True)
    assert (again.scored, again.stored) == (0, 8)
    assert again.reference_logps == read.reference_logps
    assert max(read.reference_logps) < 0
    places = read.sets(range(4), read.features(4))
    assert places[0].reference_logps.exp().sum(0).tolist() == pytest.approx([1, 1, 1])
    assert torch.equal(places[1][3], places[1][0].flip(0))


def test_labels_and_scores_become_preferences(tmp_path, tiny_folder):
    labelled = [{"prompt": "q", "completion": c, "label": c != "bad"} for c in ("good", "better", "bad")]
    read = read_preferences([write(tmp_path / "l.jsonl", labelled)], ModelSpec(str(tiny_folder)), reference=False)
    assert {(read.texts[a], read.texts[b]) for a, b in read.pairs} == {("good", "bad"), ("better", "bad")}


def test_free_logits_are_reported_on_the_prompts_of_training(study, tmp_path):
    contradicted = [row for row in rows(0, 4) for _ in range(2)]
    contradicted += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(0, 4)]
    study |= {
        "train": [write(tmp_path / "votes.jsonl", contradicted)],
        "held_out": [write(tmp_path / "majority.jsonl", rows(0, 4))],
        **{
            "words": "free",
            "measure_on": "training_prompts",
            "votes": 12,
            "seeds": 1,
            "tune_seeds": 1,
            "noise": [0.0],
            "steps": 40,
            "rates": [0.01, 0.1],
        },
    }
    values = table(run(study, tmp_path), "values")
    assert [line["follows"] for line in values] == ["1"] * 4  # both follow a majority that pi_ref does not oppose


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"arms": {"kto": {"objective": "kto"}}}, "set reference_point to CandidateKL"),
        (
            {"arms": {"sft": {"objective": "sft"}}, "axes": {}},
            "sft: the objective's loss depends on the number of tokens",
        ),
        ({"arms": {"moving": {"objective": "tr_dpo"}}}, "model.reference_model"),
        ({"arms": {"a": {"objective": "dpo", "value_function.init_args.gamma": 1}}}, "gamma"),
        ({"arms": {"a": {"objective": "dpo", "valeu_function": 1}}}, "did you mean value_function"),
        ({"held_out": []}, "held_out is empty"),
        ({"rates": [0.1, 0.01]}, "ascending"),
        ({"votes": 13}, "votes is 13"),
        ({"votes": 12, "noise": [0.0]}, "set seeds to 1"),
        ({"steps": 0}, "steps is 0"),
        ({"policy": "language"}, "policy is 'language'"),
        ({"states": 4}, "states are those of the reference"),
        ({"words": "free"}, "set measure_on to training_prompts"),
        ({"baseline": "ppo"}, "baseline 'ppo' is not an arm"),
        ({"arms": {"kto": {"objective": "kto", "reference_point": "CandidateKL", "balance": 2}}}, "balance is 2"),
        ({"seeds": "many"}, "seeds"),
        ({"noise": [1.5]}, "noise"),
        ({"colour": "red"}, "colour"),
        ({"train": ["none.jsonl"]}, "none.jsonl"),
        ({"tune": "kl"}, "tune"),
        (
            {"train": [{"path": "a.jsonl", "rows": 2}], "held_out": [{"path": "a.jsonl", "skip": 2}]},
            "train and held_out both name",
        ),
        ({"train": [{"path": "a.jsonl", "weight": 2.0}]}, "train has a source with a weight"),
        ({"held_out": [{"path": "a.jsonl", "rowz": 2}]}, "held_out has no setting rowz"),
        ({"tune_seeds": 10**9}, "tune_seeds is 1000000000"),
        *(({"rates": [0.1, rate]}, "rates") for rate in (math.nan, math.inf, 1e38)),
        *(
            ({"axes": {"value_function.init_args.beta": v}}, "init_args.beta is")
            for v in ([0.1, 0.1], [1, 1.0], [None], [{"a": 1}])
        ),
    ],
)
def test_faults_of_a_study_are_one_line(study, change, fault, tmp_path):
    with pytest.raises((StudyError, ValueError)) as stop:
        run(study | change, tmp_path)
    assert fault in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_faults_name_the_line(study, tmp_path):
    path = saved(study | {"rates": [0.1, 0.01]}, tmp_path)
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if text.startswith("rates"))
    with pytest.raises(StudyError, match=f"study.yaml:{line}: rates is"):
        ablate(str(path))
    with pytest.raises(StudyError, match="takes no --jobs"):
        ablate(str(path), jobs=2)


@pytest.mark.parametrize("space", ["", "  ", " \n"])
def test_a_prompt_in_training_and_held_out_data_is_refused(study, tmp_path, space):
    near = [{**row, "prompt": row["prompt"].replace(" ", space or " ") + space} for row in rows(3, 1)]
    study["held_out"] = [write(tmp_path / "held_out.jsonl", [*rows(100, 4), *near])]
    with pytest.raises(StudyError, match=r"held_out\.jsonl:5: the held-out prompt is also one of train"):
        run(study, tmp_path)


def test_balance_gives_both_classes_the_same_weight(study, tmp_path):
    """lambda_D n_D = lambda_U n_U, whatever the share of desirable rows."""
    study |= {"desirable": [0.25, 1.0]}
    study["arms"]["kto"]["balance"] = True
    spec, built = load_sweep(saved(study, tmp_path))
    for cell, objective in built.items():
        if cell.arm == "kto":
            feedback = objective.feedback
            n_d = round(cell.desirable * spec.votes)
            assert feedback.lambda_desirable * n_d == feedback.lambda_undesirable * spec.votes


def test_a_difference_over_prompts_alone_is_a_paired_t_test(study, tmp_path):
    """Seeds that agree add no error; rounds weigh by their seeds."""
    study |= {"axes": {}, "noise": [0.0], "baseline": "dpo"}
    spec, _ = load_sweep(saved(study, tmp_path))
    values = Values(spec, tmp_path)
    of_prompts = {"kto": [0.9, 0.5, 0.8, 0.7], "dpo": [0.4, 0.5, 0.6, 0.6]}
    for cell in spec.cells:
        mean = [sum(of_prompts[cell.arm]) / 4] * len(METRICS)
        for seeds, shift in ((range(0, 2), 0.1), (range(2, 3), -0.2)):
            means = [each + shift for each in of_prompts[cell.arm]]
            values.add_seeds(cell, seeds, [[*mean, 0.1]] * len(seeds), means, 1.0)
    (difference,) = differences(values).values()
    assert difference.effect == pytest.approx(0.2)
    assert difference.seeds == 0
    assert difference.p == pytest.approx(stats.ttest_rel(of_prompts["kto"], of_prompts["dpo"]).pvalue)
    low, high = stats.ttest_rel(of_prompts["kto"], of_prompts["dpo"]).confidence_interval()
    assert (difference.effect - difference.reach, difference.effect + difference.reach) == pytest.approx((low, high))


def test_errors_over_seeds_and_prompts_add_up(study, tmp_path):
    study |= {"axes": {}, "noise": [0.0], "baseline": "dpo", "seeds": 4, "seeds_per_round": 4}
    spec, _ = load_sweep(saved(study, tmp_path))
    values = Values(spec, tmp_path)
    of_seeds = {"kto": [0.5, 0.7, 0.6, 0.8], "dpo": [0.5, 0.4, 0.6, 0.5]}
    for cell in spec.cells:
        lines = [[mean] * (1 + len(METRICS)) for mean in of_seeds[cell.arm]]
        values.add_seeds(cell, range(4), lines, [0.5, 0.9] if cell.arm == "kto" else [0.4, 0.6], 1.0)
    (difference,) = differences(values).values()
    assert difference.seeds == pytest.approx(stats.sem([0.0, 0.3, 0.0, 0.3]))
    assert difference.prompts == pytest.approx(stats.sem([0.1, 0.3]))
    assert difference.error**2 == pytest.approx(difference.seeds**2 + difference.prompts**2)


def test_weights_that_candidates_would_not_count_are_refused(tmp_path, tiny_folder):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "weight": 1 + i} for i in range(2)]
    path = write(tmp_path / "w.jsonl", rows)
    with pytest.raises(DataError, match=rf"^{path}:2"):
        read_preferences([path], ModelSpec(str(tiny_folder)), reference=False)
    ignoring = [{"path": path, "ignore": ["weight"]}]
    assert len(read_preferences(ignoring, ModelSpec(str(tiny_folder)), reference=False).pairs) == 2
