"""The DataModule with real files, under a Trainer and alone."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_modules import DPO, KTO, SFT, binary, connected, pairs, set_up, text, tokenizer
from lightning.pytorch import LightningModule, Trainer
from run_halos import quiet_trainer, write_jsonl
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs, TokenBatch
from halos_pl.data import DataError, FeedbackDataModule, Source, store
from halos_pl.data.batches import StepDataset, TokenizedRow
from halos_pl.data.order import Step
from halos_pl.data.split import ControlTokens
from halos_pl.data.transforms import FlipLabels, OnePerPrompt, Pair, ThresholdScores
from halos_pl.objective.reference_points import ScoreMargin
from halos_pl.testing import tiny_tokenizer


def train_rows(data: FeedbackDataModule, epoch: int = 0) -> list[list[tuple[str, str, bool, bool, str]]]:
    """(prompt, completion, desirable, mismatched row, name) of every row of every step of an epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [rows(batch) for batch in loader]


def rows(batch: TokenBatch) -> list[tuple[str, str, bool, bool, str]]:
    return [
        (
            text(batch.prompts[int(batch.prompt[i])]),
            text(batch.completions[i]),
            bool(batch.labels.desirable[i]),
            bool(batch.labels.mismatched[i]),
            batch.row_ids[i],
        )
        for i in range(len(batch))
    ]


# What enters


def test_data_without_a_model_say_how_to_connect_them(tmp_path: Path) -> None:
    data = FeedbackDataModule(write_jsonl(tmp_path / "a.jsonl", binary()))
    with pytest.raises(RuntimeError, match=r"data\.connect\(tokenizer=.*needs="):
        data.setup("fit")


def test_the_tokenizer_is_loaded_once_and_only_for_files_that_exist(tmp_path: Path) -> None:
    calls: list[int] = []

    def load() -> PreTrainedTokenizerBase:
        calls.append(1)
        return tokenizer()

    data = FeedbackDataModule(str(tmp_path / "absent.jsonl"))
    data.connect(tokenizer=load, needs=SFT)
    with pytest.raises(DataError, match="absent"):
        data.setup("fit")
    assert not calls
    data = FeedbackDataModule(write_jsonl(tmp_path / "a.jsonl", binary()))
    data.connect(tokenizer=load, needs=SFT)
    data.setup("fit")
    assert len(train_rows(data)) == 1
    assert len(calls) == 1


def test_binary_rows_enter_once_an_epoch(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    data = set_up(KTO, train=path, batch_size=4)
    steps = train_rows(data)
    assert [len(step) for step in steps] == [8, 8, 4]
    own = [row for step in steps for row in step if not row[3]]
    assert sorted(own, key=lambda row: int(row[4].rpartition(":")[2])) == [
        (row["prompt"], row["completion"] + "<|im_end|>", row["label"], False, f"{path}:{i}")
        for i, row in enumerate(binary(), start=1)
    ]
    assert train_rows(data) == steps
    assert train_rows(data, epoch=1) != steps


def test_pairs_without_pairs_are_unpaired_before_shuffling(tmp_path: Path) -> None:
    data = set_up(KTO, train=write_jsonl(tmp_path / "a.jsonl", pairs(64)), batch_size=16)
    steps = [[row for row in step if not row[3]] for step in train_rows(data)]
    assert [len(step) for step in steps] == [16] * 8
    assert all(0 < sum(row[2] for row in step) < 16 for step in steps)  # every step has both classes
    apart = [len({row[0] for row in step}) for step in steps]
    assert max(apart) > 8  # the two rows of a pair do not travel together
    assert Counter(row[4].rpartition("#")[2] for step in steps for row in step) == {
        "chosen": 64,
        "rejected": 64,
    }


def test_pairs_with_pairs_stay_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs())
    data = set_up(DPO | Needs(mismatched=True), train=path, batch_size=4)
    sizes = []
    for batch in data.train_dataloader():
        n = int((~batch.labels.mismatched).sum())
        sizes.append(n)
        assert batch.labels.pair.tolist() == [i ^ 1 for i in range(n)] + [-1] * n
        assert batch.labels.desirable.tolist() == [True, False] * (n // 2) + [False] * n
        assert batch.row_ids[0].removesuffix("#chosen") == batch.row_ids[1].removesuffix("#rejected")
    assert sizes == [8, 8, 4]
    assert data.counts()["train"][path]["pairs"] == 10


def test_negative_margins_and_margins_beside_scores_are_counted(tmp_path: Path) -> None:
    rows = pairs(3)
    rows[0] |= {"chosen_score": 2, "rejected_score": 1, "margin": 3.0}
    rows[1] |= {"chosen_score": 0.1, "rejected_score": 0.9}
    rows[2] |= {"margin": -5}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    counts = {needs: set_up(needs, train=path).counts()["train"][path] for needs in (DPO, ScoreMargin.needs | DPO)}
    assert [each["negative_margins"] for each in counts.values()] == [0, 2]
    assert all(each["unused"] == ["margin"] for each in counts.values())


def test_binary_data_do_not_suit_an_objective_with_pairs(tmp_path: Path) -> None:
    good, bad = write_jsonl(tmp_path / "a.jsonl", pairs()), write_jsonl(tmp_path / "b.jsonl", binary())
    with pytest.raises(DataError, match=r"b\.jsonl:1: .*compares the two completions.*chosen and rejected"):
        set_up(DPO, train=[good, bad])


def test_only_desirable_rows_where_no_others_are_wanted(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / "a.jsonl", binary()), write_jsonl(tmp_path / "b.jsonl", pairs(5))]
    data = set_up(SFT, train=paths)
    assert all(row[2] for step in train_rows(data) for row in step)
    counts = data.counts()["train"]
    assert [counts[path]["dropped_undesirable"] for path in paths] == [4, 5]
    assert [(counts[path]["rows"], counts[path]["desirable"], counts[path]["pairs"]) for path in paths] == [
        (6, 6, 0),
        (5, 5, 0),
    ]


def test_no_row_left(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**row, "label": 0} for row in binary()])
    with pytest.raises(DataError, match=r"a\.jsonl: no row is left for train"):
        set_up(SFT, train=path)


def test_rows_of_a_prompt_stay_together_where_they_are_compared(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary(30, prompts=10))
    data = set_up(Needs(groups=True, undesirable=True), train=path, batch_size=3, max_length=12)
    seen: list[int] = []
    for batch in data.train_dataloader():
        for group in batch.labels.group.unique().tolist():
            members = [i for i, g in enumerate(batch.labels.group.tolist()) if g == group]
            assert len(members) == 3
            prompts = {text(batch.prompts[int(batch.prompt[i])]) for i in members}
            assert all(min(prompts).endswith(p) or p.endswith(min(prompts)) for p in prompts)
            seen.append(group)
        assert bool((batch.labels.pair < 0).all())
    assert len(seen) == len(set(seen)) == 10


def test_pairs_of_a_prompt_keep_their_pairs_within_its_group(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row | {"prompt": f"p{i % 4}"} for i, row in enumerate(pairs(12))])
    data = set_up(DPO | Needs(groups=True), train=path, batch_size=2)
    sizes = []
    for batch in data.train_dataloader():
        sizes.append(len(batch))
        pair = batch.labels.pair
        assert torch.equal(pair[pair], torch.arange(len(batch)))
        names = [batch.row_ids[i].split("#") for i in range(len(batch))]
        assert all(names[i][0] == names[j][0] and names[i][1] != names[j][1] for i, j in enumerate(pair.tolist()))
    assert sizes == [12, 12]


def test_control_tokens_stand_between_prompt_and_completion(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    control = ControlTokens(desirable=" GOOD", undesirable=" BAD")
    plain = set_up(KTO, train=path, batch_size=4)
    data = set_up(KTO, train=path, batch_size=4, control_tokens=control)
    said = {True: " GOOD", False: " BAD"}
    for step, before in zip(train_rows(data), train_rows(plain), strict=True):
        n = len(step) // 2
        for row, old in zip(step[:n], before[:n], strict=True):
            assert row == (old[0] + said[old[2]], *old[1:])
        for i, (row, old) in enumerate(zip(step[n:], before[n:], strict=True)):  # a mismatched row has its prompt's own
            assert row == (old[0] + said[step[i][2]], *old[1:])
    cut = set_up(KTO, train=path, batch_size=4, max_length=16, control_tokens=control)
    for batch in cut.train_dataloader():
        assert all(len(batch.prompts[p]) + len(c) <= 16 for p, c in zip(batch.prompt, batch.completions, strict=True))
    with pytest.raises(DataError, match="control_tokens alone fill"):
        set_up(KTO, train=path, max_length=3, control_tokens=control)


def test_one_completion_per_prompt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary(30, prompts=10))
    kept = {}
    for seed in range(3):
        data = set_up(KTO, train=path, one_completion_per_prompt=True, seed=seed)
        own = [row for step in train_rows(data) for row in step if not row[3]]
        assert sorted(row[0] for row in own) == [f"p{i}" for i in range(10)]
        counts = data.counts()["train"][path]
        assert counts["rows"] == 10
        assert data.counts()["train"]["transforms"] == [{"transform": "OnePerPrompt", "dropped": 20}]
        assert counts["desirable"] == sum(row[2] for row in own)
        kept[seed] = {row[4] for row in own}
    assert len({frozenset(names) for names in kept.values()}) == 3
    with pytest.raises(DataError, match=r"b\.jsonl:\d+#\w+: .*no pair"):
        set_up(DPO, train=write_jsonl(tmp_path / "b.jsonl", pairs()), transforms=[OnePerPrompt()])


# Lengths


def test_lengths(tmp_path: Path) -> None:
    at = tokenizer()("q", add_special_tokens=False)["input_ids"]
    assert len(at) == 1
    lengths = [
        (9, 3),
        (4, 5),
        (20, 9),
        (3, 30),
    ]  # (prompt, completion) without EOS; q and z are one token each
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": "a" * i + "q" * p, "completion": "z" * c, "label": 1} for i, (p, c) in enumerate(lengths)],
    )
    data = set_up(KTO, train=path, max_length=10, batch_size=4, shuffle=False)
    [batch] = data.train_dataloader()
    shapes = [(len(batch.prompts[p]), len(c)) for p, c in zip(batch.prompt.tolist(), batch.completions, strict=True)]
    assert shapes[:4] == [(6, 4), (4, 6), (1, 9), (1, 9)]
    assert all(p >= 1 and c >= 1 and p + c <= 10 for p, c in shapes)
    assert [c[-1] == tokenizer().eos_token_id for c in batch.completions[:4]] == [True, True, False, False]
    counts = data.counts()["train"][path]
    assert (counts["prompts_cut"], counts["completions_cut"]) == (4, 2)
    dropped = set_up(SFT, train=path, max_length=10, truncate_completions=False).counts()["train"][path]
    assert (dropped["rows"], dropped["dropped_too_long"], dropped["completions_cut"]) == (2, 2, 0)


def test_a_pair_is_cut_and_dropped_as_one(tmp_path: Path) -> None:
    long = {"prompt": "q" * 8, "chosen": "z", "rejected": "z" * 5}
    path = write_jsonl(tmp_path / "a.jsonl", [long, *pairs(2)])
    first = next(iter(set_up(DPO, train=path, max_length=10, batch_size=1, shuffle=False).train_dataloader()))
    assert first.prompt.tolist() == [0, 0]
    assert len(first.prompts[0]) == 4  # what the longer completion leaves
    for needs, rows_left in ((DPO, 0), (KTO, 1)):
        path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "z", "rejected": "z" * 50}, *pairs(2)])
        data = set_up(needs, train=path, max_length=20, truncate_completions=False)
        assert data.counts()["train"][path]["rows"] == 4 + rows_left
        assert data.counts()["train"][path]["dropped_too_long"] == 2 - rows_left


# Independence


@pytest.mark.parametrize("needs", [KTO, DPO | Needs(mismatched=True)])
@pytest.mark.parametrize("size", [7, 10])
def test_ranks_and_workers_do_not_change_a_step(tmp_path: Path, needs: Needs, size: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(size))
    whole = train_rows(set_up(needs, train=path, batch_size=4))
    assert train_rows(set_up(needs, train=path, batch_size=4, num_workers=2)) == whole
    for world_size in (2, 3):
        ranks = [
            train_rows(set_up(needs, train=path, batch_size=4, rank=r, world_size=world_size))
            for r in range(world_size)
        ]
        together = [Counter(row for part in parts for row in part) for parts in zip(*ranks, strict=True)]
        assert together[0] == Counter(whole[0])
        assert all(all(part) for part in zip(*ranks, strict=True))
        own = Counter(name for step in together for *_, mismatched, name in step.elements() if not mismatched)
        assert own == Counter(name for step in whole for *_, mismatched, name in step if not mismatched)


def test_global_seed_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert train_rows(set_up(KTO, train=path)) == train_rows(set_up(KTO, train=path, seed=5))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert train_rows(set_up(KTO, train=path)) == train_rows(set_up(KTO, train=path, seed=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(tmp_path: Path, workers: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    data = set_up(KTO, train=path, batch_size=2, num_workers=workers)
    whole = train_rows(data, epoch=1)
    data.resume_at(1, 3)
    loader = data.train_dataloader()
    assert len(loader) == 5
    assert [rows(batch) for batch in loader] == whole[3:]
    assert [rows(batch) for batch in loader] == whole  # for one epoch only
    assert train_rows(data, epoch=1) == whole


# Checkpoints


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    options: dict[str, Any] = {"train": path, "batch_size": 4, "seed": 1}
    state = set_up(KTO, **options).state_dict()
    set_up(KTO, **options).load_state_dict(state)
    set_up(KTO, **{**options, "num_workers": 2}).load_state_dict(state)
    moved = write_jsonl(tmp_path / "b.jsonl", binary())
    set_up(KTO, **{**options, "train": moved}).load_state_dict(state)
    set_up(KTO, stage="test", test=path).load_state_dict(state)  # nothing is trained on
    other = write_jsonl(tmp_path / "c.jsonl", [*binary(9), {**binary()[9], "completion": "!"}])
    for change, name in (
        ({"train": other}, "training data"),
        ({"batch_size": 5}, r"batch_size \(saved 4, now 5\)"),
        ({"seed": 2}, r"seed \(saved 1, now 2\)"),
        ({"shuffle": False}, r"shuffle \(saved True, now False\)"),
        ({"max_length": 3}, "training data"),
    ):
        with pytest.raises(ValueError, match=f"other data or batches: {name}"):
            set_up(KTO, **{**options, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="objective's needs"):
        set_up(KTO | Needs(step_rewards=True), **options).load_state_dict(state)


# Errors and stages


def test_settings_are_checked() -> None:
    for name, value in (("batch_size", 0), ("eval_batch_size", 0), ("max_length", 1), ("num_workers", -1)):
        options: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=rf"data\.{name} is {value}; it must be at least"):
            FeedbackDataModule("a.jsonl", **options)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary(prompts=1))
    with pytest.raises(DataError, match=r"train data \(.*a\.jsonl\): .*same prompt"):
        set_up(KTO, train=path).train_dataloader()
    with pytest.raises(DataError, match=r"batch_size is 2.*3 ranks"):
        set_up(SFT, train=path, batch_size=2, world_size=3).train_dataloader()
    for stage, name in (
        ("fit", "train"),
        ("validate", "validation"),
        ("test", "test"),
        ("predict", "predict"),
    ):
        with pytest.raises(ValueError, match=rf"No {name} data: set data\.{name} to a file"):
            set_up(KTO, stage=stage, **({"validation": path} if name == "train" else {"train": path}))
    with pytest.raises(ValueError, match=r"data\.train lists .*a\.jsonl more than once"):
        FeedbackDataModule([path, path])
    messages = write_jsonl(
        tmp_path / "m.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "completion": "b", "label": 1}]
    )
    data = FeedbackDataModule(messages)
    data.connect(tokenizer=tiny_tokenizer(None), needs=KTO)
    with pytest.raises(DataError, match=r"m\.jsonl:1: .*no chat template"):
        data.setup("fit")


def test_each_source_is_read_once_and_found_again_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    real = store.build

    def counted(source: Any, *args: Any) -> None:
        built.append(source.path)
        real(source, *args)

    monkeypatch.setattr(store, "build", counted)
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    first = set_up(KTO, train=path, validation=path)
    assert built == [path]
    copy = write_jsonl(tmp_path / "copy.jsonl", binary())
    second = set_up(KTO, train=copy)
    assert built == [path]  # another file with the same bytes
    assert train_rows(second)[0][0][4].startswith(copy)  # its rows have its own name
    assert first._splits["train"].digest == second._splits["train"].digest
    write_jsonl(tmp_path / "a.jsonl", binary(11))
    set_up(KTO, train=path)
    assert built == [path, path]


class Recorder(LightningModule):
    """Keeps the names of the rows that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[str]]] = {"train": [], "validation": [], "test": []}

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch.row_ids)
        return self.weight * len(batch)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.seen["validation"].append(batch.row_ids)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.seen["test"].append(batch.row_ids)

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> list[str]:
        return [name for name, mismatched in zip(batch.row_ids, batch.labels.mismatched, strict=True) if not mismatched]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(**options: Any) -> Trainer:
    return quiet_trainer(**{"num_sanity_val_steps": 0, **options})


@pytest.mark.filterwarnings("ignore:.*does not have many workers|.*Couldn't infer the batch indices")
def test_every_stage_under_a_trainer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    data = connected(KTO, train=path, batch_size=4)
    alone = Recorder()
    run(max_epochs=2).fit(alone, data)  # without validation data
    assert len(alone.seen["train"]) == 6
    assert alone.seen["train"][:3] == [[row[4] for row in step] for step in train_rows(data)]
    assert alone.seen["train"][3:] == [[row[4] for row in step] for step in train_rows(data, epoch=1)]

    data = connected(KTO, train=path, validation=path, test=path, batch_size=4, eval_batch_size=3)
    module = Recorder()
    run(max_epochs=2).fit(module, data)
    assert module.seen["train"] == alone.seen["train"]
    names = [f"{path}:{i}" for i in range(1, 11)]
    epochs = module.seen["validation"][:4], module.seen["validation"][4:]
    assert epochs[0] == epochs[1]  # mismatches too, so that epochs can be compared
    assert [name for batch in epochs[0] for name in batch if " with " not in name] == names
    loader: Any = data.val_dataloader()
    loader.sampler.set_epoch(7)
    assert [batch.row_ids for batch in loader] == epochs[0]
    run().test(module, data, verbose=False)
    assert module.seen["test"] == epochs[0]
    predicted = run().predict(module, data)
    assert predicted is not None
    assert [name for batch in predicted for name in batch] == names


class Saver(Recorder):
    """Writes the names that this rank saw to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_end(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.seen))


@pytest.mark.slow
def test_two_processes_share_the_steps_of_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    options: dict[str, Any] = {"train": path, "validation": path, "batch_size": 3, "eval_batch_size": 4}
    whole = Recorder()
    run(max_epochs=2).fit(whole, connected(KTO, **options))
    spawned = run(max_epochs=2, devices=2, strategy="ddp_spawn")
    spawned.fit(Saver(tmp_path), connected(KTO, **options))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for stage in ("train", "validation"):
        together = [one + two for one, two in zip(ranks[0][stage], ranks[1][stage], strict=True)]
        assert sorted(together[0]) == sorted(whole.seen[stage][0])
        names = [name for step in together for name in step if " with " not in name]
        expected = [name for step in whole.seen[stage] for name in step if " with " not in name]
        assert sorted(names) == sorted(expected)  # nobody repeats a row and nobody misses one


def test_bad_data_are_refused_before_setup(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p"}])

    class Never(Recorder):
        def configure_model(self) -> None:
            raise AssertionError("a model was made before the data were read")

    with pytest.raises(DataError, match=r"a\.jsonl:1: the row lacks"):
        run(max_epochs=1).fit(Never(), connected(KTO, train=path))


def test_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halos_pl.data import report

    lines: list[str] = []
    monkeypatch.setattr(report, "rank_zero_info", lines.append)
    path = write_jsonl(tmp_path / "a.jsonl", [*binary(), {"prompt": "p", "completion": "z" * 99, "label": False}])
    set_up(SFT, train=path, validation=path, max_length=20)
    assert lines[0] == (
        f"train data {path}: 11 examples, 6 rows (6 desirable, 0 undesirable), 0 pairs; "
        "5 rows dropped: undesirable, which the objective does not use"
    )
    assert sum(" examples, " in line for line in lines) == 2  # one line per split


@pytest.mark.parametrize(
    ("needs", "said"), [(DPO, True), (replace(DPO, scores=True), False), (replace(KTO, groups=True), False)]
)
def test_scores_that_no_one_reads_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: Needs, said: bool
) -> None:
    from halos_pl.data import report

    lines: list[str] = []
    monkeypatch.setattr(report, "rank_zero_info", lines.append)
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "margin": 1.0} for i in range(4)]
    scored, plain = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", pairs())
    set_up(needs, train=[scored] if needs.scores else [scored, plain], validation=scored)
    assert [line.partition(": ")[0] for line in lines if "has scores" in line] == [f"train data {scored}"] * said


def test_real_data(shared_data: Path) -> None:
    path = str(shared_data / "feedback" / "hh_rlhf_train.jsonl.gz")
    data = set_up(KTO, train=path, batch_size=64, max_length=256)
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 128
    assert data.counts()["train"][path]["desirable"] == data.counts()["train"][path]["undesirable"] == 2898


# Bad rows, scores, transforms, mixtures, orders


def test_bad_rows_are_named_or_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halos_pl.data import report

    lines: list[str] = []
    monkeypatch.setattr(report, "rank_zero_info", lines.append)
    bad = [{"prompt": "p", "completion": "", "label": True}, {"prompt": "p", "completion": "c", "label": 7}]
    one = write_jsonl(tmp_path / "a.jsonl", [*binary(), *bad])
    two = write_jsonl(tmp_path / "b.jsonl", [*binary(3), bad[0]])
    with pytest.raises(DataError) as raised:
        set_up(KTO, train=[one, two])
    said = str(raised.value).splitlines()
    places = [f"{one}:11", f"{one}:12", f"{two}:4"]
    assert [line.partition(": ")[0] for line in said] == places
    data = set_up(KTO, train=[one, two], on_bad_rows="skip")
    counts = data.counts()["train"]
    assert [(counts[path]["examples"], counts[path]["faulty"]) for path in (one, two)] == [(10, 2), (3, 1)]
    assert any(f"train data {one}: 10 examples" in line and "2 faulty rows skipped" in line for line in lines)
    assert any(f"{one}:12: " in line for line in lines)
    with pytest.raises(DataError, match="no such file"):  # before any file is read
        set_up(KTO, train=[one, str(tmp_path / "absent.jsonl")])
    with pytest.raises(DataError, match="no such file"):  # nothing of it can be used, so there is nothing to skip
        set_up(KTO, train=str(tmp_path / "absent.jsonl"), on_bad_rows="skip")


def scored() -> list[dict[str, Any]]:
    return [{"prompt": f"p{i // 3}", "completion": f"c{i}", "score": float(i % 3)} for i in range(12)]


def test_scores_become_thumbs_at_the_prompts_mean_and_stay_scores(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", scored())
    data = set_up(KTO, train=path, batch_size=12)
    assert data.counts()["train"]["transforms"] == [
        {"transform": "ThresholdScores", "desirable": 4, "undesirable": 4, "dropped_at_threshold": 4}
    ]
    [step] = train_rows(data)
    judged = {int(row[1][1:-10]): row[2] for row in step if not row[3]}
    assert judged == {i: i % 3 == 2 for i in range(12) if i % 3 != 1}
    # A loss that compares the rows of a prompt reads the scores themselves: no row is dropped.
    [batch] = set_up(Needs(groups=True, undesirable=True), train=path, batch_size=12).train_dataloader()
    assert sorted(batch.labels.score.tolist()) == [-1.0] * 4 + [0.0] * 4 + [1.0] * 4  # less their prompt's mean
    assert torch.equal(batch.labels.score > 0, batch.labels.desirable)


def test_transforms_are_applied_in_order_and_those_of_studies_to_training_data_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", scored())
    data = set_up(KTO, train=path, validation=path, transforms=[ThresholdScores(at=1.0), FlipLabels(share=1.0)])
    assert [t["transform"] for t in data.counts()["train"]["transforms"]] == ["ThresholdScores", "FlipLabels"]
    assert [t["transform"] for t in data.counts()["validation"]["transforms"]] == ["ThresholdScores"]
    assert (data.counts()["train"][path]["desirable"], data.counts()["validation"][path]["desirable"]) == (4, 8)
    # A transform of labels finds labels, whatever the list says of scores.
    data = set_up(KTO, train=path, transforms=[FlipLabels(share=1.0)])
    assert [t["transform"] for t in data.counts()["train"]["transforms"]] == ["ThresholdScores", "FlipLabels"]


def test_pairs_are_made_of_scores_where_they_are_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", scored())
    with pytest.raises(DataError, match=r"the transform Pair"):
        set_up(DPO, train=path)
    [step] = train_rows(set_up(DPO, train=path, transforms=[Pair()], batch_size=4))
    assert sorted(row[1][1:-10] for row in step if row[2]) == ["11", "2", "5", "8"]
    assert sorted(row[1][1:-10] for row in step if not row[2]) == ["0", "3", "6", "9"]


def test_a_mixture_has_its_sources_by_weight(tmp_path: Path) -> None:
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", binary(10)) for name in "ab")
    data = set_up(KTO, train=[Source(a, weight=0.5), Source(b, weight=2.0)], batch_size=5)
    for epoch in range(3):
        own = [row[4] for step in train_rows(data, epoch) for row in step if not row[3]]
        assert Counter(name.rpartition("/")[2][0] for name in own) == {"a": 5, "b": 20}
        assert max(Counter(own).values()) == 2
    settings: list[Any] = [{"path": a, "weight": 0.5}, {"path": b, "weight": 2.0}]
    assert FeedbackDataModule(settings).sources == data.sources
    for wrong, said in (
        ({"path": a, "weight": 0}, "weight is 0"),
        ({"path": a, "wieght": 1}, r"data\.train has no setting wieght; a source takes path, split"),
        ({"weight": 1}, "path"),
        ({"path": a, "weight": "much"}, r"data\.train: .*weight.*much"),
    ):
        with pytest.raises(ValueError, match=said):
            FeedbackDataModule([wrong])


def test_pairs_may_stay_together_under_an_objective_that_does_not_compare_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(8))
    data = set_up(KTO, train=path, keep_together="pairs", batch_size=2)
    for batch in data.train_dataloader():
        own = (~batch.labels.mismatched).nonzero().squeeze(1)
        assert len(own) == 4
        assert torch.equal(batch.labels.pair[batch.labels.pair[own]], own)
        assert torch.equal(batch.labels.group[own], batch.labels.group[batch.labels.pair[own]])
    together = set_up(KTO, train=write_jsonl(tmp_path / "b.jsonl", binary(12, prompts=4)), keep_together="prompts")
    [batch] = together.train_dataloader()
    assert len(batch) == 24


def test_classes_are_balanced_and_lengths_grouped(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c" * (1 + i * 7 % 50), "label": i < 30} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    balanced = set_up(KTO, train=path, balance_classes=True, batch_size=8)
    for batch in balanced.train_dataloader():
        assert abs(int(batch.labels.desirable[~batch.labels.mismatched].sum()) - 6) <= 1
    grouped = set_up(SFT | Needs(undesirable=True), train=path, group_by_length=True, batch_size=8)
    spans = []
    for batch in grouped.train_dataloader():
        lengths = [len(batch.prompts[p]) + len(c) for p, c in zip(batch.prompt, batch.completions, strict=True)]
        spans.append(max(lengths) - min(lengths))
    assert sum(spans) <= 55
    both = set_up(KTO, train=path, balance_classes=True, group_by_length=True, batch_size=8)
    seen = [name for step in train_rows(both) for *_, mismatched, name in step if not mismatched]
    assert len(set(seen)) == len(seen) == 40


def test_data_of_one_class_and_of_one_row_have_a_defined_behaviour(tmp_path: Path) -> None:
    bad_only = write_jsonl(tmp_path / "bad.jsonl", [row | {"label": False} for row in binary(4)])
    [step] = train_rows(set_up(KTO, train=bad_only, batch_size=4))
    assert len(step) == 8
    one = write_jsonl(tmp_path / "one.jsonl", binary(1))
    [step] = train_rows(set_up(Needs(reference=True, undesirable=True), train=one))
    assert len(step) == 1
    with pytest.raises(DataError, match=r"one\.jsonl.*all 1 rows have the same prompt"):
        set_up(KTO, train=one)
    pair = write_jsonl(tmp_path / "pair.jsonl", pairs(1))
    [step] = train_rows(set_up(DPO, train=pair))
    assert len(step) == 2


def test_a_data_set_of_the_hub_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []

    def load(path: str, name: Any = None, **options: Any) -> Any:
        asked.append({"path": path, **options})
        found = datasets.Dataset.from_list(binary(50))
        return found.to_iterable_dataset() if options.get("streaming") else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = set_up(KTO, train=Source("owner/feedback", split="train", rows=20, streaming=True), batch_size=4)
    counts = data.counts()["train"]["owner/feedback[train]"]
    assert counts["rows"] == 20
    assert asked[-1]["streaming"] is True
    names = [name for step in train_rows(data) for *_, mismatched, name in step if not mismatched]
    assert sorted(names)[0] == "owner/feedback[train]:1"


def test_large_scores_keep_their_differences_and_larger_ones_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 3}", "completion": f"c{i}", "score": 1_700_000_000 + i % 3} for i in range(6)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    [batch] = set_up(Needs(groups=True, undesirable=True), train=path, batch_size=6).train_dataloader()
    assert sorted(batch.labels.score.tolist()) == [-1.0] * 2 + [0.0] * 2 + [1.0] * 2
    path = write_jsonl(tmp_path / "b.jsonl", [*rows, {"prompt": "p0", "completion": "c", "score": 1e39}])
    with pytest.raises(DataError, match=r"b\.jsonl:\d: the score .* float32"):
        set_up(Needs(groups=True, undesirable=True), train=path)


def test_scores_become_labels_once_before_the_first_transform_that_wants_labels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", scored())

    def names(**options: Any) -> list[str]:
        return [t["transform"] for t in set_up(KTO, train=path, **options).counts()["train"]["transforms"]]

    own = ThresholdScores(at=1.0)
    assert names(one_completion_per_prompt=True, transforms=[own]) == ["ThresholdScores", "OnePerPrompt"]
    assert names(transforms=[own, FlipLabels(share=0.5)]) == ["ThresholdScores", "FlipLabels"]
    assert names(transforms=[Pair(), FlipLabels(share=0.5)]) == ["Pair", "FlipLabels"]
    with pytest.raises(ValueError, match=r"data\.transforms: ThresholdScores .*FlipLabels"):
        FeedbackDataModule(path, transforms=[FlipLabels(share=0.5), own])

    class Odd(FlipLabels):
        def __call__(self, table: Any, draw: Any) -> Any:
            return table

    with pytest.raises(ValueError, match=r"data\.transforms: Odd returned Table, not \(Table, counts\)"):
        set_up(KTO, train=path, transforms=[Odd(share=0.0)])


def test_weights_are_of_training_data(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    with pytest.raises(ValueError, match=r"data\.validation has a source with a weight"):
        FeedbackDataModule(path, [{"path": path, "weight": 0.5}])
    with pytest.raises(DataError, match=r"weight 0\.01 leaves none of the 10 examples"):
        set_up(KTO, train={"path": path, "weight": 0.01})
    for wrong in ("", float("inf")):
        with pytest.raises(ValueError, match=r"empty path|weight is inf"):
            FeedbackDataModule(wrong if wrong == "" else {"path": path, "weight": wrong})


def test_a_folder_or_a_pattern_of_files_is_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("part-0", "part-1"):
        write_jsonl(tmp_path / f"{name}.jsonl", binary(4))
    (tmp_path / "README.md").write_text("no data")
    wanted = [str(tmp_path / f"part-{i}.jsonl") for i in (0, 1)]
    for given in (str(tmp_path), f"{tmp_path}/part-*.jsonl"):
        assert [source.path for source in FeedbackDataModule(given).sources["train"]] == wanted
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("~/part-0.jsonl", "$HOME/part-0.jsonl"):
        assert [source.path for source in FeedbackDataModule(given).sources["train"]] == wanted[:1]


def test_faults_of_a_copy_name_the_copy_and_skipped_ones_are_in_the_summary(tmp_path: Path) -> None:
    rows = [*binary(), {"prompt": "p", "completion": "", "label": True}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    for name in ("a", "copy"):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        with pytest.raises(DataError, match=rf"{name}\.jsonl:11: column 'completion' is empty"):
            set_up(KTO, train=path)
        faults = set_up(KTO, train=path, on_bad_rows="skip").counts()["train"][path]["faults"]
        assert len(faults) == 1
        assert faults[0].startswith(f"{path}:11: ")


@pytest.mark.parametrize("damage", ["rows", "tokens", "prompts", "meta.json", "cut meta.json", "no tokens"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary(30))
    wanted = train_rows(set_up(KTO, train=path, cache_dir=str(tmp_path / "cache")))
    [folder] = [place for place in (tmp_path / "cache").iterdir() if place.is_dir()]
    if damage == "no tokens":
        (folder / "tokens").unlink()
    elif damage == "meta.json":
        (folder / damage).unlink()
    else:
        file = folder / damage.removeprefix("cut ")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert train_rows(set_up(KTO, train=path, cache_dir=str(tmp_path / "cache"))) == wanted
    assert "damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache folder .*file cannot be written .*data\.cache_dir or HALOS_CACHE"):
        set_up(KTO, train=write_jsonl(tmp_path / "a.jsonl", binary()), cache_dir=str(tmp_path / "file"))


def test_a_store_travels_to_a_worker_as_its_place(tmp_path: Path) -> None:
    data = set_up(KTO, train=write_jsonl(tmp_path / "a.jsonl", binary(500)))
    [stored] = data.stores("train")
    sent = pickle.dumps(stored)
    assert len(sent) < 500
    assert pickle.loads(sent).digest == stored.digest
    assert isinstance(pickle.loads(sent).tokens, np.memmap)


# Rows of several kinds, several models, cut prompts


def test_scores_and_labels_are_never_compared_with_each_other(tmp_path: Path) -> None:
    scored_file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "great", "score": 10}])
    labelled = [{"prompt": "q", "completion": f"{kind}{i}", "label": kind == "good"} for i, kind in enumerate(KINDS)]
    other = write_jsonl(tmp_path / "b.jsonl", labelled)
    data = set_up(DPO, train=[scored_file, other], transforms=[Pair()])
    [step] = train_rows(data)
    assert [(row[1], row[2]) for row in step] == [("good0<|im_end|>", True), ("awful1<|im_end|>", False)]
    assert data.counts()["train"]["transforms"][0]["dropped_without_partner"] == 1
    # The same of a loss that compares scores: where one lacks, the labels are what it sees.
    rows = [{"prompt": "q", "completion": f"c{i}", "label": i < 2, "score": s} for i, s in enumerate((8, 10, None))]
    rows += [{"prompt": "r", "completion": f"c{i}", "label": i < 1, "score": s} for i, s in enumerate((8, 10))]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    [batch] = set_up(Needs(groups=True, undesirable=True), train=path).train_dataloader()
    found = {
        (text(batch.prompts[int(batch.prompt[i])]), text(batch.completions[i])[:2]): float(batch.labels.score[i])
        for i in range(len(batch))
    }
    assert found == {("q", "c0"): 1, ("q", "c1"): 1, ("q", "c2"): 0, ("r", "c0"): -1, ("r", "c1"): 1}


KINDS = ("good", "awful")


def test_votes_against_each_other_on_one_completion_make_no_pair(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": c, "label": label} for c, label in (("a", 1), ("a", 0), ("b", 0))]
    data = set_up(DPO, train=write_jsonl(tmp_path / "a.jsonl", rows), transforms=[Pair(which="all")])
    [step] = train_rows(data)
    assert [row[1][0] for row in step] == ["a", "b"]


def test_pairs_that_a_threshold_puts_on_one_side_are_pairs_no_longer(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "chosen": "good", "rejected": "ok", "score_chosen": high, "score_rejected": low}
        for i, (high, low) in enumerate(((9, 7), (2, 1), (9, 1)))
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    relabel = ThresholdScores(at=5, relabel=True)
    with pytest.raises(DataError, match=r"a\.jsonl:\d+.*no pair"):
        set_up(DPO, train=path, transforms=[relabel])
    data = set_up(KTO, train=path, transforms=[relabel], keep_together="pairs")
    [batch] = data.train_dataloader()
    assert int((batch.labels.pair >= 0).sum()) == 2
    assert data.counts()["train"]["transforms"][0]["unpaired"] == 2


def test_another_model_gets_its_own_tokens(tmp_path: Path) -> None:
    chat = [{"prompt": [{"role": "user", "content": f"hi{i}"}], "completion": "c", "label": i > 0} for i in range(2)]
    data = set_up(SFT, train=write_jsonl(tmp_path / "a.jsonl", chat))
    before = train_rows(data)
    template = "{% for m in messages %}## {{ m.content }}<|im_end|>{% endfor %}"
    data.connect(tokenizer=tiny_tokenizer(template), needs=SFT)
    data.setup("fit")
    assert {row[0][:2] for step in train_rows(data) for row in step} == {"##"}
    assert {row[0][:2] for step in before for row in step} == {"<|"}


def test_sources_of_different_weights_do_not_share_a_prompt_that_stays_together(tmp_path: Path) -> None:
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", binary(4, prompts=2)) for name in "ab")
    sources: list[Any] = [Source(a), Source(b, weight=3)]
    with pytest.raises(DataError, match=r"[ab]\.jsonl:1 and .*\.jsonl:\d come together.*different weights"):
        set_up(Needs(groups=True, undesirable=True), train=sources)
    set_up(KTO, train=sources)


def test_a_folder_of_several_splits_is_no_training_set(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}-00000.jsonl", binary())
    with pytest.raises(ValueError, match=r"several splits \(train, test\)"):
        set_up(KTO, train=str(tmp_path))
    assert len(train_rows(set_up(KTO, train=str(tmp_path / "train*.jsonl"), batch_size=16))) == 1
    (tmp_path / "one").mkdir()  # one file whose name has both words is one split
    write_jsonl(tmp_path / "one" / "eval_prompts_train.jsonl", binary())
    set_up(KTO, train=str(tmp_path / "one"))


def test_a_checkpoint_knows_what_mismatched_prompts_were_cut_to(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    saved = set_up(KTO, train=path, max_length=60).state_dict()
    with pytest.raises(ValueError, match="max_length"):
        set_up(KTO, train=path, max_length=200).load_state_dict(saved)
    path = write_jsonl(tmp_path / "b.jsonl", pairs())
    set_up(DPO, train=path, max_length=200).load_state_dict(set_up(DPO, train=path, max_length=60).state_dict())


def test_a_cut_prompt_keeps_its_first_special_token() -> None:
    prompts = [[1, *range(10, 30)], [2, *range(10, 30)]]
    rows = [TokenizedRow(i, 8, [5], True, f"r{i}") for i in range(2)]
    data = StepDataset(prompts, rows, [(0,), (1,)], max_length=9, prefix=[1])
    batch = data[Step(0, 0, (0, 1))]
    assert [p.tolist() for p in batch.prompts] == [[1, *range(23, 30)], [*range(22, 30)]]


def test_a_template_that_writes_the_date_is_pointed_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary())
    data = set_up(SFT, train=path)
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    data.connect(tokenizer=tiny_tokenizer(template), needs=SFT)
    with pytest.warns(UserWarning, match="chat template writes .*date"):
        data.setup("fit")


@pytest.mark.parametrize("needs", [KTO, Needs(groups=True, undesirable=True)])
def test_pairs_beside_single_rows_stay_pairs(tmp_path: Path, needs: Needs) -> None:
    """Held out always, for they are measured as pairs; in training where that is asked for."""
    two = [write_jsonl(tmp_path / "pairs.jsonl", pairs(3)), write_jsonl(tmp_path / "thumbs.jsonl", binary(4))]
    data = set_up(needs, train=two, validation=two, batch_size=9)
    loaders: list[Any] = [data.train_dataloader(), data.val_dataloader()]
    assert [int((batch.labels.pair >= 0).sum()) for [batch, *_] in loaders] == [0, 6]
    assert data.counts()["validation"][two[0]]["pairs"] == 3
    [batch] = set_up(needs, train=two, keep_together="pairs", batch_size=9).train_dataloader()
    own = batch.labels.pair[~batch.labels.mismatched]
    assert (len(own), int((own >= 0).sum())) == (10, 6)


def test_prompts_stay_together_also_where_the_objective_wants_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 3}", "chosen": f"good{i}", "rejected": f"bad{i}"} for i in range(9)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for batch in set_up(DPO, train=path, keep_together="prompts", batch_size=1).train_dataloader():
        assert (len(batch), len(set(batch.labels.group.tolist())), int((batch.labels.pair < 0).sum())) == (6, 1, 0)


@pytest.mark.parametrize("needs", [KTO, DPO, SFT])
def test_no_row_is_longer_than_the_data_say(tmp_path: Path, needs: Needs) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{**row, "prompt": row["prompt"] * (i + 1)} for i, row in enumerate(pairs())]
    )
    for most in (24, 64, 512):
        data = set_up(needs, train=path, max_length=most, control_tokens=None if needs.mismatched else ControlTokens())
        lengths = [
            len(batch.prompts[int(p)]) + len(completion)
            for batch in data.train_dataloader()
            for p, completion in zip(batch.prompt, batch.completions, strict=True)
        ]
        assert max(lengths) <= data.longest <= most
        assert needs.mismatched or max(lengths) == data.longest


@pytest.mark.parametrize(("size", "batch_size", "world_size"), [(10, 3, 2), (10, 4, 3), (5, 1, 2), (2, 4, 3)])
def test_held_out_batches_are_those_of_one_device(tmp_path: Path, size: int, batch_size: int, world_size: int) -> None:
    """Mismatched rows included; a rank may have no row of a batch."""
    train = write_jsonl(tmp_path / "a.jsonl", binary())
    path = write_jsonl(tmp_path / "b.jsonl", binary(size))

    def batches(**share: int) -> list[list[str]]:
        data = set_up(KTO, train=train, validation=path, eval_batch_size=batch_size, **share)
        return [batch.row_ids for batch in data.val_dataloader()]

    ranks = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [sorted(name for part in parts for name in part) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in batches()]
    assert not all(all(parts) for parts in zip(*ranks, strict=True))


@pytest.mark.parametrize(("size", "merged"), [(10, 0), (9, 1)])
def test_a_merged_step_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int, merged: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", binary(size))
    with caplog.at_level("INFO"):
        data = set_up(KTO, train=path, validation=path, batch_size=4, world_size=2)
        list(data.train_dataloader())
    lines = [line for line in caplog.messages if "left over" in line]
    assert len(lines) == merged
    assert all(line.startswith("train data") and "1 of 9 examples" in line for line in lines)
