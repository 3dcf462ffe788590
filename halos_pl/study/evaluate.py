"""What a finished run is worth on held-out data, example by example, so that runs can be compared pair by pair."""

from __future__ import annotations

import inspect
import json
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning import Trainer

from halos_pl.build import module_of_file
from halos_pl.callbacks import CONFIG
from halos_pl.checkpoint import load_trained
from halos_pl.data import FeedbackDataModule
from halos_pl.data.datamodule import _sources
from halos_pl.data.example import DataError, Prompt
from halos_pl.export import module_of_run, put_weights, take_template
from halos_pl.feedback import Binary
from halos_pl.files import whole, write
from halos_pl.generate import Sample, as_messages, check_sampling, generate, kl_of_samples, read_prompt_lines
from halos_pl.module import HALOModule
from halos_pl.outcomes import FlatBatch
from halos_pl.policy.logprobs import compared_logps, completion_mask
from halos_pl.provenance import digest_of, paths_of, provenance
from halos_pl.reference_points import Zero
from halos_pl.rewards import LogRatio
from value_functions import Logistic

FILE = "evaluation.json"
ROWS = "held_out.jsonl"
ANSWERS = "answers.jsonl"
MEASURED = "measured.json"
CODE = ("rule", "judge")  # arguments that name file.py:function

#: What is measured on each held-out pair, row, example (a pair or a single row) or prompt; what it is the mean of, and
#: whether more is better. Figures of held-out rows with the same prompt are kept as one, their mean, for they do not
#: vary by themselves: the n of a metric is a number of prompts.
METRICS: dict[str, tuple[str, str, bool | None]] = {
    "reward_accuracy": ("pairs", "share of pairs whose chosen completion has the higher reward", True),
    "reward_margin": ("pairs", "reward of the chosen less that of the rejected completion, nats", True),
    "brier": ("pairs", "squared error of sigmoid(beta * margin) as the probability that the chosen one wins", False),
    "reward_auroc": ("examples", "share of undesirable rows with a lower reward than a desirable one", True),
    "nll_desirable": ("rows", "negative log-prob of desirable completions, nats per token", False),
    "nll_undesirable": ("rows", "negative log-prob of undesirable completions, nats per token", None),
    "kl_held_out": ("examples", "KL from the reference along held-out completions, nats, exact at each token", None),
    "kl": ("prompts", "KL from the reference along the policy's answers as sampled, nats, exact at each token", None),
    "length": ("prompts", "tokens of the answers", None),
    "finished": ("prompts", "share of answers that the model ended by itself", None),
    "rule": ("prompts", "share of answers that meet the rule", True),
    "judge": (
        "prompts",
        "share of answers that the judge prefers to those of before; a draw counts half",
        True,
    ),
}


#: Metrics that lie between 0 and 1.
SHARES = frozenset(name for name, (_, what, _) in METRICS.items() if what.startswith("share"))


def measuring(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How and on what a run is measured: the arguments of :func:`evaluate`, and a digest of each file they name."""
    code = [str(arguments[key]).rpartition(":")[0] for key in CODE if arguments.get(key)]
    data = paths_of([arguments.get("prompts"), *(arguments.get("held_out") or [])])
    arguments = {k: v for k, v in arguments.items() if k != "ckpt_path" or v is not None}  # older runs do not say
    return {"evaluate": arguments, "files": {path: digest_of(path) for path in sorted({*data, *code})}}


def measured_how(run: Path) -> dict[str, Any]:
    """What a run says of its measuring: :func:`measuring`, and by what (``by``); empty where it says nothing."""
    path = run / MEASURED
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


#: Negative log-probs per token; their exponentials are perplexities.
PER_TOKEN = frozenset(name for name, (_, what, _) in METRICS.items() if what.endswith("nats per token"))


class Evaluation(HALOModule):
    """Measures each held-out row under the policy of a run and under the model that it started from."""

    @torch.no_grad()
    def predict_step(self, batch: FlatBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row: log-probs under both models and the KL divergence between them, in nats."""
        assert self.policy is not None
        compared = compared_logps(self.policy, self.scoring(), batch)
        policy, reference, kl = (figures.sum(dim=1).tolist() for figures in compared)
        tokens = completion_mask(batch).sum(dim=1).tolist()
        first = [min(i, rival) if rival >= 0 else i for i, rival in enumerate(batch.rival.tolist())]
        return [
            {
                "row": batch.row_ids[i],
                "pair": batch.row_ids[first[i]] if batch.rival[i] >= 0 else None,
                "prompt": int(batch.group[i]),  # as it was before it was cut, which goes by the completion
                "desirable": bool(batch.desirable[i]),
                "tokens": tokens[i],
                "policy_logp": policy[i],
                "reference_logp": reference[i],
                "kl": kl[i],
            }
            for i in range(len(batch))
        ]


def _prepared(run: Path, ckpt_path: str | None) -> Evaluation:
    """The evaluation of a run: the reference is what the policy was before, the policy has its trained weights."""
    of_run = module_of_run(run)
    state = load_trained(run, ckpt_path)
    module = Evaluation(
        of_run.policy_spec,
        reward=LogRatio(),
        reference_point=Zero(),
        value_function=Logistic(beta=1.0),
        feedback=Binary(),
        undesirable="reflect",
        packing=of_run.packing,  # type: ignore[arg-type]
        reference_store=True,
    )
    take_template(module, run)
    # On one device: of several each would see its own share of the rows.
    module.trainer = Trainer(
        logger=False, enable_checkpointing=False, enable_model_summary=False, devices=1, num_nodes=1
    )
    module.configure_model()
    put_weights(module, {k: v for k, v in state.items() if k.startswith("policy.")}, run)
    return module


def _of_pairs(records: list[dict[str, Any]], beta: float) -> dict[str, dict[str, float]]:
    rewards: dict[str, dict[bool, float]] = defaultdict(dict)
    for record in records:
        if record["pair"] is not None:
            rewards[record["pair"]][record["desirable"]] = record["policy_logp"] - record["reference_logp"]
    margins = {pair: both[True] - both[False] for pair, both in rewards.items() if len(both) == 2}
    found = {
        "reward_accuracy": {pair: float(m > 0) + 0.5 * (m == 0) for pair, m in margins.items()},
        "reward_margin": margins,
        "brier": {pair: (1 - 1 / (1 + float(np.exp(-beta * m)))) ** 2 for pair, m in margins.items()},
    }
    example = {r["pair"]: name for r, name in zip(records, _examples(records).values(), strict=True)}
    return {metric: _by_example(values, example) for metric, values in found.items()}


def _of_rows(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    nll = {r["row"]: -r["policy_logp"] / r["tokens"] for r in records}
    example = _examples(records)
    rewards: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for r in records:
        rewards[r["desirable"]][r["row"]] = r["policy_logp"] - r["reference_logp"]
    found = {
        "nll_desirable": _by_example({row: nll[row] for row in rewards[True]}, example),
        "nll_undesirable": _by_example({row: nll[row] for row in rewards[False]}, example),
        "kl_held_out": _by_example({r["row"]: r["kl"] for r in records}, example),
    }
    if rewards[True] and rewards[False]:
        found["reward_auroc"] = _by_example(_auroc_shares(rewards[True], rewards[False]), example)
    return found


def _examples(records: list[dict[str, Any]]) -> dict[str, str]:
    """The example that each row belongs to: the first row with its prompt."""
    first: dict[str, str] = {}
    return {r["row"]: first.setdefault(r["prompt"], r["row"]) for r in records}


def _by_example(values: dict[str, float], example: dict[str, str]) -> dict[str, float]:
    """Values of rows as values of examples with the same mean: the rows of a prompt do not vary by themselves.

    Each is the mean and what the example adds to its error, as of a ratio of two sums (Cochran 1977, section 6.3): how
    many rows an example has is no variation of what is measured.
    """
    if not values:
        return {}
    own: dict[str, list[float]] = defaultdict(list)
    for row, value in values.items():
        own[example[row]].append(value)
    if len({len(each) for each in own.values()}) == 1:  # plain means, without rounding
        return {name: sum(each) / len(each) for name, each in own.items()}
    mean = sum(values.values()) / len(values)
    share = len(own) / len(values)
    return {name: mean + share * (sum(each) - len(each) * mean) for name, each in own.items()}


def _auroc_shares(high: dict[str, float], low: dict[str, float]) -> dict[str, float]:
    """What each row adds to the area under the ROC curve; the mean over all rows is the area.

    Rows of both kinds are a sample. With each row's share of the other kind that it stands right to, less the area, the
    variance of the mean is that of DeLong et al. 1988, summed by pairs that of Obuchowski 1997.
    """

    def below(values: dict[str, float], others: dict[str, float]) -> dict[str, float]:
        """Of each value: the share of the others below it, half of those equal to it."""
        ordered = np.sort(list(others.values()))
        places = [np.searchsorted(ordered, list(values.values()), side=side) for side in ("left", "right")]
        return dict(zip(values, ((places[0] + places[1]) / 2 / len(ordered)).tolist(), strict=True))

    right = {True: below(high, low), False: {row: 1 - share for row, share in below(low, high).items()}}
    area, rows = float(np.mean(list(right[True].values()))), len(high) + len(low)
    return {row: area + rows / len(own) * (share - area) for own in right.values() for row, share in own.items()}


# What a rule and a judge are called with.
CALLED: dict[str, tuple[Any, ...]] = {"rule": ("an answer", True), "judge": ("a prompt", "an answer", "another")}


def function_of(place: str, kind: str) -> Callable[..., Any]:
    """The function named ``path/to/file.py:name``; the file's code is executed.

    Args:
        place: of the function.
        kind: ``rule`` or ``judge``.

    Raises:
        ValueError: where there is none that can be called as one of that kind is.
    """
    path, _, name = place.rpartition(":")
    if not path or not Path(path).is_file():
        raise ValueError(f"{place!r}: no such file; a rule or judge is named path/to/file.py:function")
    try:
        module = module_of_file(Path(path), "study")
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not import: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not callable(found := getattr(module, name, None)):
        raise ValueError(f"{place!r}: {path} has no function {name!r}")
    try:
        inspect.signature(found).bind(*CALLED[kind])
    except TypeError as error:
        raise ValueError(f"{place!r}: a {kind} is called with {len(CALLED[kind])} arguments: {error}") from error
    return found  # type: ignore[no-any-return]


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
    **_: Any,
) -> None:
    """Refuses arguments of :func:`evaluate` that cannot be, before any model is loaded.

    Raises:
        DataError: naming the argument.
        ValueError: where a source of ``held_out`` is none.
    """
    if not held_out and not prompts:
        raise DataError("nothing to measure: name --held_out feedback, --prompts, or both")
    if (rule or judge) and not prompts:
        raise DataError("--rule and --judge look at answers: name --prompts as well")
    least = {"max_length": (max_length, 2), "max_new_tokens": (max_new_tokens, 1), "batch_size": (batch_size, 1)}
    for name, (value, low) in (least | {"temperature": (temperature, 0)}).items():  # type: ignore[dict-item]
        if not value >= low:
            raise DataError(f"{name} is {value}; it must be at least {low}")
    if not beta > 0:
        raise DataError(f"beta is {beta}; it must be above 0")
    check_sampling(temperature, seed)
    try:
        _sources("predict", held_out)
    except ValueError as error:
        raise DataError(str(error).replace("data.predict", "held_out")) from error


def evaluate(
    run: str,
    *,
    held_out: list[str | dict[str, Any]] | None = None,
    prompts: str | None = None,
    rule: str | None = None,
    judge: str | None = None,
    chat: bool = True,
    beta: float = 0.1,
    max_length: int = 1024,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    batch_size: int = 16,
    seed: int = 0,
    ckpt_path: str | None = None,
) -> None:
    """Measure a run's policy on held-out data; the code of rule, judge and the run's config.yaml is executed.

    Measured example by example, so that runs can be compared pair by pair. A run with control tokens is measured
    without them. Special tokens in held-out text are treated as in its training.

    Args:
        run: the run's folder, where evaluation.json, held_out.jsonl and answers.jsonl are written.
        held_out: sources of held-out feedback: paths, or mappings as for data.predict.
        prompts: a .txt file or JSON lines with "prompt": the policy answers each of them.
        rule: path/to/file.py:function(answer, finished) -> bool, which an answer meets or not.
        judge: path/to/file.py:function(prompt, answer, other) -> 1 where it prefers the answer, 0 where the other
            one, which the model gave before it was trained, 0.5 for a draw.
        chat: take a text prompt as a user's message where the tokenizer has a chat template.
        beta: 1 / nats, of the Brier score.
        max_length: tokens of held-out prompt and completion together.
        max_new_tokens: the most tokens of an answer.
        temperature: of the sampling.
        batch_size: rows or answers at a time.
        seed: of the sampling.
        ckpt_path: another checkpoint than the last one: best (that of the run's ModelCheckpoint), or a file.
    """
    arguments = {name: value for name, value in locals().items() if name != "run"}
    folder = Path(run)
    check_arguments(**arguments)
    chosen = {name: function_of(place, name) for name, place in (("rule", rule), ("judge", judge)) if place}
    lines = read_prompt_lines(Path(prompts)) if prompts else []
    how = measuring(arguments) | {"by": provenance()}  # files as they are now, before they are read
    module = _prepared(folder, ckpt_path)
    values: dict[str, dict[str, float]] = {}
    own = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")).get("data") or {}
    text = own.get("special_tokens_in_text", "refuse")
    if held_out:
        data = FeedbackDataModule(
            predict=list(held_out), batch_size=batch_size, max_length=max_length, special_tokens_in_text=text
        )
        batches: Any = module.trainer.predict(module, datamodule=data)
        records = [record for batch in batches for record in batch]
        lost = sum(not np.isfinite([r["policy_logp"], r["reference_logp"], r["kl"]]).all() for r in records)
        if lost:
            raise DataError(
                f"{run}: {lost} of {len(records)} held-out rows have no finite log-prob: the policy diverged"
            )
        write(folder / ROWS, "".join(json.dumps(record) + "\n" for record in records))
        values |= _of_pairs(records, beta) | _of_rows(records)
        if lacking := [name for name, (unit, *_) in METRICS.items() if unit != "prompts" and not values.get(name)]:
            kinds = {True: "pairs", False: "both desirable and undesirable rows"}
            wanted = dict.fromkeys(kinds[METRICS[name][0] == "pairs"] for name in lacking)
            print(f"halos: not measured, as the held-out data lack {' and '.join(wanted)}: {', '.join(lacking)}")
    if prompts:
        module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        sampling |= {"special_tokens_in_text": text}
        values |= _of_answers(module, folder, Path(prompts).name, lines, chosen, chat, batch_size, sampling)
    kept = {name: found for name, found in values.items() if found}
    (folder / FILE).unlink(missing_ok=True)  # or what is there would be said to have been measured in this way
    write(folder / MEASURED, json.dumps(how, indent=2) + "\n")
    write(folder / FILE, json.dumps(kept) + "\n")
    for name, found in kept.items():
        print(f"halos: {name} {np.mean(list(found.values())):.4g} (n = {len(found)} prompts)")


def _verdict(given: Any, prompt: str) -> float:
    """A judge's verdict, which has to lie between 0 and 1.

    Raises:
        DataError: naming the prompt.
    """
    try:
        verdict = float(given)
    except (TypeError, ValueError):
        verdict = float("nan")
    if isinstance(given, str) or not 0 <= verdict <= 1:
        raise DataError(
            f"the judge says {given!r} of the prompt {prompt[:60]!r}; it must say 1 where the answer is preferred, 0"
            " where the other one is, 0.5 for a draw"
        )
    return verdict


def _met(given: Any, prompt: str) -> float:
    """What a rule says of an answer, True or False (or 1 or 0): a text, say, would count as met whatever it says.

    Raises:
        DataError: naming the prompt.
    """
    if isinstance(given, (bool, int, float, np.bool_, np.number)) and given in (0, 1):
        return float(given)
    raise DataError(
        f"the rule says {given!r:.60} of the answer to {prompt[:60]!r}; it must say True or False: return bool(...)"
    )


def _called(kind: str, function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    """What a rule or judge says.

    Raises:
        DataError: where it fails or leaves the process, naming the prompt and the line of its code.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"the {kind} fails on the answer to {name}: {why} ({at.filename}:{at.lineno})") from error


def _of_answers(
    module: Evaluation,
    folder: Path,
    source: str,
    lines: list[tuple[int, Prompt]],
    chosen: dict[str, Callable[..., Any]],
    chat: bool,
    batch_size: int,
    sampling: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Metrics of the answers that the policy gives to the prompts at the lines of a source."""
    assert module.policy is not None
    read = [prompt for _, prompt in lines]
    names = [f"{source}:{number}" for number, _ in lines]
    asked = as_messages(read, module.tokenizer, chat)

    def answers(model: Any) -> list[Sample]:
        how = {"batch_size": batch_size, "names": names, "progress": False, **sampling}
        found = generate(model, module.tokenizer, asked, **how)
        return [samples[0] for samples in found]

    samples = answers(module.policy)
    columns: dict[str, list[float]] = {
        "kl": list(kl_of_samples(module.policy, module.scoring, samples, batch_size)),
        "length": [float(len(s.completion_ids)) for s in samples],
        "finished": [float(s.finished) for s in samples],
    }
    texts = [p if isinstance(p, str) else p[-1]["content"] for p in read]
    if "rule" in chosen:
        said = [_called("rule", chosen["rule"], n, s.text, s.finished) for n, s in zip(names, samples, strict=True)]
        columns["rule"] = [_met(*both) for both in zip(said, texts, strict=True)]
    if "judge" in chosen:
        with module.scoring() as before:
            others = answers(before)
        columns["judge"] = [
            _verdict(_called("judge", chosen["judge"], name, prompt, s.text, o.text), prompt)
            for name, prompt, s, o in zip(names, texts, samples, others, strict=True)
        ]
    with whole(folder / ANSWERS) as file:
        for name, prompt, sample in zip(names, read, samples, strict=True):
            record = {"row": name, "prompt": prompt, "answer": sample.text, "finished": sample.finished}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    # A prompt that is listed twice is one example with two answers.
    first: dict[str, str] = {}
    example = {name: first.setdefault(json.dumps(prompt), name) for name, prompt in zip(names, read, strict=True)}
    return {metric: _by_example(dict(zip(names, found, strict=True)), example) for metric, found in columns.items()}
