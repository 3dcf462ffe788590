"""IFEval for lm-eval: its own checkers, without those whose NLTK data are missing.

The checkers of ``NEEDS_PUNKT`` split text with NLTK's punkt tokenizer. Where that is not installed, their instructions
are not scored: they are left out of the accuracy over instructions, and their prompts out of that over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from typing import Any
from unittest.mock import patch

#: Instructions whose checkers need NLTK's ``punkt_tab``.
NEEDS_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


@cache
def has_punkt() -> bool:
    """Whether NLTK's ``punkt_tab`` is installed; nothing is downloaded."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


@cache
def _checkers() -> Any:
    """lm-eval's module of checkers, whose import would download ``punkt_tab``."""
    with patch("nltk.download"), redirect_stdout(None):
        from lm_eval.tasks.ifeval import utils
    return utils


def not_scored(doc: Mapping[str, Any]) -> list[str]:
    """The instructions of a prompt that are not scored."""
    return [] if has_punkt() else [name for name in doc["instruction_id_list"] if name in NEEDS_PUNKT]


def fault_of(doc: Mapping[str, Any]) -> str | None:
    """What is wrong with a row of the data set; None if its checkers can score an answer.

    A checker whose arguments are missing would draw them at random.
    """
    names, arguments = doc.get("instruction_id_list"), doc.get("kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or not 0 < len(names) == len(arguments):
        return "instruction_id_list and kwargs must be lists of the same length, of at least 1"
    if "key" not in doc:
        return "'key' is missing"
    known = _checkers().instructions_registry.INSTRUCTION_DICT
    for name, given in zip(names, arguments, strict=True):
        if name not in known:
            return f"instruction_id_list has {name!r}, which is no instruction of IFEval"
        if not isinstance(given, dict):
            return f"kwargs has {given!r:.60} for {name}; it takes an object"
        checker, given = known[name](name), {key: value for key, value in given.items() if value is not None}
        needed = checker.get_instruction_args_keys()
        if missing := sorted(set(needed) - set(given)):
            return f"kwargs has no {missing[0]} for {name}"
        if unknown := sorted(set(given) - set(needed)):
            return f"kwargs has {unknown[0]} for {name}, which takes {', '.join(needed) or 'nothing'}"
        try:
            checker.build_description(**given)
        except Exception as error:  # of a checker, which has no class of its own for it
            return f"kwargs for {name} are {given!r:.100}: {' '.join(str(error).split())}"
    return None


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """The metrics of one answer.

    Args:
        doc: The row of the data set.
        results: The answer, one item.

    Returns:
        Whether the answer follows the instruction, for each scored instruction; and whether it follows all of them,
        unless one is not scored. Strict as written, loose after removing markup and the first or last line.
    """
    utils = _checkers()
    missing = not_scored(doc)
    kept = [i for i, name in enumerate(doc["instruction_id_list"]) if name not in missing]
    if not kept:
        return {}
    inp = utils.InputExample(
        key=doc["key"],
        instruction_id_list=[doc["instruction_id_list"][i] for i in kept],
        prompt=doc["prompt"],
        kwargs=[doc["kwargs"][i] for i in kept],
    )
    metrics: dict[str, Any] = {}
    for how, test in (
        ("strict", utils.test_instruction_following_strict),
        ("loose", utils.test_instruction_following_loose),
    ):
        out = test(inp, results[0])
        if not missing:
            metrics[f"prompt_level_{how}_acc"] = out.follow_all_instructions
        metrics[f"inst_level_{how}_acc"] = out.follow_instruction_list
    return metrics


def over_instructions(items: list[list[bool]]) -> float:
    """The accuracy over the instructions of all prompts."""
    return float(_checkers().agg_inst_level_acc(items))
