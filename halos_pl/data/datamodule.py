"""The DataModule: files in, one ``FlatBatch`` an optimizer step out."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from halos_pl.data.batches import Row, StepDataset, StepSampler, seeded
from halos_pl.data.read import DataError, Example, read_files
from halos_pl.data.tokenize import encode_completion, encode_prompt
from halos_pl.outcomes import FlatBatch, Needs

SPLITS = ("train", "validation", "test", "predict")


@dataclass(frozen=True)
class ControlTokens:
    """Texts put between prompt and completion that tell the model what follows, for conditional fine-tuning.

    They are tokenised like any text of the prompt and carry no loss. To sample from the model afterwards, end the
    prompt with the desirable one.

    Attributes:
        desirable, undesirable: the text for rows of either label.
    """

    desirable: str = "<|good|>"
    undesirable: str = "<|bad|>"


@dataclass
class FileCounts:
    """What became of one file's rows.

    Attributes:
        examples: lines with data.
        pairs: examples that enter as pairs of rivals.
        rows: rows that enter; a pair has two.
        desirable, undesirable: the same rows by label.
        prompts_cut: rows whose prompt lost tokens at its start.
        completions_cut: rows whose completion lost tokens at its end, its EOS among them.
        dropped_too_long: rows left out because the completion does not fit (``truncate_completions`` off).
        dropped_undesirable: rows left out because the objective wants desirable ones only.
        dropped_same_prompt: rows left out by ``one_completion_per_prompt``.
    """

    examples: int = 0
    pairs: int = 0
    rows: int = 0
    desirable: int = 0
    undesirable: int = 0
    prompts_cut: int = 0
    completions_cut: int = 0
    dropped_too_long: int = 0
    dropped_undesirable: int = 0
    dropped_same_prompt: int = 0

    def __str__(self) -> str:
        text = f"{self.examples} examples, {self.rows} rows ({self.desirable} desirable, "
        text += f"{self.undesirable} undesirable), {self.pairs} pairs"
        seldom = (
            (self.prompts_cut, "prompts cut at the start"),
            (self.completions_cut, "completions cut at the end (so without EOS)"),
            (self.dropped_too_long, "rows dropped: completion too long"),
            (self.dropped_undesirable, "rows dropped: undesirable, which the objective does not use"),
            (self.dropped_same_prompt, "rows dropped: another row has the same prompt"),
        )
        return "; ".join([text, *(f"{number} {what}" for number, what in seldom if number)])


class Table:
    """A split's rows, tokenised and cut to ``max_length``: what ``StepDataset`` is made from.

    Attributes:
        prompts: the distinct prompts, uncut.
        rows: see ``Row``.
        examples: the rows of each example, one or the two of a pair.
        counts: per file.
    """

    def __init__(
        self,
        files: dict[str, list[Example]],
        tokenizer: PreTrainedTokenizerBase,
        needs: Needs,
        *,
        max_length: int,
        truncate_completions: bool,
        control_tokens: ControlTokens | None = None,
    ) -> None:
        self._control: dict[bool, tuple[int, ...]] = {True: (), False: ()}
        if control_tokens is not None:
            for label, text in ((True, control_tokens.desirable), (False, control_tokens.undesirable)):
                self._control[label] = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        self.prompts: list[tuple[int, ...]] = []
        self.rows: list[Row] = []
        self.examples: list[tuple[int, ...]] = []
        self.counts = {path: FileCounts() for path in files}
        self._known: dict[tuple[int, ...], int] = {}
        for path, examples in files.items():
            counts = self.counts[path]
            for example in examples:
                counts.examples += 1
                try:
                    prompt = encode_prompt(tokenizer, example.prompt)
                    completions = [
                        encode_completion(tokenizer, example.prompt, c) for c in example.completions
                    ]
                except ValueError as error:
                    raise DataError(f"{example.row_id}: {error}") from error
                if needs.rivals and not example.is_pair:
                    raise DataError(
                        f"{example.row_id}: the objective compares the two completions of a pair, but this "
                        "file has single completions with labels (prompt+completion+label). Use a file with "
                        "prompt+chosen+rejected, or an objective for binary feedback such as KTO."
                    )
                self._add(example, prompt, completions, needs, counts, max_length, truncate_completions)

    def _add(
        self,
        example: Example,
        prompt: list[int],
        completions: list[list[int]],
        needs: Needs,
        counts: FileCounts,
        max_length: int,
        truncate: bool,
    ) -> None:
        wanted = [needs.rivals or needs.undesirable or label for label in example.labels]
        counts.dropped_undesirable += wanted.count(False)
        room = max_length - 1 - max(map(len, self._control.values()))  # at least one token of the prompt stays
        if room < 1:
            raise DataError(f"data.max_length is {max_length}, which data.control_tokens alone fill; raise it.")
        fits = [truncate or len(completion) <= room for completion in completions]
        if needs.rivals and not all(fits):
            fits = [False] * len(fits)  # a pair goes as a whole
        kept = [i for i in range(len(completions)) if wanted[i] and fits[i]]
        counts.dropped_too_long += wanted.count(True) - len(kept)
        if not kept:
            return
        # Both completions of a pair get the same prompt, so the longer one says what is left of it.
        longest = max(min(len(completions[i]), room) for i in kept)
        length = min(len(prompt), room + 1 - longest)
        number = self._known.setdefault(tuple(prompt), len(self.prompts))
        if number == len(self.prompts):
            self.prompts.append(tuple(prompt))
        places = []
        for i in kept:
            counts.rows += 1
            counts.desirable += example.labels[i]
            counts.undesirable += not example.labels[i]
            counts.prompts_cut += length < len(prompt)
            counts.completions_cut += len(completions[i]) > room
            name = example.row_id + (("#chosen", "#rejected")[i] if example.is_pair else "")
            place = len(self.rows)
            places.append(place)
            label = example.labels[i]
            rival = (place + 1, place - 1)[i] if needs.rivals else -1
            row = Row(number, length, tuple(completions[i][:room]), label, name, rival, self._control[label])
            self.rows.append(row)
        if needs.rivals:
            counts.pairs += 1
            self.examples.append(tuple(places))
        else:  # unpaired before anything is shuffled: the two rows go their own ways
            self.examples.extend((place,) for place in places)

    def keep_prompts_together(self) -> None:
        """Make all rows of a prompt one example."""
        by_prompt: dict[int, list[int]] = {}
        for place, row in enumerate(self.rows):
            by_prompt.setdefault(row.prompt, []).append(place)
        self.examples = [tuple(places) for places in by_prompt.values()]

    def keep_one_per_prompt(self, seed: int) -> None:
        """Keep one row, drawn with ``seed``, of each distinct prompt; count the others."""
        by_prompt: dict[int, list[int]] = {}
        for place, row in enumerate(self.rows):
            by_prompt.setdefault(row.prompt, []).append(place)
        draw = seeded("one completion per prompt", seed)
        chosen = {draw.choice(places) for places in by_prompt.values()}
        for place, row in enumerate(self.rows):
            if place not in chosen:
                counts = self.counts[row.row_id.rpartition(":")[0]]
                counts.rows -= 1
                counts.dropped_same_prompt += 1
                counts.desirable -= row.desirable
                counts.undesirable -= not row.desirable
        self.rows = [self.rows[place] for place in sorted(chosen)]
        self.examples = [(place,) for place in range(len(self.rows))]

    @cached_property
    def digest(self) -> str:
        """A hash of what the model would see, in order; file names are no part of it."""
        digest = hashlib.sha256()
        for example in self.examples:
            for row in (self.rows[place] for place in example):
                kept = self.prompts[row.prompt][-row.prompt_length :]
                seen = (kept, row.completion, row.desirable, len(example), row.control)
                digest.update(repr(seen).encode())
        return digest.hexdigest()


def _identity(batch: Any) -> Any:
    return batch


class FeedbackDataModule(LightningDataModule):
    """Human feedback from JSON files, as one ``FlatBatch`` an optimizer step.

    Every file holds one kind of row: ``prompt``, ``completion``, ``label`` (binary feedback), or ``prompt``,
    ``chosen``, ``rejected`` (pairs); texts or message lists. What the objective needs of them (rivals,
    mismatched rows, undesirable rows) is asked of ``lightning_module.objective.needs``; pairs under an
    objective without rivals become independent rows. The tokenizer is ``lightning_module.tokenizer``.

    Args:
        train, validation, test, predict: a file or a list of files (``.jsonl``, ``.json``, either with
            ``.gz``) for each stage. ``predict`` falls back to ``test``, then to ``validation``. All but
            ``train`` keep every row, and pairs as rivals, whatever the objective needs.
        batch_size: examples of one optimizer step over all ranks together: rows; pairs where the objective
            needs rivals; prompts, with all their rows, where it compares the rows of a prompt.
        eval_batch_size: the same for the other stages; default ``batch_size``.
        max_length: tokens of prompt and completion together. A prompt that does not fit is cut at its start,
            the same for both completions of a pair.
        truncate_completions: cut a completion of ``max_length`` tokens or more at its end; False drops the
            row (the pair, where the objective needs rivals). Either way the number is reported.
        shuffle: shuffle the training examples anew each epoch.
        drop_last: leave out a smaller last training step.
        one_completion_per_prompt: train on one row, drawn with the seed, of each distinct prompt.
        control_tokens: texts between prompt and completion that name the row's label; null for none.
        num_workers: processes that make batches; the batches do not depend on it.
        seed: what order and mismatches depend on; default the global seed (``seed_everything``), else 0.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        truncate_completions: bool = True,
        shuffle: bool = True,
        drop_last: bool = False,
        one_completion_per_prompt: bool = False,
        control_tokens: ControlTokens | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1),
            ("max_length", max_length, 2),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}.")
        files = {"train": train, "validation": validation, "test": test}
        files["predict"] = predict or test or validation
        self.files: dict[str, list[str]] = {
            split: [value] if isinstance(value, str) else list(value or []) for split, value in files.items()
        }
        for split, paths in self.files.items():
            if twice := [path for path in dict.fromkeys(paths) if paths.count(path) > 1]:
                raise ValueError(
                    f"data.{split} lists {', '.join(twice)} more than once; list each file once."
                )
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length, self.truncate_completions = max_length, truncate_completions
        self.shuffle, self.drop_last = shuffle, drop_last
        self.one_completion_per_prompt = one_completion_per_prompt
        self.control_tokens = control_tokens
        self.num_workers, self.seed = num_workers, seed
        self._examples: dict[str, list[Example]] = {}  # by file, each read once a process
        self._tables: dict[str, Table] = {}
        self._resume = (0, 0)

    # Reading ---------------------------------------------------------------------------------------

    def _splits(self, stage: str | None) -> list[str]:
        """The splits of the stage that have files; every split where no stage is named."""
        required = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}.get(
            stage or ""
        )
        if required and not self.files[required]:
            raise ValueError(f"No {required} data: set data.{required} to a file or a list of files.")
        wanted = SPLITS if required is None else (required, *(["validation"] if stage == "fit" else []))
        return [split for split in wanted if self.files[split]]

    def _read(self, splits: Sequence[str]) -> None:
        paths = dict.fromkeys(path for split in splits for path in self.files[split])
        self._examples |= read_files([path for path in paths if path not in self._examples])

    def prepare_data(self) -> None:
        """Read and check every file of the stage; Lightning calls it before a model is loaded."""
        state = self.trainer.state.fn if self.trainer else None
        self._read(self._splits(str(state.value) if state else None))

    def setup(self, stage: str | None = None) -> None:
        """Tokenise the stage's files for the module's tokenizer and its objective's needs.

        Raises:
            DataError: a fault in a file or in a row, or data that do not suit the objective.
        """
        if self.trainer is None or self.trainer.lightning_module is None:
            raise RuntimeError(
                "FeedbackDataModule.setup needs a Trainer and a module: use it with Trainer.fit."
            )
        splits = self._splits(stage)
        self._read(splits)
        for split in splits:
            self._tables[split] = self._table(split)

    def _needs(self, split: str) -> Needs:
        module: Any = self.trainer.lightning_module if self.trainer else None
        needs: Needs = module.objective.needs
        if split == "train":
            return needs
        # What is held out is measured on every row, and on pairs as pairs, whatever the loss is made from.
        pairs = all(example.is_pair for path in self.files[split] for example in self._examples[path])
        return replace(needs, undesirable=True, rivals=needs.rivals or pairs)

    def _table(self, split: str) -> Table:
        module: Any = self.trainer.lightning_module if self.trainer else None
        needs = self._needs(split)
        table = Table(
            {path: self._examples[path] for path in self.files[split]},
            module.tokenizer,
            needs,
            max_length=self.max_length,
            truncate_completions=self.truncate_completions,
            control_tokens=self.control_tokens,
        )
        if split == "train" and self.one_completion_per_prompt:
            if needs.rivals:
                raise ValueError(
                    "data.one_completion_per_prompt would tear pairs apart, and the objective needs both "
                    "completions of each; set it to false."
                )
            table.keep_one_per_prompt(self._seed)
        if needs.groups:
            table.keep_prompts_together()
        for path, counts in table.counts.items():
            rank_zero_info(f"{split} data {path}: {counts}")
        if not table.rows:
            raise DataError(
                f"{', '.join(self.files[split])}: no row is left for {split}, see the counts above."
            )
        return table

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """``{split: {file: {name: number}}}`` of the splits set up so far; the names are ``FileCounts``'."""
        return {
            split: {path: asdict(counts) for path, counts in table.counts.items()}
            for split, table in self._tables.items()
        }

    # Loaders ---------------------------------------------------------------------------------------

    def _loader(self, split: str) -> DataLoader[FlatBatch]:
        train, table = split == "train", self._tables[split]
        # None where there is one process; with model parallelism these are not the world's rank and size.
        place: dict[str, Any] = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        world_size, rank = place.get("num_replicas", 1), place.get("rank", 0)
        try:
            dataset = StepDataset(
                table.prompts,
                table.rows,
                table.examples,
                max_length=self.max_length,
                probes=self._needs(split).probes,
                seed=self._seed,
                rank=rank,
                world_size=world_size,
            )
            sampler = StepSampler(
                len(dataset),
                batch_size=self.batch_size if train else self.eval_batch_size,
                world_size=world_size,
                seed=self._seed,
                shuffle=self.shuffle and train,
                drop_last=self.drop_last and train,
                same_every_epoch=not train,
            )
        except ValueError as error:
            raise DataError(f"{split} data ({', '.join(self.files[split])}): {error}") from error
        if train:
            # Lightning makes the first iterator before it tells the sampler the epoch.
            epoch, sampler.start = self._resume
            sampler.set_epoch(epoch)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Iterating draws a seed for the workers. From the global state it would change a resumed run, which
            # iterates less often.
            generator=torch.Generator().manual_seed(self._seed),
            collate_fn=_identity,
        )

    def resume_at(self, epoch: int, step: int) -> None:
        """Let the next training loader begin at step ``step`` of ``epoch``; the epochs after it are whole."""
        self._resume = (epoch, step)

    def train_dataloader(self) -> DataLoader[FlatBatch]:
        loader = self._loader("train")
        self._resume = (0, 0)
        return loader

    def val_dataloader(self) -> DataLoader[FlatBatch] | list[Any]:
        if not self.files["validation"]:
            # None is meant, so Lightning's "make sure this was your intention" would only worry the user.
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[FlatBatch]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[FlatBatch]:
        return self._loader("predict")

    # Checkpoints -----------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "training data": self._tables["train"].digest,
            "batch_size": self.batch_size,
            "seed": self._seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "objective's needs": json.dumps(asdict(self._needs("train"))),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint()} if "train" in self._tables else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other data or batches than the checkpoint's: it would be another run.

        Raises:
            ValueError: naming what differs. Nothing is checked where no training data are set up.
        """
        if "train" not in self._tables or "fingerprint" not in state_dict:
            return
        saved, now = state_dict["fingerprint"], self._fingerprint()
        differing = [
            f"{key} (saved {saved.get(key)}, now {now[key]})" for key in now if saved.get(key) != now[key]
        ]
        if differing:
            raise ValueError(
                f"The checkpoint was written by a run with other data or batches: {'; '.join(differing)}. "
                "Resume with the same settings, or start a new run from the checkpoint's weights instead."
            )
