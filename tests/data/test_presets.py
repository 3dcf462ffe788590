"""The presets name data sets of the hub, and rows with the hub's columns are read as they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from jsonargparse import ArgumentParser

from halos_pl.data.example import Example, Fault, Skipped
from halos_pl.data.read import read
from halos_pl.data.source import Source

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "data"
ASKED, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
WORSE = {"role": "assistant", "content": "no"}
DIALOGUE = "\n\nHuman: hi\n\nAssistant:"


def _message(name: str, parent: str | None, role: str, rank: int | None) -> dict[str, Any]:
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50", "text": name,
        "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
        "synthetic": False, "model_name": None, "detoxify": {"toxicity": 0.0004}, "message_tree_id": "hi",
        "tree_state": "ready_for_export", "emojis": {"name": ["+1"], "count": [10]},
        "labels": {"name": ["quality"], "value": [0.9], "count": [3]},
    }  # fmt: skip


ROWS: dict[str, list[dict[str, Any]]] = {
    "Anthropic/hh-rlhf": [{"chosen": DIALOGUE + " yo", "rejected": DIALOGUE + " no"}],
    "stanfordnlp/SHP": [
        {
            "post_id": "qt3nxl", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": "hi",
            "c_root_id_A": "a", "c_root_id_B": "b", "created_at_utc_A": 1636822112, "created_at_utc_B": 1636822110,
            "score_A": 340, "score_B": 166, "human_ref_A": "yo", "human_ref_B": "no", "labels": 1,
            "seconds_difference": 2.0, "score_ratio": 2.0482,
        }
    ],
    "OpenAssistant/oasst1": [
        _message("hi", None, "prompter", None),
        _message("yo", "hi", "assistant", 0),
        _message("no", "hi", "assistant", 1),
        _message("so", "yo", "prompter", None),
    ],
    "HuggingFaceH4/ultrafeedback_binarized": [
        {
            "prompt": "hi", "prompt_id": "f0e37e9f", "chosen": [ASKED, ANSWER], "rejected": [ASKED, WORSE],
            "messages": [ASKED, ANSWER], "score_chosen": 8.5, "score_rejected": 7.0,
        }
    ],
    "openbmb/UltraFeedback": [
        {
            "source": "sharegpt", "instruction": "hi", "models": ["alpaca-7b", "bard"],
            "completions": [
                {
                    "annotations": {"helpfulness": {"Rating": "4", "Rationale": "r"}}, "critique": "c",
                    "custom_system_prompt": "s", "fine-grained_score": 4.0, "model": "bard", "overall_score": score,
                    "principle": "helpfulness", "response": text,
                }
                for text, score in (("yo", 8.5), ("no", 7.0))
            ],
            "correct_answers": ["None"], "incorrect_answers": ["None"],
        }
    ],
    "trl-lib/kto-mix-14k": [
        {"prompt": [ASKED], "completion": [ANSWER], "label": True},
        {"prompt": [ASKED], "completion": [WORSE], "label": False},
    ],
}  # fmt: skip

EXPECTED: dict[str, list[tuple[Any, ...]]] = {
    "Anthropic/hh-rlhf": [([ASKED], ([ANSWER], [WORSE]), (True, False), (None, None))],
    "stanfordnlp/SHP": [("hi", ("yo", "no"), (True, False), (340.0, 166.0))],
    "OpenAssistant/oasst1": [([ASKED], ([ANSWER],), (None,), (0.0,)), ([ASKED], ([WORSE],), (None,), (-1.0,))],
    "HuggingFaceH4/ultrafeedback_binarized": [([ASKED], ([ANSWER], [WORSE]), (True, False), (8.5, 7.0))],
    "openbmb/UltraFeedback": [("hi", ("yo", "no"), (None, None), (8.5, 7.0))],
    "trl-lib/kto-mix-14k": [([ASKED], ([ANSWER],), (True,), (None,)), ([ASKED], ([WORSE],), (False,), (None,))],
}


def _sources(name: str) -> dict[str, list[Source]]:
    """As the command line reads them."""
    content = yaml.safe_load((FOLDER / name).read_text())
    assert set(content) == {"data"}
    parser = ArgumentParser()
    for split in ("train", "validation"):
        parser.add_argument(f"--{split}", type=str | Source | list[str | Source])
    read_in = parser.instantiate_classes(parser.parse_object(content["data"]))
    return {k: v if isinstance(v, list) else [v] for k in ("train", "validation") for v in [read_in[k]]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("preset", ["hh", "shp", "oasst", "ultrafeedback", "kto_mix"])
def test_presets(preset: str, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, **settings: Any) -> Any:
        asked.append((path, settings["data_dir"], settings["split"]))
        data = datasets.Dataset.from_list(ROWS[path])
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = _sources(f"{preset}.yaml")
    for source in [*sources["train"], *sources["validation"]]:
        assert isinstance(source, Source)
        items = list(read(source))
        assert not [item for item in items if isinstance(item, Fault)]
        found = [(e.prompt, e.completions, e.labels, e.scores) for e in items if isinstance(e, Example)]
        assert found == EXPECTED[source.path]
        assert len(found) + sum(isinstance(item, Skipped) for item in items) == len(ROWS[source.path])
    assert len(set(asked)) == len(sources["train"]) + len(sources["validation"])  # training and held-out data differ


def test_ultrafeedback_with_all_four_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the preset's comment names."""
    path = "openbmb/UltraFeedback"
    assert path in (FOLDER / "ultrafeedback.yaml").read_text()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS[path]))
    [found] = read(Source(path, split="train"))
    assert isinstance(found, Example)
    assert (found.prompt, found.completions, found.labels, found.scores) == EXPECTED[path][0]


def test_no_preset_was_forgotten() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == ["hh", "kto_mix", "oasst", "shp", "ultrafeedback"]
