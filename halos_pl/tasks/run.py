"""Runs benchmarks on a model through lm-eval, and keeps the result of every question."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from halos_pl.common.messages import plain
from halos_pl.data.example import DataError
from halos_pl.policy.loading import stored_config
from halos_pl.provenance import provenance
from halos_pl.tasks.load import Benchmark
from halos_pl.training.named_model import NamedModel

#: Values by metric and question.
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Prompting:
    """How questions become prompts, and how many are answered at once.

    Attributes:
        chat: Whether prompts go through the chat template.
        multiturn: Whether examples are turns of the conversation.
        system: System message.
        batch_size: Prompts in a batch.
    """

    chat: bool
    multiturn: bool
    system: str | None
    batch_size: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of lm-eval."""
        return {
            "system_instruction": self.system,
            "apply_chat_template": self.chat,
            "fewshot_as_multiturn": self.multiturn,
        }


def check_prompts(named: NamedModel, benchmarks: Iterable[Benchmark], how: Prompting) -> None:
    """Refuses prompts that the model cannot take; lm-eval would cut them on the left. Loads no weights.

    Raises:
        DataError: naming the task and the number of its prompts that are too long, or that lack a chat template.
    """
    tokenizer = named.tokenizer()
    if how.chat and not tokenizer.chat_template:
        raise DataError(
            f"{named.name} has no chat template, which apply_chat_template (or text_prompts: chat) needs; set"
            " chat_template"
        )
    # lm-eval reads only these two of a model before it runs.
    outline: Any = SimpleNamespace(config=stored_config(named.spec), device=torch.device("cpu"))
    lm = _harness(outline, tokenizer, how.batch_size)
    for benchmark in benchmarks:
        for leaf, task in benchmark.leaves.items():
            if leaf in benchmark.drawn:
                _check_length(lm, benchmark, leaf, task, how)


def _check_length(lm: Any, benchmark: Benchmark, leaf: str, task: Any, how: Prompting) -> None:
    task.set_fewshot_seed(FEWSHOT_SEED)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    options = how.options | {"chat_template": lm.apply_chat_template if how.chat else None}
    try:
        with patch("lm_eval.api.task.tqdm", lambda items, **_: items):
            task.build_all_requests(samples=benchmark.drawn[leaf], **options)
    except AssertionError as error:  # more examples than there are
        why = " ".join(str(error).split()).removeprefix("Error: ").rstrip(".")
        raise DataError(f"{leaf}: {why}; lower num_fewshot") from error
    long, most, room = 0, 0, 0
    for request in task.instances:
        if request.request_type == "generate_until":
            text, room = request.args[0], int(request.args[1].get("max_gen_toks", lm.max_gen_toks))
        else:
            text, room = "".join(request.args[:2]), 0
        if len(text.encode()) + room <= lm.max_length:  # no tokenizer makes more tokens than bytes
            continue
        length = len(lm.tok_encode(text))
        if length + room > lm.max_length:
            long, most = long + 1, max(most, length)
    if long:
        answer = f" and {room} for the answer" if room else ""
        raise DataError(
            f"{leaf}: {long} of {len(task.instances)} prompts do not fit: the longest has {most} tokens{answer}, but"
            f" the model has {lm.max_length} positions; use fewer examples (num_fewshot) or shorter answers"
            " (max_gen_toks), or leave the task out"
        )


#: lm-eval's seed for drawing examples.
FEWSHOT_SEED = 1234


def _harness(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def run(
    model: nn.Module, tokenizer: Any, name: str, benchmarks: Sequence[Benchmark], how: Prompting, folder: Path
) -> Values:
    """Answers the drawn questions and writes lm-eval's files.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        name: Its name, for the files.
        benchmarks: What to run.
        how: How questions become prompts.
        folder: Folder for ``results.json`` and ``samples_TASK.jsonl``, in lm-eval's formats; replaced.

    Returns:
        Values by metric and question, see :func:`values_of`.

    Raises:
        DataError: if its files cannot be written.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    drawn = {leaf: some for each in benchmarks for leaf, some in each.drawn.items() if some is not None}
    lm = _harness(model, tokenizer, how.batch_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".benchmarks-") as place:
        tracker = EvaluationTracker(output_path=place)
        origin = provenance()
        with (
            # It lists all installed packages, which takes seconds; git prints errors outside a checkout.
            patch("torch.utils.collect_env.get_pretty_env_info", lambda: json.dumps(origin)),
            patch("lm_eval.evaluator.get_git_commit_hash", lambda: origin["revision"]),
        ):
            results: Any = simple_evaluate(
                model=lm,
                model_args={"pretrained": name},
                tasks=[each.item for each in benchmarks],
                samples=drawn or None,
                batch_size=how.batch_size,
                evaluation_tracker=tracker,
                confirm_run_unsafe_code=True,  # refused earlier unless allowed
                fewshot_random_seed=FEWSHOT_SEED,
                **how.options,
            )
        samples = results.pop("samples")
        values: Values = {}
        for each in benchmarks:
            values |= values_of(each, samples)
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        found = {path: f"{path.stem.rpartition('_')[0]}{path.suffix}" for path in sorted(Path(place).rglob("*.json*"))}
        publish(((name, path.read_text(encoding="utf-8")) for path, name in found.items()), folder)
    return values


def publish(files: Iterable[tuple[str, str]], folder: Path) -> None:
    """Replaces a folder by lm-eval's files, with names that do not change from run to run.

    Args:
        files: Names and texts.
        folder: The folder.

    Raises:
        DataError: there are no results among them.
    """
    contents = dict(files)
    if "results.json" not in contents:  # lm-eval only logs what went wrong
        raise DataError(f"lm-eval could not write its results for {folder}; is the disk full?")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")


def headline(benchmark: Benchmark) -> tuple[str, str] | None:
    """The metric and the filter that give a benchmark its score: the first of its task.

    None for a group without a common score, whose tasks are scored one by one.
    """
    (first, *_), item = benchmark.leaves.values(), benchmark.item
    if len(benchmark.leaves) > 1:
        common = getattr(item, "aggregate_metric_list", None) or []
        if not common or not common[0].weight_by_size:
            return None
        return common[0].metric, (common[0].filter_list or [_filters(first)[0]])[0]
    return _metrics(first)[0], _filters(first)[0]


def _metrics(task: Any) -> list[str]:
    return list(task.higher_is_better())


def _filters(task: Any) -> list[str]:
    return [ensemble.name for ensemble in task._filters]


def values_of(benchmark: Benchmark, samples: Mapping[str, list[dict[str, Any]]]) -> Values:
    """The values of the questions, by metric.

    Metrics are named ``NAME`` (see :func:`headline`) and ``NAME/METRIC,FILTER``. Only metrics with one number from 0 to
    1 per question, of which more is better, are kept; a group without a common score has those of its tasks. A question
    is named by its task, its index in the data set and a hash of its row, whatever was drawn.

    Args:
        benchmark: The benchmark.
        samples: lm-eval's samples by task.
    """
    main, values = headline(benchmark), Values()
    for leaf, task in benchmark.leaves.items():
        name = leaf if main is None else benchmark.name
        best = main or (_metrics(task)[0], _filters(task)[0])
        for sample in samples.get(leaf, ()):
            question = f"{leaf}/{sample['doc_id']}:{sample['doc_hash'][:8]}"
            for metric in sample["metrics"]:
                value, key = sample[metric], (metric, sample["filter"])
                if task.higher_is_better().get(metric) is False or not _is_share(value):
                    continue
                column = name if key == best else f"{name}/{metric},{key[1]}"
                values.setdefault(column, {})[question] = float(value)
    return values


def _is_share(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and 0 <= value <= 1


def described(benchmark: Benchmark, seed: int) -> dict[str, Any]:
    """What a benchmark measured: its task's version, metric, examples and drawn questions."""
    (first, *_), main = benchmark.leaves.values(), headline(benchmark)
    return {
        "questions": benchmark.count,
        "of": benchmark.total,
        "seed": seed if benchmark.count < benchmark.total else None,
        "metric": None if main is None else ",".join(main),
        "num_fewshot": first.get_config("num_fewshot") or 0,
        "version": first.VERSION,
    }


def line_of(benchmark: Benchmark, seed: int) -> str:
    """What is about to be measured, for the terminal."""
    part = f"{benchmark.count} of {benchmark.total}" if benchmark.count < benchmark.total else f"{benchmark.total}"
    drawn = f", drawn with seed {seed}" if benchmark.count < benchmark.total else ""
    return plain(f"halos: {benchmark.name}: {part} questions{drawn}")
