"""Finds questions of benchmarks in the data that a run was trained on.

A question is in the data if 13 consecutive words of it are (Brown et al. 2020, "Language Models are Few-Shot Learners",
appendix C), ignoring case and punctuation. Words that more than ten questions of a benchmark share are its own
boilerplate and do not count; questions of fewer than 13 words cannot be found. Words that up to ten questions share
count for each of them: which of these the data contain cannot be told from the words. All questions are
looked for, not only those that a limit drew: whether a benchmark is compared does not depend on the draw.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos_pl.common.messages import counted, plain
from halos_pl.common.yaml_files import read_yaml
from halos_pl.data.formats import rows
from halos_pl.data.sources import sources_of
from halos_pl.run_dir import CONFIG
from halos_pl.tasks.load import Benchmark

WORDS, BOILERPLATE = 13, 10
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """Questions of a benchmark that are in the training data.

    Attributes:
        name: Name of the benchmark.
        seen: Number of its questions that are in the data.
        questions: Number of its questions.
        drawn_seen: Number of its drawn questions that are in the data.
        drawn: Number of its drawn questions.
        example: One of those in the data.
        place: File and line of that one in the data.
    """

    name: str
    seen: int
    questions: int
    drawn_seen: int
    drawn: int
    example: str
    place: str

    def line(self, run: Path) -> str:
        """One line for the terminal."""
        part = f"; {self.drawn_seen} of them among the {self.drawn} drawn" if self.drawn < self.questions else ""
        return plain(
            f"halos: {self.name} is not compared: the training data of {run} contain {WORDS} consecutive words of"
            f" {self.seen} of its {counted(self.questions, 'question')}, such as {self.example} in {self.place}{part}"
        )


def grams(texts: Iterable[str]) -> Iterator[int]:
    """A hash of each 13 consecutive words of the texts; equal words have equal hashes within a process."""
    for text in texts:
        words = _WORD.findall(text.lower())
        for start in range(len(words) - WORDS + 1):
            yield hash(tuple(words[start : start + WORDS]))


def texts_of(value: Any) -> Iterator[str]:
    """All strings in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from texts_of(part)


def questions_by_gram(benchmark: Benchmark) -> dict[int, tuple[str, ...]]:
    """The questions that contain each 13 consecutive words, without boilerplate."""
    owners: dict[int, tuple[str, ...]] = {}
    for leaf, index, doc in benchmark.all_docs():
        alone = (f"{leaf}/{index}",)
        for gram in set(grams(texts_of(doc))):
            names = owners.get(gram, ())
            if len(names) <= BOILERPLATE:
                owners[gram] = names + alone if names else alone
    for gram in [gram for gram, names in owners.items() if len(names) > BOILERPLATE]:
        del owners[gram]
    return owners


def overlaps(run: Path, benchmarks: Sequence[Benchmark]) -> list[Overlap]:
    """The benchmarks whose questions are in a run's training data.

    The data are read once, as the run's config names them, row by row; memory grows with the questions only.

    Args:
        run: Folder of the run.
        benchmarks: Benchmarks with their questions.

    Raises:
        DataError: if the data cannot be read any more.
    """
    train = (read_yaml(run / CONFIG)[0].get("data") or {}).get("train")
    owners = [questions_by_gram(benchmark) for benchmark in benchmarks]
    hits_of: list[dict[str, str]] = [{} for _ in benchmarks]
    for place, row in _training_rows(run, train):
        for gram in set(grams(texts_of(row))):
            for of_benchmark, hits in zip(owners, hits_of, strict=True):
                for question in of_benchmark.get(gram, ()):
                    hits.setdefault(question, place)
    return [_overlap(*each) for each in zip(benchmarks, hits_of, strict=True) if each[1]]


def _overlap(benchmark: Benchmark, hits: Mapping[str, str]) -> Overlap:
    """The questions that were found, by their places in the data."""
    drawn = {f"{leaf}/{index}" for leaf in benchmark.drawn for index in benchmark.indices(leaf)}
    example = next((name for name in hits if name in drawn), next(iter(hits)))
    both = len(drawn.intersection(hits))
    return Overlap(benchmark.name, len(hits), benchmark.total, both, len(drawn), example, hits[example])


def _training_rows(run: Path, train: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    kinds: Counter[str] = Counter()
    for source in sources_of("train", train):
        for line, row in rows(source):
            if isinstance(row, dict):
                yield source.place(line), row
            elif row.fatal:
                kinds[f"{row.place}: {row.reason}"] += 1
    if kinds:
        print(
            plain(
                f"halos: the training data of {run} cannot be read, so that it is unknown whether they contain the"
                f" benchmarks' questions: {next(iter(kinds))}"
            )
        )
