"""Measures a model on benchmarks and, for a run, the model before training."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halos_pl.policy.loading import load_model
from halos_pl.tasks.contamination import Overlap, overlaps
from halos_pl.tasks.kept import digest, run_once
from halos_pl.tasks.load import Benchmark, load, unscored
from halos_pl.tasks.options import Benchmarks, check_chat
from halos_pl.tasks.run import Prompting, Values, check_prompts, described, line_of
from halos_pl.tasks.sandbox import check_sandbox
from halos_pl.tasks.unused import without_effect
from halos_pl.training.named_model import NamedModel


@dataclass(frozen=True)
class Prepared:
    """Benchmarks that are checked and ready to run on a model.

    Attributes:
        named: The model.
        benchmarks: The benchmarks with their drawn questions.
        how: How questions become prompts.
        seed: Seed of the draw.
        contaminated: Benchmarks whose questions the model was trained on.
        digest: Hash of the questions and prompts.
    """

    named: NamedModel
    benchmarks: Sequence[Benchmark]
    how: Prompting
    seed: int
    contaminated: Sequence[Overlap]
    digest: str

    @property
    def record(self) -> dict[str, Any]:
        """What is measured, for ``measured.json``."""
        names = {overlap.name: overlap for overlap in self.contaminated}
        return {
            each.name: described(each, self.seed)
            | {"chat_template": self.how.chat, "fewshot_as_multiturn": self.how.multiturn}
            | ({"not_scored": kinds} if (kinds := unscored(each)) else {})
            | ({"trained_on": f"{names[each.name].seen} questions"} if each.name in names else {})
            for each in self.benchmarks
        }

    def questions(self, metric: str) -> int:
        """The number of questions that a metric is measured on."""
        name = metric.partition("/")[0]
        return sum(
            len(each.indices(leaf)) for each in self.benchmarks for leaf in each.drawn if name in (each.name, leaf)
        )

    def measure(self, folder: Path, before_folder: Path) -> tuple[Values, Values]:
        """Runs the benchmarks and writes lm-eval's files.

        Args:
            folder: Folder for the files of the model.
            before_folder: Folder for those of a run's model before training.

        Returns:
            The values of the model, and those of a run's model before training (otherwise empty), without the
            benchmarks that the model was trained on.
        """
        tokenizer = self.named.tokenizer()
        model = self.named.load()
        values = self._run(model, tokenizer, self.named.name, folder)
        before: Values = {}
        if self.named.run:
            device = next(model.parameters()).device
            del model
            gc.collect()  # the model and lm-eval's wrapper refer to each other
            torch.cuda.empty_cache()
            start: Any = load_model(self.named.spec)
            before = self._run(start.to(device).eval(), tokenizer, self.named.spec.path, before_folder)
        return self._compared(values), self._compared(before)

    def _run(self, model: Any, tokenizer: Any, name: str, folder: Path) -> Values:
        return run_once(model, tokenizer, name, self.benchmarks, self.how, folder, questions=self.digest)

    def _compared(self, values: Values) -> Values:
        names = {overlap.name for overlap in self.contaminated}
        left_out = names | {leaf for each in self.benchmarks if each.name in names for leaf in each.leaves}
        return {name: column for name, column in values.items() if name.partition("/")[0] not in left_out}


def prepare(named: NamedModel, benchmarks: Benchmarks, text_prompts: str, batch_size: int, seed: int) -> Prepared:
    """Loads benchmarks, draws their questions and checks that the model can answer them. Loads no weights.

    Args:
        named: The model.
        benchmarks: Names and options.
        text_prompts: How the model's other text prompts are encoded, ``plain`` or ``chat``.
        batch_size: Prompts in a batch.
        seed: Seed of the draw.

    Raises:
        DataError: for benchmarks that cannot be loaded, prompts that are too long, an option that no benchmark uses, or
            a machine without a sandbox.
    """
    chat = benchmarks.chat(text_prompts)
    if not chat:
        check_chat(benchmarks)
    if benchmarks.allow_code_execution:
        check_sandbox()
    loaded = load(benchmarks, seed)
    how = Prompting(chat, benchmarks.multiturn(chat), benchmarks.system, batch_size)
    lines = without_effect(benchmarks, loaded)
    check_prompts(named, loaded, how)
    print("\n".join(lines), end="\n" * bool(lines))
    for each in loaded:
        print(line_of(each, seed))
        if kinds := unscored(each):
            kept = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
            print(f"halos: {each.name}: instructions not scored for lack of NLTK's punkt_tab: {kept}")
    unused = not chat and named.tokenizer().chat_template
    hint = "; apply_chat_template would put them into the model's chat template" if unused else ""
    print(f"halos: benchmark prompts {'go through the chat template' if chat else f'are plain text{hint}'}")
    contaminated = overlaps(named.run, loaded) if named.run else []
    for overlap in contaminated:
        assert named.run is not None
        print(overlap.line(named.run))
    return Prepared(named, loaded, how, seed, contaminated, digest(loaded))
