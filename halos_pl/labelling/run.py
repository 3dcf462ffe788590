"""Fills a file with labels."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from halos_pl.common.files import check_target
from halos_pl.common.messages import counted, listed
from halos_pl.common.progress import Progress
from halos_pl.endpoint.settings import EndpointSettings
from halos_pl.labelling.agreement import agreement_lines
from halos_pl.labelling.groups import Group, read_groups, without_empty
from halos_pl.labelling.labellers import Labeller, named_labeller
from halos_pl.labelling.options import refuse_unused, thresholds_of
from halos_pl.labelling.output import OutputSettings, Scores, rows_of, share_of_votes
from halos_pl.sampling.sample_file import SampleFile
from halos_pl.training.checkpoint_manifest import file_digest

#: Number of prompts whose labels are written at a time.
CHUNK = 16


def label_file(
    file: str,
    by: str | list[str],
    out: str | None,
    form: Any,
    threshold: float | list[float] | None,
    pairs: Any,
    min_gap: float | None,
    seed: int | None,
    batch_size: int | None,
    text_prompts: Any,
    endpoint: EndpointSettings | None,
    skip_failed: bool,
    keep_empty: bool,
    overwrite: bool,
) -> None:
    """Labels the completions in a file; for the arguments see :func:`halos_pl.labelling.label.label`.

    Raises:
        ValueError: An argument, a row or a labeller is unusable.
        OSError: A file cannot be read or written.
    """
    options: dict[str, Any] = dict(locals())
    names = [by] if isinstance(by, str) else by
    if not names:
        raise ValueError(
            "--by is an empty list; name a labeller: 'rule: FILE:FUNCTION', 'reward: FOLDER', 'judge: NAME'"
        )
    if len({*names}) < len(names):
        raise ValueError(f"--by {names}: name each labeller once")
    refuse_unused(options, names)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if min_gap is not None and not 0 <= min_gap < math.inf:
        raise ValueError(f"min_gap is {min_gap}; it must be 0 or a positive number")
    path = Path(file)
    all_groups = read_groups(path)
    groups = all_groups if keep_empty else without_empty(all_groups)
    if not groups:
        raise ValueError(f"{path}: all completions are empty, so there is nothing to label")
    target = Path(out) if out else path.with_suffix(f".{form}.jsonl")
    if target.exists() and target.samefile(path):
        raise FileExistsError(f"--out {target} is the file of samples, which would be lost; name another file")
    check_target(target)
    transcripts = target.with_name(f"{target.name}.transcripts.jsonl")
    labellers = [
        named_labeller(
            name,
            batch_size=batch_size,
            text_prompts=text_prompts,
            endpoint=endpoint,
            transcripts=transcripts,
            skip_failed=skip_failed,
        )
        for name in names
    ]
    thresholds = thresholds_of(names, labellers, threshold) if form == "binary" else []
    combined = thresholds[0] if len(thresholds) == 1 else 0.5
    output = OutputSettings(form, combined, pairs or "best_worst", min_gap or 0.0, seed or 0)
    settings = {"file": file_digest(path), "by": names, "threshold": threshold, "text_prompts": text_prompts or "plain"}
    settings |= {"keep_empty": keep_empty}
    settings |= {name: value for name, value in vars(output).items() if name != "threshold"}
    labels = SampleFile(target, settings, 1, overwrite=overwrite)
    labels.begin({name: each.load() for name, each in zip(names, labellers, strict=True)})
    if labels.complete:
        print(f"halos: {target} is complete: it contains the labels of this command")
        return
    _fill(labels, groups, names, labellers)
    by_number = {row["prompt_row"]: row["scores"] for row in labels.rows()}
    by_labeller: list[list[Scores]] = [[by_number[group.number][name] for group in groups] for name in names]
    number, labelled = (sum(len(group.completions) for group in some) for some in (all_groups, groups))
    counts = Counter({"empty completions left out": number - labelled})
    rows, scores = [], []
    for i, group in enumerate(groups):
        each = [of_labeller[i] for of_labeller in by_labeller]
        votes: Scores = share_of_votes(each, thresholds) if len(names) > 1 else each[0]
        counts["completions without a verdict"] += sum(vote is None for vote in votes)
        if len(names) > 1 and form == "binary":
            counts["completions skipped: equal numbers of votes"] += sum(vote == 0.5 for vote in votes)
            votes = [None if vote == 0.5 else vote for vote in votes]
        scores += [score for score in votes if score is not None]
        rows += list(rows_of(group, votes, output, counts))
    if not rows:
        labels.discard()
        raise ValueError(f"{path}: no row can be written ({listed(counts)}); change --form, --min_gap or --by")
    labels.finish(rows, counts=dict(counts))
    for line in agreement_lines(names, by_labeller):
        print(f"halos: {line}")
    print(f"halos: score: mean {fmean(scores):.4g}, from {min(scores):.4g} to {max(scores):.4g} (n = {len(scores)})")
    for line in filter(None, (each.summary() for each in labellers)):
        print(f"halos: {line}")
    print(f"halos: {listed(counts)}")
    print(f"halos: {counted(len(rows), 'row')} in {target}, from {counted(len(groups), 'prompt')} of {path}")


def _fill(labels: SampleFile, groups: list[Group], names: list[str], labellers: list[Labeller]) -> None:
    """Scores and writes all prompts that are missing."""
    left = [group for group in groups if group.number not in labels.done]
    if len(left) < len(groups):
        print(f"halos: resumes {labels.part}, which has {len(groups) - len(left)} of {counted(len(groups), 'prompt')}")
    try:
        with Progress(len(groups), "labelling, in prompts", done=len(groups) - len(left)) as progress:
            for labeller in labellers:
                labeller.announce(left)
            for at in range(0, len(left), CHUNK):
                some = left[at : at + CHUNK]
                scores = {name: each.label(some) for name, each in zip(names, labellers, strict=True)}
                for i, group in enumerate(some):
                    labels.add(group.number, [{"scores": {name: scores[name][i] for name in names}}])
                progress.advance(len(some))
    except BaseException:
        if not labels.done:  # an empty file would only keep other commands out
            labels.discard()
            raise
        print(
            f"halos: stopped after {len(labels.done)} of {counted(len(groups), 'prompt')}; their labels are in"
            f" {labels.part}, and the same command resumes",
            file=sys.stderr,
        )
        labels.close()
        raise
