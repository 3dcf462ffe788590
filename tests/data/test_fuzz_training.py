"""Whatever a file holds, a run of it ends in finite losses or in an error that names the file; no row is lost."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_modules import set_up
from fuzz_cases import LIMITS, Case, cases
from hypothesis import event, given, settings
from hypothesis import strategies as st
from run_halos import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from halos_pl.batch import LogProbBatch, TokenBatch
from halos_pl.data import DataError
from halos_pl.objective.build import load_objective
from halos_pl.objective.halo import Objective
from halos_pl.policy.logprobs import completion_mask, padded_logps
from halos_pl.testing import tiny_tokenizer

_numbers = itertools.count()
options = st.fixed_dictionaries(
    {
        "objective": st.sampled_from(["kto", "kto", "dpo", "sft", "grpo", "bco"]),
        "on_bad_rows": st.sampled_from(["skip", "skip", "error"]),
        "batch_size": st.integers(1, 4),
        "max_length": st.sampled_from([2, 8, 64]),
        "truncate_completions": st.booleans(),
        "balance_classes": st.booleans(),
        "group_by_length": st.booleans(),
    }
)
# Sound rows, so that what follows them in a file is met by a run and not only by the reader.
SOUND: dict[str, Callable[[int], dict[str, Any]]] = {
    "unpaired": lambda i: {"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0},
    "paired": lambda i: {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
    "scored": lambda i: {"prompt": f"q{i // 3}", "completion": f"a{i}", "score": i % 3},
}


@st.composite
def files(draw: st.DrawFn) -> Case:
    case = draw(cases())
    kind = draw(st.sampled_from([None, *SOUND, *SOUND]))
    if kind is None or case.name != "a.jsonl" or case.content is None:
        return case
    count = draw(st.integers(1, 9))
    lines = "".join(json.dumps(SOUND[kind](i)) + "\n" for i in range(count))
    return Case(case.name, lines.encode() + case.content, None if case.rows is None else case.rows + count)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def loss(objective: Objective, model: Any, batch: TokenBatch) -> torch.Tensor:
    logps = padded_logps(model, batch)
    return objective(
        LogProbBatch(logps, logps.detach() - 0.1 * (logps.detach() != 0), completion_mask(batch), batch.labels)
    ).loss


def check(case: Case, chosen: dict[str, Any], model: Any, folder: Path) -> None:
    path = folder / case.name
    if case.content is None:
        path.mkdir()
    else:
        path.write_bytes(case.content)
    asked = dict(chosen)
    objective = load_objective(ROOT / f"experiments/objectives/{asked.pop('objective')}.yaml")
    refused: list[str] = []
    try:
        data = set_up(objective.needs, train=str(path), cache_dir=str(folder / "cache"), seed=0, **asked)
    except DataError as error:
        refused.append(str(error))
    if refused:
        event("refused")
        assert str(path) in refused[0]
        return
    event("trained")
    counts = data.counts()["train"][str(path)]
    assert chosen["on_bad_rows"] == "skip" or counts["faulty"] == 0
    trained = 0
    for batch in data.train_dataloader():
        trained += int((~batch.labels.mismatched).sum())
        value = loss(objective, model, batch)
        assert bool(value.isfinite())
        if value.requires_grad:
            model.zero_grad()
            value.backward()
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert trained == counts["rows"] > 0
    assert counts["desirable"] + counts["undesirable"] == counts["rows"]
    if case.rows is not None:  # every row of the file is accounted for; one may hold several examples
        assert counts["examples"] + counts["faulty"] + sum(counts["skipped"].values()) >= case.rows


def _fuzz(case: Case, chosen: dict[str, Any], model: Any, base: Path) -> None:
    folder = base / f"train{next(_numbers)}"
    folder.mkdir()
    check(case, chosen, model, folder)
    shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore")
@given(case=files(), chosen=options)
@settings(LIMITS, max_examples=30)
def test_any_file_trains_or_is_refused(
    case: Case, chosen: dict[str, Any], model: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _fuzz(case, chosen, model, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@given(case=files(), chosen=options)
@settings(LIMITS, max_examples=5000)
def test_any_of_5000_files_trains_or_is_refused(
    case: Case, chosen: dict[str, Any], model: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _fuzz(case, chosen, model, tmp_path_factory.getbasetemp())
