"""The settings of online training, and the commands of its stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from halos_pl.run_dir import LAST

#: The value of ``offline`` for feedback that is sampled from the first model.
SAMPLED = "sampled"
#: Name of the model before the first round, in the report.
FIRST = "first model"
#: Options of ``halos label`` for other forms than scores.
_OF_FORMS = ("threshold", "pairs", "min_gap", "seed")
#: Settings of the data of a fit that decide how text becomes tokens, in every stage.
TEXT = ("text_prompts", "chat_template", "special_tokens_in_text")
#: Folder of the offline run, and its name in the report.
OFFLINE = "offline"


class RoundsError(ValueError):
    """A file of rounds that cannot be run, or a stage that failed; the message names the place and the fix."""


@dataclass(frozen=True)
class Rounds:
    """The content of a file for ``halos rounds``.

    Attributes:
        path: Path of the file.
        model: The first model: a hub name, a folder, or ``package:NAME``.
        prompts: File of prompts to sample completions of.
        held_out_prompts: File of prompts that every model answers.
        rounds: Number of rounds.
        window: Number of prompts per round.
        seed: Seed of the first round; each round adds 1.
        sample: Options of ``halos sample``.
        label: Options of ``halos label``; ``by`` names the labellers.
        objective: Objective of ``halos fit``.
        configs: Its config files.
        options: Its other options, by dotted key.
        reference: Whether the reference is the ``first`` model or that of the ``last`` round; None if the configs name
            a reference model.
        optimizer: Whether the optimizer's state is ``carried`` from round to round or ``fresh`` in each.
        evaluate: Options of ``halos evaluate``.
        answers: Number of answers to each held-out prompt.
        offline: Feedback of a run for comparison, with as many steps as all rounds: a file, or :data:`SAMPLED`; None
            without such a run.
        note: Question of the study, for the report.
        places: File and line of some keys, for errors.
    """

    path: Path
    model: str
    prompts: Path
    held_out_prompts: Path
    rounds: int
    window: int
    seed: int
    sample: Mapping[str, Any]
    label: Mapping[str, Any]
    objective: str
    configs: tuple[str, ...]
    options: Mapping[str, Any]
    reference: Literal["first", "last"] | None
    optimizer: Literal["carried", "fresh"]
    evaluate: Mapping[str, Any]
    answers: int
    offline: str | None
    note: str = ""
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def labellers(self) -> list[str]:
        """The labellers, as ``KIND: NAME``."""
        by: Any = self.label["by"]
        return [by] if isinstance(by, str) else list(by)

    @property
    def rule(self) -> str | None:
        """The place of the rule if it is the only labeller: ``halos evaluate`` then scores held-out answers."""
        kind, _, place = (part.strip() for part in self.labellers[0].partition(":"))
        return place if len(self.labellers) == 1 and kind == "rule" else None

    @property
    def primary(self) -> str:
        """The metric that decisions are made on."""
        return "rule" if self.rule else "score"

    def column(self, prompts: Path) -> str | None:
        """The column with the prompt in the copies of a file of prompts; None for the default."""
        return None if prompts.suffix == ".txt" else self.sample.get("prompt_column")

    def place(self, *keys: str) -> str:
        """File and line of a key."""
        return self.places.get(".".join(keys), str(self.path))


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command; None values are left out."""
    set_ = {key: value for key, value in options.items() if value is not None}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in set_.items()]


@dataclass(frozen=True)
class Round:
    """One round, or the offline run.

    Attributes:
        study: The settings.
        out: Folder of all rounds.
        number: Its number, from 1; 0 for the offline run.
    """

    study: Rounds
    out: Path
    number: int

    @property
    def name(self) -> str:
        return f"round {self.number}" if self.number else OFFLINE

    @property
    def folder(self) -> Path:
        return self.out / (f"round-{self.number}" if self.number else OFFLINE)

    @property
    def seed(self) -> int:
        return self.study.seed + max(self.number, 1) - 1

    @property
    def before(self) -> Round | None:
        """The round before; None for the first one and for the offline run."""
        return Round(self.study, self.out, self.number - 1) if self.number > 1 else None

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def labels(self) -> Path:
        """The feedback to train on; for an offline run on a file, that file."""
        offline = self.study.offline
        return Path(offline) if not self.number and offline not in (None, SAMPLED) else self.folder / "labels.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def compared(self) -> Path:
        """Held-out answers of the first model and this one, for the labellers."""
        return self.folder / "compared.jsonl"

    @property
    def scores(self) -> Path:
        return self.folder / "scores.jsonl"

    @property
    def stages(self) -> list[str]:
        """Its stages, in order."""
        stages = ["fit", "evaluate"]
        if self.number or self.study.offline == SAMPLED:
            stages = ["sample", "label", *stages]
        if not self.study.rule:
            stages.append("score")
        if self.study.reference == "last" and 0 < self.number < self.study.rounds:
            stages.append("export")
        return stages

    def words(
        self, stage: str, text: Mapping[str, Any], like: Mapping[str, Any], steps: int | None = None
    ) -> list[str]:
        """The words of a stage's command, after ``halos``.

        Args:
            stage: Name of the stage.
            text: How prompts become tokens, as in training: the settings :data:`TEXT`.
            like: Settings of the policy that a reference loaded from a folder has too, such as its dtype.
            steps: Number of optimizer steps of the offline run.
        """
        study = self.study
        if stage == "sample":
            model = str(self.before.run) if self.before else study.model
            options = {"prompts": str(self.prompts), **text, **study.sample, "seed": self.seed}
            options |= {"prompt_column": study.column(study.prompts), "out": str(self.samples)}
            return ["sample", model, *words_of(options)]
        if stage == "label":
            drawn = {"seed": self.seed} if study.label.get("pairs") == "random" else {}
            options = {**drawn, **study.label, "out": str(self.labels)}
            return ["label", str(self.samples), *words_of(options)]
        if stage == "fit":
            return self._fit(like, steps)
        if stage == "evaluate":
            shared = ("max_new_tokens", "temperature", "batch_size")
            options = {key: study.sample[key] for key in shared if key in study.sample}
            options |= {key: study.sample.get(key, text[key]) for key in ("text_prompts", "chat_template")}
            options |= {"prompts": str(held_out(self.out)), "seed": study.seed}
            options |= {"rule": study.rule, "prompt_column": study.column(study.held_out_prompts)}
            return ["evaluate", str(self.run), *words_of({**options, **study.evaluate})]
        if stage == "score":
            options = {key: value for key, value in study.label.items() if key not in _OF_FORMS}
            # Of held-out answers, empty ones count too.
            options |= {"form": "scored", "out": str(self.scores), "keep_empty": True, "overwrite": True}
            return ["label", str(self.compared), *words_of(options)]
        return ["export", str(self.run), str(self.model), "--overwrite=true"]

    def _fit(self, like: Mapping[str, Any], steps: int | None) -> list[str]:
        study, start = self.study, self.before
        words = ["fit", f"--objective={study.objective}", *(f"--config={path}" for path in study.configs)]
        options: dict[str, Any] = {**study.options, "model.policy.path": study.model, "data.train": str(self.labels)}
        options |= {"seed_everything": self.seed, "run_dir": str(self.run)}
        if steps is not None:
            options |= {"trainer.max_steps": steps, "trainer.max_epochs": -1}
        words += words_of(options)
        if start:
            arguments = {"checkpoint": str(start.run / LAST), "optimizer": study.optimizer == "carried"}
            callback = {"class_path": "halos_pl.training.start_from.StartFrom", "init_args": arguments}
            words.append(f"--trainer.callbacks+={json.dumps(callback)}")
            if study.reference == "last":
                last = {"model": {**like, "path": str(start.model)}}
                words.append(f"--model.reference_model={json.dumps({'class_path': 'OtherModel', 'init_args': last})}")
        return words


def held_out(out: Path) -> Path:
    """The held-out prompts, each repeated once per answer."""
    return out / "held_out.jsonl"


def rounds_of(study: Rounds, out: Path) -> list[Round]:
    """All rounds, and the offline run at the end, if any."""
    numbers = [*range(1, study.rounds + 1), *([0] if study.offline else [])]
    return [Round(study, out, number) for number in numbers]
