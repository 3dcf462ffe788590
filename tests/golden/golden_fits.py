"""Fits whose figures are kept in ``steps.json`` and ``tokens.json``, so that a redesign can be held to them.

Write those files anew, in about ten minutes, only where numbers are meant to change, and say why in the commit::

    PYTHONPATH=tests python tests/golden/golden_fits.py

Everything a fit reads is made here: a tiny model and its tokenizer (``halos_pl.testing``), and rows of every schema.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from run_halos import EXAMPLES, OBJECTIVES, SHORTCUTS, fit, metrics, run_ranks, write_data

HERE = Path(__file__).parent

STEPS = 3
WAYS: dict[str, tuple[str, ...]] = {
    "live": (),
    "stored": ("--model.reference_store=true",),
    "lora": ("--model.policy.lora.r=4",),
    "micro": ("--model.micro_batch_rows=2",),
    "ranks": (),
}
CELLS = [f"{objective}/{way}" for objective in OBJECTIVES for way in WAYS]
FILES = {"steps": HERE / "steps.json", "tokens": HERE / "tokens.json"}

USER, BOT, OTHER = (
    {"role": r, "content": c} for r, c in (("user", "2 + 2?"), ("assistant", "It is 4."), ("assistant", "Bread."))
)
CONVERSATION = [{"role": "system", "content": "be brief"}, USER, BOT, {"role": "user", "content": "Are you sure?"}]


def from_value(role: str, text: str) -> dict[str, str]:
    """A turn as ShareGPT writes it."""
    return {"from": role, "value": text}


# Rows of each schema, as text and as messages where both are published.
SCHEMAS: dict[str, list[dict[str, Any]]] = {
    "unpaired": [
        {"prompt": "2 + 2? ", "completion": "4, or so", "label": True},
        {"prompt": CONVERSATION, "completion": [OTHER], "label": False},
    ],
    "paired": [
        {"prompt": "2 + 2? ", "chosen": "4", "rejected": "5, I am sure"},
        {"prompt": CONVERSATION, "chosen": [BOT], "rejected": [OTHER]},
    ],
    "triple": [{"prompt": "2 + 2? ", "chosen": "4", "rejected": "5, I am sure", "reference": "It is 4."}],
    "implicit": [{"chosen": [*CONVERSATION, BOT], "rejected": [*CONVERSATION, OTHER]}],
    "halos_binary": [
        {"prompt_id": 0, "prompt": [USER], "output": [BOT], "label": 1, "reward": 0.5, "type": "binary_feedback"}
    ],
    "halos_pairwise": [
        {
            "prompt": [USER], "output_A": [OTHER], "output_B": [BOT], "label": 0, "reward_A": 0.1, "reward_B": 0.7,
            "type": "pairwise_feedback",
        }
    ],
    "messages": [{"messages": [*CONVERSATION, BOT], "label": False}],
    "sharegpt_pair": [
        {
            "conversations": [from_value("human", "2 + 2?")],
            "chosen": from_value("gpt", "4"), "rejected": from_value("gpt", "5"),
        }
    ],
    "messages_pair": [{"messages": CONVERSATION, "chosen": [BOT], "rejected": [OTHER]}],
    "sharegpt": [{"conversations": [from_value("human", "2 + 2?"), from_value("gpt", "4")], "kto_tag": True}],
    "scored": [
        {"prompt": "2 + 2? ", "completion": "4", "score": 0.25}, {"prompt": "2 + 2? ", "completion": "5", "score": 0},
    ],
    "scored_lists": [{"prompt": "2 + 2? ", "completions": ["4", "5", "6"], "scores": [1, 2.5, 0]}],
    "ultrafeedback": [
        {
            "source": "flan", "instruction": "2 + 2?", "models": ["m", "n"], "correct_answers": ["None"],
            "completions": [
                {"model": "m", "response": "4", "overall_score": 8.5, "fine-grained_score": 4.25, "critique": "Good."},
                {"model": "n", "response": "5", "overall_score": 2, "fine-grained_score": 2.0, "critique": "Bad."},
            ],
        }
    ],
    "shp": [
        {
            "post_id": "x", "domain": "askculinary_train", "history": "bread?", "human_ref_A": "wait",
            "human_ref_B": "an hour", "labels": 1, "score_A": 340, "score_B": 166, "score_ratio": 2.05,
        }
    ],
    "pandalm": [
        {"idx": 0, "instruction": "add", "input": "2, 2", "response1": "4", "response2": "5", "annotator1": 1}
    ],
    "oasst": [
        {"message_id": "a", "parent_id": None, "text": "2 + 2?", "role": "prompter", "rank": None, "deleted": False},
        {"message_id": "b", "parent_id": "a", "text": "4", "role": "assistant", "rank": 0, "deleted": False},
        {"message_id": "c", "parent_id": "a", "text": "5", "role": "assistant", "rank": 1, "deleted": False},
    ],
}  # fmt: skip


def machine() -> str:
    """What decides whether floats are equal bit for bit: the processor's instructions, torch, the threads."""
    info = Path("/proc/cpuinfo")
    flags = (
        next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""
    )
    parts = (platform.machine(), platform.processor(), flags, torch.__version__, str(torch.get_num_threads()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


#: The objectives that take single rows, all rows of a prompt, or scores; the others take pairs.
ROWS = {name for name in OBJECTIVES if name.startswith("kto")} | {
    *("apo_zero_unpaired", "bco", "csft", "humanline_kto", "npo", "ppo_clip", "sft", "simnpo", "unlikelihood"),
}
GROUPS = ("cispo", "dppo_tv", "fipo", "gmpo", "grpo", "gspo", "humanline_grpo", "luspo", "real", "sapo", "vespo")
SCORED = ("astar_po", "dro", "infonca", "plackett_luce", "qrpo")
KIND = (
    dict.fromkeys(OBJECTIVES, "pairs")
    | dict.fromkeys(ROWS, "rows")
    | dict.fromkeys(GROUPS, "groups")
    | dict.fromkeys(SCORED, "scored")
    | dict.fromkeys(("madpo", "rebel"), "scored_pairs")
    | {"tpo": "triples"}
)


def step(cell: str, model: Path, folder: Path) -> dict[str, Any]:
    """What three steps of a cell of the grid give. ``folder`` is empty, and holds the caches."""
    from halos_pl.cli.main import main

    objective, way = cell.split("/")
    kind = KIND[objective]
    words = fit(
        model,
        objective,
        f"[{','.join(write_data(folder, seed=7)[kind])}]",
        folder / "run",
        f"--data.batch_size={EXAMPLES[kind]}",
        "--data.seed=1",
        f"--trainer.max_steps={STEPS}",
        "--trainer.max_epochs=9",
        # What is only rounding stays small: AdamW would divide it by its own size.
        "--model.optimizer.class_path=torch.optim.SGD",
        "--model.optimizer.init_args={lr: 0.05, weight_decay: 0.0}",
        "--model.lr_schedule=constant_with_warmup",
        "--model.warmup_ratio=0",
        *WAYS[way],
        *recording(folder),
    )
    if way == "ranks":
        for ended in run_ranks(words, folder):
            assert ended.status == 0, ended
    else:
        main(words)
    found: dict[str, Any] = json.loads((folder / "golden.json").read_text())
    lines = metrics(folder / "run")
    batches = [found.pop("batches")]
    batches += [json.loads(path.read_text())["batches"] for path in sorted(folder.glob("golden.json.*"))]
    return {
        "loss": [float(line["loss"]) for line in lines],
        "z0": [float(line["outcome/z0"]) if "outcome/z0" in line else None for line in lines],
        **found,
        "rows": hashlib.sha256(json.dumps(batches).encode()).hexdigest()[:16],
    }


def recording(folder: Path) -> tuple[str, ...]:
    """The options that have a fit write ``folder / "golden.json"``."""
    return ("--trainer.callbacks+=golden.recorder.Golden", f"--trainer.callbacks.path={folder}/golden.json")


def tokens(model: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By schema the tokens of its rows, as a fit over the files of all schemas trains on them."""
    from halos_pl.cli.main import main

    files = {schema: folder / f"{schema}.jsonl" for schema in SCHEMAS}
    for schema, path in files.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in SCHEMAS[schema]), encoding="utf-8")
    words = fit(model, "apo_zero_unpaired", f"[{','.join(map(str, files.values()))}]", folder / "run")
    main([*words, "--trainer.max_steps=1", "--data.batch_size=99", *recording(folder)])
    [batch] = json.loads((folder / "golden.json").read_text())["batches"]
    # By name, as the place of the other completion depends on what else is in the step.
    named = [row | {"pair": batch[row["pair"]]["row"] if row["pair"] >= 0 else None} for row in batch]
    ordered = sorted(named, key=lambda row: row["row"])
    return {schema: [row for row in ordered if row["row"].startswith(path.name)] for schema, path in files.items()}


def write() -> None:
    """Writes both files of golden values."""
    from unittest.mock import patch

    from halos_pl.testing import tiny_model

    torch.set_num_threads(1)
    for name, instead in SHORTCUTS.items():
        patch(name, instead).start()
    made: dict[str, dict[str, Any]] = {"steps": {"machine": machine()}, "tokens": {}}
    with tempfile.TemporaryDirectory() as place:
        model = tiny_model(Path(place) / "model")
        for name in (*CELLS, "tokens"):
            folder = Path(place) / name.replace("/", "-")
            folder.mkdir()
            os.environ["HALOS_CACHE"] = str(folder / "cache")
            if name == "tokens":
                made["tokens"] = tokens(model, folder)
                continue
            try:
                made["steps"][name] = step(name, model, folder)
            except SystemExit as refused:
                print(f"{name}: refused with status {refused.code}", file=sys.stderr)
                made["steps"][name] = None
    for kind, values in made.items():
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
        FILES[kind].write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
