"""What a model is worth on held-out data, example by example, so that models can be compared pair by pair."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from halos_pl.common.files import check_target, write
from halos_pl.common.messages import counted
from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import read_prompt_rows, say_convention
from halos_pl.data.prompts import TextPrompts
from halos_pl.data.sources import sources_of
from halos_pl.evaluation.judging import judged_by
from halos_pl.evaluation.measurement import ANSWERS, ROWS, Task, measure
from halos_pl.policy.sampling import check_sampling
from halos_pl.provenance import digest_of, paths_of, provenance
from halos_pl.training.named_model import NamedModel, named_model

FILE = "evaluation.json"
BEFORE = "before.json"  # the same of the model that a run began with
MEASURED = "measured.json"
CODE = ("rule", "judge")  # arguments that name file.py:function
# Arguments that runs measured by older versions do not name.
LATER = ("ckpt_path", "reference", "prompt_column", "text_prompts", "chat_template")

#: What is measured on each held-out pair, row, example (a pair or a single row) or prompt; what it is the mean of, and
#: whether more is better. Figures of held-out rows with the same prompt are kept as one, their mean, for they do not
#: vary by themselves: the n of a metric is a number of prompts.
METRICS: dict[str, tuple[str, str, bool | None]] = {
    "reward_accuracy": ("pairs", "share of pairs whose chosen completion has the higher reward", True),
    "reward_margin": ("pairs", "reward of the chosen minus that of the rejected completion, nats", True),
    "brier": ("pairs", "squared error of sigmoid(beta * margin) as the probability that the chosen one wins", False),
    "reward_auroc": ("examples", "share of undesirable rows with a lower reward than a desirable one", True),
    "nll_desirable": ("rows", "negative log-prob of desirable completions, nats per token", False),
    "nll_undesirable": ("rows", "negative log-prob of undesirable completions, nats per token", None),
    "kl_held_out": ("examples", "KL from the reference along held-out completions, nats, exact at each token", None),
    "kl": ("prompts", "KL from the reference along the policy's answers as sampled, nats, exact at each token", None),
    "length": ("prompts", "tokens per answer", None),
    "finished": ("prompts", "share of answers that the model ended by itself", None),
    "rule": ("prompts", "share of answers that meet the rule", True),
    "judge": (
        "prompts",
        "share of answers that the judge prefers to those of the reference; a draw counts half",
        True,
    ),
}


#: Metrics that compare with a reference model.
COMPARING = ("reward_accuracy", "reward_margin", "brier", "reward_auroc", "kl_held_out", "kl")
#: Metrics that lie between 0 and 1.
SHARES = frozenset(name for name, (_, what, _) in METRICS.items() if what.startswith("share"))
#: Positive metrics without an upper end, whose arms are compared by ratios, on the log scale.
RATIOS = frozenset({"kl", "kl_held_out", "length"})


def measuring(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How and on what a model is measured: arguments of :func:`evaluate`, and a digest of each file they name."""
    code = [str(arguments[key]).rpartition(":")[0] for key in CODE if arguments.get(key)]
    data = paths_of([arguments.get("prompts"), *(arguments.get("held_out") or [])])
    given = {k: v for k, v in arguments.items() if k not in LATER or v is not None}
    return {"evaluate": given, "files": {path: digest_of(path) for path in sorted({*data, *code})}}


def measured_how(run: Path) -> dict[str, Any]:
    """What a run says of its measuring: :func:`measuring`, and by what (``by``); empty where it says nothing."""
    path = run / MEASURED
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


#: Negative log-probs per token; their exponentials are perplexities.
PER_TOKEN = frozenset(name for name, (_, what, _) in METRICS.items() if what.endswith("nats per token"))


def check_arguments(
    *,
    held_out: Any,
    prompts: str | None,
    rule: str | None,
    judge: str | None,
    max_length: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    beta: float,
    seed: int = 0,
    prompt_column: str | None = None,
    **_: Any,
) -> None:
    """Refuses arguments of :func:`evaluate` that cannot be, before any model is loaded.

    Raises:
        DataError: naming the argument.
    """
    if not held_out and not prompts:
        raise DataError("nothing to measure: name --held_out feedback, --prompts, or both")
    if (rule or judge) and not prompts:
        raise DataError("--rule and --judge look at answers: name --prompts as well")
    if prompt_column and not prompts:
        raise DataError("--prompt_column is one of --prompts, which names no file")
    if not max_length >= 2:
        raise DataError(f"max_length is {max_length}; it must be at least 2")
    check_sampling(max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed)
    if not 0 < beta < float("inf"):
        raise DataError(f"beta is {beta}; it must be above 0 and finite")
    try:
        sources_of("predict", held_out)
    except ValueError as error:
        raise DataError(str(error).replace("data.predict", "held_out")) from error


def _place(model: NamedModel, out: str | None) -> Path:
    """The folder to write to.

    Raises:
        OSError: where it cannot be one.
    """
    if out is None and model.run:
        return model.run
    folder = Path(out) if out else Path("runs/evaluated") / re.sub(r"[^\w.=-]+", "-", model.name).strip("-.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    check_target(folder / FILE)
    return folder


def _that_chats(compared: NamedModel, model: NamedModel) -> NamedModel:
    """The reference, in the chat template of the model where it has none: a base model answers the same messages."""
    if compared.tokenizer().chat_template:
        return compared
    print(f"halos: {compared.name} has no chat template; it is asked in that of {model.name}")
    template = model.tokenizer().chat_template
    return replace(compared, chat_template=template if isinstance(template, str) else None)


def evaluate(
    model: str,
    *,
    held_out: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
    prompts: str | None = None,
    prompt_column: str | None = None,
    text_prompts: TextPrompts | None = None,
    chat_template: str | None = None,
    rule: str | None = None,
    judge: str | None = None,
    reference: str | None = None,
    beta: float = 0.1,
    max_length: int = 1024,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    batch_size: int = 16,
    seed: int = 0,
    ckpt_path: str | None = None,
    out: str | None = None,
) -> None:
    """Measure a model on held-out data; the code of rule, judge and a run's config.yaml is executed.

    Measured example by example, so that models can be compared pair by pair. Of a run, the model that it began with is
    measured as well, with the same prompts and seeds: before.json. A run with control tokens is measured without them.
    Special tokens in held-out text are treated as in a run's training.

    Args:
        model: a run's folder, a Hugging Face folder, a folder with a peft adapter, or a hub name.
        held_out: held-out feedback: a path, a mapping as for data.predict, or a list of them.
        prompts: a .txt file or JSON lines with "prompt": the model answers each of them.
        prompt_column: the column of JSON lines that holds the prompt, where it is not "prompt".
        text_prompts: what text prompts and held-out text mean: plain encodes them as they are, chat puts them into the
            chat template as a user's message; default: as the run was trained (data.text_prompts), else plain.
        chat_template: another chat template than the model's: a .jinja file, a folder with a tokenizer, chatml, or the
            template itself; default: the one that the run was trained with, else the tokenizer's.
        rule: path/to/file.py:function(answer, row) -> 1 where the answer meets it, 0 where not, or between. row has the
            columns of the prompt's row, such as row["answer"], and row.text, row.messages (the prompt), row.finished.
        judge: path/to/file.py:function(answer, other, row) -> 1 where it prefers the answer, 0 where the other one,
            the reference's, 0.5 for a draw; row also has row.other_finished.
        reference: the model that rewards, KL and the judge compare with, named as the model is; default: what the run
            began with. Without one, their metrics are skipped.
        beta: 1 / nats, of the Brier score.
        max_length: tokens of held-out prompt and completion together.
        max_new_tokens: the most tokens of an answer.
        temperature: of the sampling.
        batch_size: rows or answers at a time.
        seed: of the sampling.
        ckpt_path: of a run, another checkpoint than the last one: best (that of its ModelCheckpoint), or a file.
        out: the folder where evaluation.json, held_out.jsonl and answers.jsonl are written; default: the run's, or of
            another model one below runs/evaluated.
    """
    held_out = [held_out] if isinstance(held_out, str | dict) else held_out
    arguments = {name: value for name, value in locals().items() if name not in ("model", "out")}
    check_arguments(**arguments)
    chosen = {name: judged_by(place, name) for name, place in (("rule", rule), ("judge", judge)) if place}
    if prompts:  # faults of the file come before those of the model
        read_prompt_rows(Path(prompts), text_prompts or "chat", prompt_column)
    named = named_model(model, ckpt_path, chat_template)
    compared = named_model(reference) if reference else None
    if judge and not compared and not named.run:
        raise DataError(f"--judge compares with the answers of another model, and {model} is no run; name --reference")
    folder = _place(named, out)
    how = measuring(arguments) | {"by": provenance()}  # files as they are now, before they are read
    if folder != named.run:
        how["model"] = model
    text = named.text_settings(text_prompts=text_prompts)
    rows = read_prompt_rows(Path(prompts), text["text_prompts"], prompt_column) if prompts else []
    if rows:
        say_convention(rows, text["text_prompts"], named.tokenizer())
    if judge and compared and any(not isinstance(row.prompt, str) for row in rows):
        compared = _that_chats(compared, named)
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
    task = Task(data, beta, rows, chosen, sampling)
    values, before, has_reference = measure(named, compared, task, folder)
    # Or what an earlier evaluation has left would be taken for this one's.
    for name, is_new in ((FILE, False), (ROWS, data is not None), (ANSWERS, bool(rows))):
        if not is_new:
            (folder / name).unlink(missing_ok=True)
    write(folder / MEASURED, json.dumps(how, indent=2) + "\n")
    if named.run:
        write(folder / BEFORE, json.dumps(before) + "\n")
    else:
        (folder / BEFORE).unlink(missing_ok=True)
    write(folder / FILE, json.dumps(values) + "\n")
    _say(values, before, data is not None, bool(rows), has_reference)


def _say(
    values: Mapping[str, Mapping[str, float]],
    before: Mapping[str, Mapping[str, float]],
    with_rows: bool,
    with_prompts: bool,
    with_reference: bool,
) -> None:
    """Says what was measured, and what was not and why."""
    asked = [name for name, (unit, *_) in METRICS.items() if with_rows and unit != "prompts"]
    asked += ["kl"] * with_prompts
    lacking = [name for name in asked if not values.get(name)]
    if not with_reference and (skipped := [name for name in lacking if name in COMPARING]):
        print(f"halos: skipped, as there is no model to compare with (--reference names one): {', '.join(skipped)}")
        lacking = [name for name in lacking if name not in COMPARING]
    if lacking:
        kinds = {True: "pairs", False: "both desirable and undesirable rows"}
        wanted = dict.fromkeys(kinds[METRICS[name][0] == "pairs"] for name in lacking)
        print(f"halos: not measured, as the held-out data lack {' and '.join(wanted)}: {', '.join(lacking)}")
    for name, found in values.items():
        said = f"halos: {name} {np.mean(list(found.values())):.4g}"
        if name in before:
            said += f", before training {np.mean(list(before[name].values())):.4g}"
        print(f"{said} (n = {counted(len(found), 'prompt')})")
