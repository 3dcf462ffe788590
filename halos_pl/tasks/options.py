"""The benchmark options of ``halos evaluate``, checked before anything is imported or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from halos_pl.data.example import DataError

Limit = int | Literal["paper"] | dict[str, int] | None
#: The benchmarks of Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization".
SUITES = {"paper": ("mmlu", "gsm8k_cot", "humaneval", "bbh_cot_fewshot")}
#: The number of questions drawn from each task with ``limit: paper``; a number for every subtask of the group.
PAPER = {"gsm8k_cot": 200, "gsm8k": 200}
PAPER_EACH = {"bbh_cot_fewshot": 40}


@dataclass(frozen=True)
class Benchmarks:
    """Which benchmarks to run, and how.

    Attributes:
        tasks: Names of lm-eval's tasks or groups.
        limit: Number of questions to draw from each named task or group; by name; or ``paper``. None: all.
        num_fewshot: Number of examples in the prompt; None: as each task sets it.
        max_gen_toks: Maximum tokens of an answer; None: as each task sets it.
        apply_chat_template: Whether prompts go through the chat template; None: if text prompts do in training.
        fewshot_as_multiturn: Whether examples are turns of the conversation; None: with a chat template.
        system: System message; needs a chat template.
        include_path: Folder with further task files.
        eval_data: Folder with the published files of benchmarks; None: HALOS_EVAL_DATA, otherwise the hub.
        allow_code_execution: Whether programs of the model may run, in the sandbox.
    """

    tasks: tuple[str, ...]
    limit: Limit = None
    num_fewshot: int | None = None
    max_gen_toks: int | None = None
    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool | None = None
    system: str | None = None
    include_path: str | None = None
    eval_data: str | None = None
    allow_code_execution: bool = False

    def chat(self, text_prompts: str) -> bool:
        """Whether prompts go through the chat template.

        Args:
            text_prompts: How the model's other text prompts are encoded, ``plain`` or ``chat``.
        """
        return text_prompts == "chat" if self.apply_chat_template is None else self.apply_chat_template

    def multiturn(self, chat: bool) -> bool:
        """Whether examples are turns of the conversation."""
        return chat if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn


#: Options that need prompts in a chat template.
NEED_CHAT = ("fewshot_as_multiturn", "system")
#: Options that belong to benchmarks alone; meaningless without tasks.
OPTIONS = tuple(field.name for field in fields(Benchmarks) if field.name != "tasks")


def task_names(tasks: str | list[str] | None, suite: str | None) -> tuple[str, ...]:
    """The names of the suite, and those in ``tasks``, which may be separated by commas."""
    words = tasks.split(",") if isinstance(tasks, str) else tasks or []
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    return (*SUITES.get(suite or "", ()), *names)


def benchmarks_of(arguments: Mapping[str, Any]) -> Benchmarks | None:
    """The benchmarks that the arguments of ``halos evaluate`` name; None without any.

    Raises:
        DataError: naming an option that is invalid or useless, or the missing package.
    """
    options: dict[str, Any] = {name: arguments.get(name) for name in OPTIONS}
    suite = arguments.get("suite")
    if suite is not None and suite not in SUITES:
        raise DataError(f"suite {suite!r} does not exist; there is {', '.join(SUITES)}")
    names = task_names(arguments.get("tasks"), suite)
    if not names:
        if useless := [name for name, value in options.items() if value not in (None, False)]:
            raise DataError(f"{useless[0]} needs benchmarks: name --tasks or --suite as well")
        return None
    if twice := [name for name in names if names.count(name) > 1]:
        in_suite = suite is not None and twice[0] in SUITES[suite]
        raise DataError(
            f"tasks lists {twice[0]}, which is in suite {suite}; leave it out"
            if in_suite
            else f"tasks lists {twice[0]} twice; name it once"
        )
    benchmarks = Benchmarks(names, **options | {"allow_code_execution": bool(options["allow_code_execution"])})
    _check(benchmarks, arguments.get("text_prompts"))
    return benchmarks


def check_chat(benchmarks: Benchmarks) -> None:
    """Refuses options of prompts in a chat template, for prompts that are plain text.

    lm-eval would put a system message directly before the first word of the prompt.

    Raises:
        DataError: naming the option.
    """
    for name in NEED_CHAT:
        if getattr(benchmarks, name):
            raise DataError(f"{name} needs a chat template; set apply_chat_template to true")


def _check(benchmarks: Benchmarks, text_prompts: str | None) -> None:
    limit, chat = benchmarks.limit, benchmarks.apply_chat_template
    for name, number in limit.items() if isinstance(limit, dict) else [("limit", limit)]:
        if isinstance(number, int) and number < 1:
            raise DataError(
                f"limit: {name} is {number}; it must be at least 1"
                if isinstance(limit, dict)
                else f"limit is {number}; it must be at least 1"
            )
    if limit == "paper" and not {*PAPER, *PAPER_EACH} & {*benchmarks.tasks}:
        raise DataError(
            f"limit paper has no effect on {', '.join(benchmarks.tasks)}, only on"
            f" {', '.join((*PAPER, *PAPER_EACH))}; set a number"
        )
    for name, least in (("num_fewshot", 0), ("max_gen_toks", 1)):
        value = getattr(benchmarks, name)
        if value is not None and value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}")
    if chat is not None and text_prompts is not None and chat != (text_prompts == "chat"):
        raise DataError(
            f"apply_chat_template {str(chat).lower()} and text_prompts {text_prompts} contradict each other; set one"
        )
    if chat is False or text_prompts == "plain":
        check_chat(benchmarks)
    for name in ("include_path", "eval_data"):
        folder = getattr(benchmarks, name)
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"{name} {folder}: no such folder")
    if find_spec("lm_eval") is None:
        raise DataError("benchmarks need EleutherAI's lm-evaluation-harness: pip install 'halos_pl[eval]'")
