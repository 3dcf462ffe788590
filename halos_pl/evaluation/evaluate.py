"""``halos evaluate``: measures a model on held-out data and benchmarks, example by example."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from halos_pl.common import spent
from halos_pl.common.files import write
from halos_pl.common.messages import counted, plain
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.evaluation.compare import print_before_and_after
from halos_pl.evaluation.files import (
    ANSWERS,
    BEFORE,
    BENCHMARKS,
    BENCHMARKS_BEFORE,
    FILE,
    MEASURED,
    ROWS,
    VERDICTS,
    WIN_RATE,
    keep_earlier,
)
from halos_pl.evaluation.metrics import COMPARING, METRICS, metric_of
from halos_pl.judge.settings import JudgeSettings


def evaluate(
    model: str,
    *,
    held_out: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
    prompts: str | None = None,
    prompt_column: str | None = None,
    text_prompts: Literal["plain", "chat"] | None = None,
    chat_template: str | None = None,
    rule: str | None = None,
    judge: str | None = None,
    reference: str | None = None,
    beta: float = 0.1,
    max_length: int = 1024,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    batch_size: int = 16,
    precision: Literal["32-true", "bf16-mixed", "as_trained"] | None = None,
    seed: int = 0,
    ckpt_path: str | None = None,
    win_rate: str | None = None,
    against: str | None = None,
    endpoint: EndpointSettings | None = None,
    judging: JudgeSettings = JudgeSettings(),  # noqa: B008
    alpaca_data: str | None = None,
    mt_bench: str | None = None,
    tasks: str | list[str] | None = None,
    suite: Literal["paper"] | None = None,
    limit: int | Literal["paper"] | dict[str, int] | None = None,
    num_fewshot: int | None = None,
    max_gen_toks: int | None = None,
    apply_chat_template: bool | None = None,
    fewshot_as_multiturn: bool | None = None,
    system: str | None = None,
    include_path: str | None = None,
    eval_data: str | None = None,
    allow_code_execution: bool = False,
    out: str | None = None,
) -> None:
    """Measure a model on held-out data and benchmarks; executes the code of rule, judge and a run's config.yaml.

    Values are recorded by example, for paired comparisons of models. For a run, the model before training is
    measured too, with the same prompts and seeds (before.json). A run with control tokens is measured without
    them. Special tokens in held-out text are treated as in the run's training.

    Args:
        model: the folder of a run, a Hugging Face model folder, a folder with a peft adapter, or a hub name.
        held_out: held-out feedback: a path, a mapping as for data.predict, or a list of these.
        prompts: prompts to answer: a .txt file, or JSON lines with "prompt".
        prompt_column: the column of the JSON lines with the prompt; default: "prompt".
        text_prompts: plain encodes text prompts and held-out text unchanged; chat puts each into the chat template as
            a user message; default: as in the run's training (data.text_prompts), otherwise plain.
        chat_template: a chat template to use instead of the model's: a .jinja file, a folder with a tokenizer, chatml,
            or the template itself; default: the one used in training, otherwise the tokenizer's.
        rule: path/to/file.py:function(answer, row) -> 1 if the answer meets the rule, 0 if not, or a number in between.
            row["column"] is a column of the prompt's row; row.text and row.messages are the prompt, and row.finished
            tells whether the model ended the answer itself.
        judge: path/to/file.py:function(answer, other, row) -> 1 if it prefers the answer, 0 if it prefers the other
            one, which is the reference's, 0.5 for a tie; row also has row.other_finished.
        reference: the model that rewards, KL and the judge compare with, named like the model; default: the run's model
            before training. Without a reference, metrics that need one are skipped.
        beta: beta of the Brier score, 1 / nats.
        max_length: maximum tokens of a held-out prompt and its completion together.
        max_new_tokens: maximum tokens of an answer.
        temperature: sampling temperature.
        batch_size: rows or answers per batch.
        precision: precision of the passes, as in trainer.precision: bf16-mixed is several times as fast where the
            processor has bfloat16 instructions, as_trained is that of the run's training. Log-probs are float32 in any
            case. Default: the dtype of the weights.
        seed: sampling seed.
        ckpt_path: a checkpoint of the run other than the last: best (according to its ModelCheckpoint), or a file.
        win_rate: a judge at an endpoint that compares or grades the answers: alpaca_eval2, mt_bench_pair,
            mt_bench_single, kto, accurate, quality, or a YAML file with a rubric.
        against: the answers to compare with: a column of the prompts, such as chosen, or a model; default: those of
            the reference.
        endpoint: server of the judge, with OpenAI's API.
        judging: how the judge is asked.
        alpaca_data: folder with AlpacaEval's files from the hub; without --prompts, its questions are answered.
        mt_bench: folder with MT-bench's files; without --prompts, its questions are answered.
        tasks: benchmarks of EleutherAI's lm-evaluation-harness, separated by commas; needs halos_pl[eval].
        suite: benchmarks of a paper: paper is mmlu, gsm8k_cot, humaneval and bbh_cot_fewshot, as for KTO.
        limit: number of questions to draw from each task or group, with seed; a number by name; or paper: 200 of GSM8K
            and 40 of each BBH task. Default: all.
        num_fewshot: number of examples in a benchmark prompt; default: as each task sets it.
        max_gen_toks: maximum tokens of a benchmark answer; default: as each task sets it.
        apply_chat_template: whether benchmark prompts go through the chat template; default: as text_prompts.
        fewshot_as_multiturn: whether benchmark examples are turns of the conversation; default: with a chat template.
        system: system message of benchmark prompts.
        include_path: folder with further task files.
        eval_data: folder with the published files of benchmarks; default: HALOS_EVAL_DATA, otherwise the hub.
        allow_code_execution: whether programs that the model writes for humaneval may run, in a sandbox.
        out: folder for evaluation.json, held_out.jsonl, answers.jsonl, win_rate.json, verdicts.jsonl and lm-eval's
            files; default: the run's folder, or one below runs/evaluated for other models.
    """
    from halos_pl.tasks.names import check_names
    from halos_pl.tasks.options import benchmarks_of

    held_out = [held_out] if isinstance(held_out, str | dict) else held_out
    arguments = {name: value for name, value in locals().items() if name in ARGUMENTS}
    benchmarks = benchmarks_of(arguments)
    if benchmarks and not include_path:
        check_names(benchmarks.tasks)
    # Imported here: they load torch and transformers, for which --help and the checks above should not wait.
    from halos_pl.data.example import DataError
    from halos_pl.data.prompt_files import read_prompt_rows, say_convention
    from halos_pl.evaluation.arguments import check_arguments, inputs_of, measuring
    from halos_pl.evaluation.judging import judged_by
    from halos_pl.evaluation.measurement import Task, measure, output_folder, with_chat_template
    from halos_pl.evaluation.precision import computing_in, precision_of
    from halos_pl.evaluation.win_rates import win_rates_of
    from halos_pl.policy.spec import ModelError
    from halos_pl.provenance import provenance
    from halos_pl.training.checkpoint_reading import step_of
    from halos_pl.training.named_model import named_model

    check_arguments(**arguments)
    win_rates = win_rates_of(**arguments)
    functions = {name: judged_by(place, name) for name, place in (("rule", rule), ("judge", judge)) if place}
    if prompts:  # report faults of this file before a model is loaded
        read_prompt_rows(Path(prompts), text_prompts or "chat", prompt_column)
    named = named_model(model, ckpt_path, chat_template)
    compared = named_model(reference) if reference else None
    if judge and not compared and not named.run:
        raise DataError(f"--judge needs a reference to compare with, as {model} is not a run; set --reference")
    used = precision_of(named, precision)
    folder = output_folder(named, out, inputs_of(model, arguments), win_rates)
    connection = win_rates.connect(folder) if win_rates else None
    how = measuring(arguments) | {"precision": used, "by": provenance()}  # hash the files before they are read
    if named.ckpt_path:
        how["step"] = step_of(Path(named.ckpt_path))
    if folder != named.run:
        how["model"] = model
    text = named.text_settings(text_prompts=text_prompts)
    rows = read_prompt_rows(Path(prompts), text["text_prompts"], prompt_column) if prompts else []
    opponent = None
    if win_rates:
        rows = rows or win_rates.rows(text["text_prompts"])
        win_rates.check(rows)
        if win_rates.against and not win_rates.is_column(rows):
            try:
                opponent = named_model(win_rates.against)
            except ModelError as error:
                columns = ", ".join(sorted(rows[0].columns))
                raise DataError(f"{error}; it is no column of the prompts either: {columns} (--against)") from error
        elif win_rates.compares and not win_rates.against and not compared and not named.run:
            raise DataError(f"--win_rate {win_rate} compares two answers; name those to compare with in --against")
    if rows:
        say_convention(rows, text["text_prompts"], named.tokenizer())
    if any(not isinstance(row.prompt, str) for row in rows):
        compared = with_chat_template(compared, named) if compared and (judge or win_rates) else compared
        opponent = with_chat_template(opponent, named) if opponent else None
    prepared = None
    if benchmarks:
        from halos_pl.tasks.measure import prepare

        prepared = prepare(named, benchmarks, text["text_prompts"], batch_size, seed)
        how["tasks"] = prepared.record
        how["by"]["versions"]["lm_eval"] = version("lm_eval")
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
        "seed": seed,
        "special_tokens_in_text": text["special_tokens_in_text"],
    }
    data = None
    if held_out:
        data = {"predict": list(held_out), "batch_size": batch_size, "max_length": max_length} | text
    if earlier := keep_earlier(folder, how["evaluate"]):
        print(plain(f"halos: the results of an earlier evaluation with other settings are now in {earlier}/"))
    if not (folder / MEASURED).exists():  # marks the folder as an evaluation's, should this one be interrupted
        write(folder / MEASURED, json.dumps(how, indent=2) + "\n")
    values: dict[str, dict[str, float]] = {}
    before: dict[str, dict[str, float]] = {}
    has_reference = True
    with computing_in(used):
        if data or rows:
            task = Task(data, beta, rows, functions, sampling, win_rates, connection, opponent)
            values, before, has_reference = measure(named, compared, task, folder)
        if prepared:
            scores, scores_before = prepared.measure(folder / BENCHMARKS, folder / BENCHMARKS_BEFORE)
            values, before = values | scores, before | scores_before
    # Files from an earlier evaluation would pass for this one's.
    judged = win_rates is not None
    files = ((FILE, False), (ROWS, data is not None), (ANSWERS, bool(rows)), (WIN_RATE, judged), (VERDICTS, judged))
    for name, is_new in files:
        if not is_new:
            (folder / name).unlink(missing_ok=True)
    for name in (BENCHMARKS, BENCHMARKS_BEFORE) if not prepared else ():
        shutil.rmtree(folder / name, ignore_errors=True)
    write(folder / MEASURED, json.dumps(how | {"seconds": spent.seconds()}, indent=2) + "\n")
    if named.run:
        write(folder / BEFORE, json.dumps(before) + "\n")
    else:
        (folder / BEFORE).unlink(missing_ok=True)
    write(folder / FILE, json.dumps(values) + "\n")
    _print_values(values, before, data is not None, bool(rows), has_reference)
    print_before_and_after(values, before)


#: Arguments that identify an evaluation: all but the model and the output folder.
ARGUMENTS = tuple(name for name in inspect.signature(evaluate).parameters if name not in ("model", "out"))


def _print_values(
    values: Mapping[str, Mapping[str, float]],
    before: Mapping[str, Mapping[str, float]],
    with_rows: bool,
    with_prompts: bool,
    with_reference: bool,
) -> None:
    """Print the metrics' means, and which metrics were skipped and why."""
    expected = [name for name, metric in METRICS.items() if with_rows and metric.unit != "prompts"]
    expected += ["kl"] * with_prompts
    missing = [name for name in expected if not values.get(name)]
    if not with_reference and (skipped := [name for name in missing if name in COMPARING]):
        print(f"halos: skipped for lack of a reference (set --reference): {', '.join(skipped)}")
        missing = [name for name in missing if name not in COMPARING]
    if missing:
        needs = {True: "pairs", False: "both desirable and undesirable rows"}
        lacking = dict.fromkeys(needs[METRICS[name].unit == "pairs"] for name in missing)
        print(f"halos: skipped, as the held-out data lack {' and '.join(lacking)}: {', '.join(missing)}")
    for name, by_example in values.items():
        line, number = f"halos: {name} {fmean(by_example.values()):.4g}", len(by_example)
        if name in before:
            if len(before[name]) != number:  # a judge may abstain
                line, number = f"{line} (n = {number})", len(before[name])
            line += f", before training {fmean(before[name].values()):.4g}"
        print(f"{line} (n = {counted(number, metric_of(name).counted)})")
