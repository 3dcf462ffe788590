"""Rows in each format of feedback."""

from __future__ import annotations

from typing import Any

USER, BOT, OTHER = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("assistant", "no")))


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who?\n\nAssistant:"


# One row of each schema, as it is published
ROWS: dict[str, Any] = {
    "unpaired": {"prompt": [USER], "completion": [BOT], "label": True},
    "paired": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "triple": {"prompt": "p", "chosen": "c", "rejected": "r", "reference": "g"},
    "implicit": {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
    "halos_binary": {
        "prompt_id": 0, "prompt": [USER], "output": [BOT], "label": 1, "reward": 0.5, "type": "binary_feedback",
    },
    "halos_pairwise": {
        "prompt": [USER], "output_A": [BOT], "output_B": [OTHER], "label": 0, "reward_A": 0.1, "reward_B": 0.7,
        "type": "pairwise_feedback",
    },
    "messages": {"messages": [USER, BOT], "label": False},
    "sharegpt_pair": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yo"}, "rejected": {"from": "gpt", "value": "no"},
    },
    "messages_pair": {"messages": [USER], "chosen": [BOT], "rejected": [OTHER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "kto_tag": True},
    "scored": {"prompt": "p", "completion": "c", "score": 0.25},
    "scored_lists": {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2.5]},
    "ultrafeedback": {
        "source": "flan", "instruction": "p", "models": ["m", "n"], "correct_answers": ["None"],
        "completions": [
            {"model": "m", "response": "a", "overall_score": 8.5, "fine-grained_score": 4.25, "critique": "Good."},
            {"model": "n", "response": "b", "overall_score": 2, "fine-grained_score": 2.0, "critique": "Bad."},
        ],
    },
    "shp": {
        "post_id": "x", "domain": "askculinary_train", "history": "p", "human_ref_A": "a", "human_ref_B": "b",
        "labels": 1, "score_A": 340, "score_B": 166, "score_ratio": 2.05,
    },
    "pandalm": {
        "idx": 0, "instruction": "p", "input": "x", "response1": "a", "response2": "b", "annotator1": 1,
    },
    "oasst": {"message_id": "m", "parent_id": None, "text": "hi", "role": "prompter", "rank": None, "deleted": False},
}  # fmt: skip
