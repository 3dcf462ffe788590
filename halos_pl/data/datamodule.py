"""The DataModule: files in, one ``TokenBatch`` an optimizer step out."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from halos_pl.batch import TokenBatch
from halos_pl.common.stopping import ignore_signals
from halos_pl.data.batches import Order, StepDataset, StepSampler, seeded
from halos_pl.data.example import DataError
from halos_pl.data.formats import files_of, refuse_missing
from halos_pl.data.prompts import TextPrompts, asked, convention, counted, say
from halos_pl.data.source import OnBadRows, Source, source_of
from halos_pl.data.spans import LossOn, check_loss_on
from halos_pl.data.special import SpecialTokens
from halos_pl.data.split import Split, Together
from halos_pl.data.store import Store, fault_list, open_store
from halos_pl.data.table import Table
from halos_pl.data.template import template_of, use_template
from halos_pl.data.tokenize import prefix_ids
from halos_pl.data.transforms import OnePerPrompt, ThresholdScores, Transform

SPLITS = ("train", "validation", "test", "predict")
# A mapping of a source's settings, not a ``Source``: given a file's name for a dataclass, jsonargparse would read the
# file as its settings.
Given = str | dict[str, Any]
Sources = Given | list[Given]


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


def _identity(batch: Any) -> Any:
    return batch


def _ordered(transforms: list[Transform], one_per_prompt: bool) -> list[Transform]:
    """The transforms as given, with ``OnePerPrompt``, if it is asked for, before all that want labels.

    Raises:
        ValueError: for scores that would become labels only when labels have been used.
    """
    place = next((i for i, t in enumerate(transforms) if not t.before_labels), len(transforms))
    late = next((t for t in transforms[place:] if isinstance(t, ThresholdScores) and not t.relabel), None)
    if late:
        name = type(transforms[place]).__name__
        raise ValueError(f"data.transforms: ThresholdScores comes behind {name}, which wants labels; put it before")
    return [*transforms[:place], *([OnePerPrompt()] if one_per_prompt else []), *transforms[place:]]


def _no_source(given: Any) -> str:
    """What was given in place of a source, without its rows, and what is taken instead."""
    takes = "it takes a path, a name on the hub, a mapping {path: ..., ...} of a source's settings, or a list of these"
    if isinstance(given, dict):
        keys = ", ".join(map(str, list(given)[:8]))
        if {"prompt", "completion", "chosen", "messages"} & set(given):
            return f"holds a row, with the columns {keys}; {takes}. Write the rows to a .jsonl file and name that"
        return f"is a mapping without path, with the keys {keys}; {takes}"
    save = ""
    if hasattr(given, "save_to_disk"):
        save = '. Save it with save_to_disk("folder"), and name that folder'
    elif hasattr(given, "to_parquet"):
        save = '. Save it with to_parquet("file.parquet"), and name that file'
    return f"is a {type(given).__name__}; {takes}{save}"


def _sources(split: str, given: Sources | None) -> list[Source]:
    """The sources of a split; a folder or a pattern of files is one source a file.

    Raises:
        ValueError: for one that is listed twice, or a weight of what is not trained on.
    """
    each = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    sources = []
    for one in each:
        if isinstance(one, str):
            sources.append(Source(one))
        elif isinstance(one, Source):
            sources.append(one)
        elif isinstance(one, os.PathLike):
            sources.append(Source(os.fspath(one)))
        elif isinstance(one, dict) and "path" in one:
            sources.append(source_of(one, f"data.{split}"))
        else:
            raise ValueError(f"data.{split} {_no_source(one)}")
    sources = [file for source in sources for file in files_of(source)]
    if split != "train" and any(source.weight != 1 for source in sources):
        raise ValueError(f"data.{split} has a source with a weight; only training data are weighted")
    labels = [source.label for source in sources]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise ValueError(f"data.{split} lists {', '.join(twice)} more than once; list each once, with a weight.")
    return sources


class FeedbackDataModule(LightningDataModule):
    """Human feedback, as one ``TokenBatch`` an optimizer step.

    What the objective needs of the data (paired completions, mismatched rows, undesirable rows) is asked of
    ``lightning_module.objective.needs``; pairs become independent rows where the objective needs no pairs. The
    tokenizer is ``lightning_module.tokenizer``. Every source is read, checked and tokenised once, before a model is
    loaded, into a cache that later runs find by its content; batches are read from there, so memory does not grow
    with the data but by some 60 bytes a row.

    Args:
        train, validation, test, predict: a source or a list of sources for each stage: a path or hub name, or a
            mapping ``{path: ..., split: ..., weight: ...}`` of the settings of ``halos_pl.data.Source``. ``predict``
            falls back to ``test``, then to ``validation``. All but ``train`` keep every row, and pairs as pairs,
            whatever the objective needs.
        batch_size: examples of one optimizer step over all ranks together: rows; pairs where the objective
            needs pairs; prompts, with all their rows, where it compares the rows of a prompt.
        eval_batch_size: the same for the other stages; default ``batch_size``.
        max_length: tokens of prompt and completion together. A prompt that does not fit is cut at its start,
            the same for both completions of a pair.
        truncate_completions: cut a completion of ``max_length`` tokens or more at its end; False drops the
            row (the pair, where the objective needs pairs). Either way the number is reported.
        on_bad_rows: ``error`` names the faulty rows and stops before a model is loaded; ``skip`` leaves them out, with
            their number in the log and in the run's summary.
        special_tokens_in_text: what becomes of special tokens that the data spell, such as ``<|im_end|>`` in a
            message: ``refuse`` counts a row as faulty if one of its messages spells a token that marks turns;
            ``split`` encodes them as plain text; ``allow`` encodes them as the special tokens.
        text_prompts: what a prompt that is plain text means, here and where the run is evaluated or generates:
            ``plain`` encodes it as it is, as TRL does; ``chat`` puts it into the chat template as a user's message
            and the completion as the answer. Message lists always go through the template.
        chat_template: another chat template than the tokenizer's, which for a base model has none: a .jinja file, a
            folder with a tokenizer, ``chatml``, or the template itself. It is kept in the run's folder, and used by
            whatever evaluates, generates or exports the run.
        loss_on: which turns of the assistant carry the loss, each with the token that ends it. ``last``: the last one;
            what comes before it is read as a part of the prompt. ``all``: every turn of a completion, and of a
            conversation that is judged as a whole (``messages``) every turn in it; a prompt in a column of its own, and
            what both conversations of a pair begin with, carry none. What others say never does.
        transforms: changes to the data for studies, applied in order (see ``halos_pl.data.transforms``). Rows that have
            only scores get thumbs by ``ThresholdScores``, at their prompt's mean, unless a transform says otherwise.
        shuffle: shuffle the training examples anew each epoch.
        keep_together: rows that make one example, and so come in the same step, though the objective does not need
            it: ``pairs``, or ``prompts`` with all their rows; ``batch_size`` then counts these. Null for single rows.
        balance_classes: every training step has desirable and undesirable rows in the proportion of the whole data.
        group_by_length: make training steps of examples of about equal length, so that there is less padding.
        drop_last: leave out a smaller last training step.
        one_completion_per_prompt: train on one random row of each distinct prompt: the transform ``OnePerPrompt``
            before all that want labels. It is a setting of its own because an objective file may ask for it.
        control_tokens: texts between prompt and completion that name the row's label; null for none.
        num_workers: processes that make batches; the batches do not depend on it.
        seed: what order and mismatches depend on; default the global seed (``seed_everything``), else 0.
        cache_dir: where tokenised sources are kept; default ``data`` in ``$HALOS_CACHE``, else in
            ``~/.cache/halos_pl``.
    """

    def __init__(
        self,
        train: Sources | None = None,
        validation: Sources | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        truncate_completions: bool = True,
        on_bad_rows: OnBadRows = "error",
        special_tokens_in_text: SpecialTokens = "refuse",
        text_prompts: TextPrompts = "plain",
        chat_template: str | None = None,
        loss_on: LossOn = "last",
        transforms: list[Transform] | None = None,
        shuffle: bool = True,
        keep_together: Together | None = None,
        balance_classes: bool = False,
        group_by_length: bool = False,
        drop_last: bool = False,
        one_completion_per_prompt: bool = False,
        control_tokens: ControlTokens | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        cache_dir: str | None = None,
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
        given = {"train": train, "validation": validation, "test": test, "predict": predict or test or validation}
        self.sources = {split: _sources(split, value) for split, value in given.items()}
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length, self.truncate_completions = max_length, truncate_completions
        self.on_bad_rows = on_bad_rows
        self.special_tokens_in_text, self.text_prompts = special_tokens_in_text, text_prompts
        self.loss_on = loss_on
        #: The text of the template, where the config names one.
        self.chat_template = None if chat_template is None else template_of(chat_template)
        asked("", text_prompts)  # refuses what is no convention
        check_loss_on(loss_on)
        self.transforms = _ordered(list(transforms or []), one_completion_per_prompt)
        self.shuffle, self.drop_last, self.keep_together = shuffle, drop_last, keep_together
        self.balance_classes, self.group_by_length = balance_classes, group_by_length
        self.control_tokens = control_tokens
        self.num_workers, self.seed = num_workers, seed
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self._stores: dict[str, Store] = {}  # by the source's key; each is opened once a process
        self._tokenizer: Any = None
        self._splits: dict[str, Split] = {}
        self._transformed: dict[str, list[dict[str, Any]]] = {}
        self._resume = (0, 0)

    # Reading ---------------------------------------------------------------------------------------

    def _wanted(self, stage: str | None) -> list[str]:
        """The splits of the stage that have sources; every such split where no stage is named."""
        required = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}.get(stage or "")
        if required and not self.sources[required]:
            raise ValueError(f"No {required} data: set data.{required} to a file or a list of files.")
        wanted = SPLITS if required is None else (required, *(["validation"] if stage == "fit" else []))
        return [split for split in wanted if self.sources[split]]

    @property
    def _module(self) -> Any:
        if self.trainer is None or self.trainer.lightning_module is None:
            raise RuntimeError("FeedbackDataModule needs a Trainer and a module: use it with Trainer.fit.")
        return self.trainer.lightning_module

    def _open(self, splits: Sequence[str]) -> None:
        """Opens the stores of the splits; all their faults are known before any is raised."""
        faults: list[tuple[int, str]] = []
        count = 0
        refuse_missing(source for split in splits for source in self.sources[split])
        tokenizer = self._module.tokenizer
        if self.chat_template is not None:
            use_template(tokenizer, self.chat_template)
        if self._tokenizer != (state := (tokenizer, tokenizer.chat_template)):  # of another model
            self._tokenizer, self._stores = state, {}
            if "strftime_now" in str(tokenizer.chat_template):
                rank_zero_warn(
                    "halos: the chat template writes the day's date: prompts that are tokenised on another day, or"
                    " generated from, are other prompts. Write a date into the template, and save the tokenizer"
                )
        for key, source in {s.key: s for split in splits for s in self.sources[split]}.items():
            if key not in self._stores:
                try:
                    how = (self.special_tokens_in_text, self.text_prompts, self.loss_on)
                    self._stores[key] = open_store(source, tokenizer, self.cache_dir, *how)
                except DataError as error:
                    faults.append((1, str(error)))
                    count += 1
                    continue
            if self.on_bad_rows == "error":
                faults += self._stores[key].causes
                count += self._stores[key].fault_count
        if count:
            raise DataError(fault_list(faults, count))

    def prepare_data(self) -> None:
        """Read, check and tokenise every source of the stage; Lightning calls it before a model is loaded.

        Raises:
            DataError: a fault in a source or in a row.
        """
        state = self.trainer.state.fn if self.trainer else None
        # With several ranks ``setup`` raises instead, on all of them: one that dies here leaves the others waiting.
        with suppress(*([DataError] if self.trainer and self.trainer.world_size > 1 else [])):
            self._open(self._wanted(str(state.value) if state else None))

    def setup(self, stage: str | None = None) -> None:
        """Make the stage's data fit the objective's needs.

        Raises:
            DataError: a fault in a source or in a row, or data that do not suit the objective.
        """
        splits = self._wanted(stage)
        self._open(splits)
        for split in splits:
            self._splits[split] = self._split(split)
            self._steps(split)  # now, before a model is loaded and an earlier run's folder is moved aside

    def stores(self, split: str) -> list[Store]:
        """What has been read of the split's sources, after ``setup``."""
        return [self._stores[source.key] for source in self.sources[split]]

    def plan(self, split: str) -> list[Transform]:
        """The transforms of a split in the order in which they are applied, the one that makes labels among them."""
        chosen = [t for t in self.transforms if split == "train" or t.held_out]
        if any(isinstance(t, ThresholdScores) for t in chosen):
            return chosen
        place = next((i for i, t in enumerate(chosen) if not t.before_labels), len(chosen))
        # A loss that compares the rows of a prompt reads the scores themselves: there a row at the mean says something.
        default = ThresholdScores(drop_ties=not self._module.objective.needs.groups)
        return [*chosen[:place], default, *chosen[place:]]

    def _table(self, split: str) -> Table:
        """The split's rows after all transforms, each with a label."""
        table = Table.of(self.stores(split))
        self._transformed[split] = []
        for transform in self.plan(split):
            own = transform in self.transforms
            if not own and not bool((table.label < 0).any()):
                continue  # nothing is without a label
            name = type(transform).__name__
            # By its place in the list as given, so that its draw does not depend on what the plan puts between.
            place = self.transforms.index(transform) if own else len(self.transforms)
            made: Any = transform(table, seeded("transform", self._seed, place))
            if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Table)):
                raise ValueError(f"data.transforms: {name} returned {type(made).__name__}, not (Table, counts)")
            table, counts = made
            self._transformed[split].append({"transform": name, **counts})
            rank_zero_info(f"{split} data, {name}: {', '.join(f'{k} {v}' for k, v in counts.items())}")
        return table

    def _split(self, split: str) -> Split:
        table = self._table(split)
        control = None
        if self.control_tokens is not None:
            texts = {True: self.control_tokens.desirable, False: self.control_tokens.undesirable}
            tokenizer = self._module.tokenizer
            control = {k: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for k, text in texts.items()}
        needs, together = self._module.objective.needs, self.keep_together
        if split != "train":
            # What is held out is measured on every row, and on pairs as pairs, whatever the loss is made from.
            needs = replace(needs, undesirable=True)
            together = "pairs" if bool((table.pair >= 0).any()) else None
        made = Split(
            table,
            needs,
            max_length=self.max_length,
            truncate_completions=self.truncate_completions,
            control=control,
            keep_together=together,
        )
        for store in table.stores:
            said = convention(store.text_prompts, self.text_prompts, bool(self._module.tokenizer.chat_template))
            rank_zero_info(f"{split} data {store.path}: {made.counts[store.path]}")
            say(f"{split} data {store.path}", [*([said] if said else []), *counted(store.notes)])
            if store.unused:
                rank_zero_info(f"{split} data {store.path}: not used: {', '.join(store.unused)}")
            if store.fault_count:
                rank_zero_info(f"{split} data, skipped:\n{fault_list(store.causes, store.fault_count)}")
        for source, store in zip(self.sources[split], table.stores, strict=True):
            if source.weight != 1:
                number = round(source.weight * made.counts[store.path].rows)
                rank_zero_info(f"{split} data {store.path}: weight {source.weight:g}, about {number} rows an epoch")
        if not len(made.table):
            labels = ", ".join(store.path for store in table.stores)
            raise DataError(f"{labels}: no row is left for {split}, see the counts above.")
        return made

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def counts(self) -> dict[str, dict[str, Any]]:
        """What became of the rows of the splits set up so far.

        Returns:
            ``{split: {source: {name: number}}}`` with the names of ``FileCounts`` and ``unused``, the source's columns
            that nothing reads; and beside the sources ``transforms``, a list with what each of them did.
        """
        return {
            name: {
                **{
                    store.path: asdict(split.counts[store.path]) | {"unused": store.unused}
                    for store in split.table.stores
                },
                "transforms": self._transformed[name],
            }
            for name, split in self._splits.items()
        }

    def digests(self, split: str) -> dict[str, str]:
        """A hash of tokens and rows of each source, by its path, after ``setup``; those of the hub have one, too."""
        return {store.path: store.digest for store in self.stores(split)}

    @property
    def longest(self) -> int:
        """Tokens of the longest row of the splits set up so far, prompt and completion together."""
        return max((split.longest for split in self._splits.values()), default=0)

    def tokens(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and token ids of each row of the splits set up so far, prompt, control tokens and completion."""
        for split in self._splits.values():
            for row in split.rows:
                prompt = split.prompts[row.prompt][-row.prompt_length :]
                yield row.row_id, np.concatenate([prompt, np.array(row.control, np.int32), row.completion])

    # Loaders ---------------------------------------------------------------------------------------

    def _steps(self, split: str) -> tuple[StepDataset, StepSampler]:
        """Makes the batches of a split, and says which there are.

        Raises:
            DataError: where the data cannot make such batches.
        """
        train, own = split == "train", self._splits[split]
        labels = [source.label for source in self.sources[split]]
        # None where there is one process; with model parallelism these are not the world's rank and size.
        place: dict[str, Any] = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        world_size, rank = place.get("num_replicas", 1), place.get("rank", 0)
        try:
            dataset = StepDataset(
                own.prompts,
                own.rows,
                own.examples,
                prompt_of=own.table.prompt,
                max_length=self.max_length,
                mismatched=self._module.objective.needs.mismatched,
                seed=self._seed,
                rank=rank,
                world_size=world_size,
                prefix=prefix_ids(self._module.tokenizer),
            )
            sampler = StepSampler(
                self._order(own) if train else Order(len(dataset), seed=self._seed, shuffle=False),
                batch_size=self.batch_size if train else self.eval_batch_size,
                world_size=world_size,
                drop_last=self.drop_last and train,
                same_every_epoch=not train,
            )
        except ValueError as error:
            said = str(error) if train else str(error).replace("batch_size", "eval_batch_size")
            raise DataError(f"{split} data ({', '.join(labels)}): {said}") from error
        return dataset, sampler

    def _loader(self, split: str) -> DataLoader[TokenBatch]:
        dataset, sampler = self._steps(split)
        if split == "train":
            # Lightning makes the first iterator before it tells the sampler the epoch.
            epoch, sampler.start = self._resume
            sampler.set_epoch(epoch)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_signals,
            # Iterating draws a seed for the workers. From the global state it would change a resumed run, which
            # iterates less often.
            generator=torch.Generator().manual_seed(self._seed),
            collate_fn=_identity,
        )

    def _order(self, split: Split) -> Order:
        table, first = split.table, np.array([example[0] for example in split.examples])
        weight = np.array([source.weight for source in self.sources["train"]])[table.source]
        if len(set(weight.tolist())) > 1:
            for example in split.examples:
                if len(set(weight[list(example)].tolist())) > 1:
                    one, other = (table.name(max(example, key=lambda i: s * weight[i])) for s in (1, -1))
                    raise ValueError(
                        f"{one} and {other} come together, but their sources have different weights; give both the same"
                    )
        desirable = split.of_examples((table.label == 1).astype(int))
        return Order(
            len(split.examples),
            seed=self._seed,
            shuffle=self.shuffle,
            source=table.source[first],
            weights=[source.weight for source in self.sources["train"]],
            classes=desirable if self.balance_classes else None,
            lengths=split.of_examples(split.prompt_length + split.completion_length) if self.group_by_length else None,
            batch_size=self.batch_size,
        )

    def resume_at(self, epoch: int, step: int) -> None:
        """Let the next training loader begin at step ``step`` of ``epoch``; the epochs after it are whole."""
        self._resume = (epoch, step)

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        loader = self._loader("train")
        self._resume = (0, 0)
        return loader

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[Any]:
        if not self.sources["validation"]:
            # None is meant, so Lightning's "make sure this was your intention" would only worry the user.
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        return self._loader("predict")

    # Checkpoints -----------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "training data": self._splits["train"].digest,
            "batch_size": self.batch_size,
            "seed": self._seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "balance_classes": self.balance_classes,
            "group_by_length": self.group_by_length,
            # The prompt of a mismatched row is cut to what its completion leaves of it.
            "max_length": self.max_length if self._module.objective.needs.mismatched else None,
            "weights": json.dumps([source.weight for source in self.sources["train"]]),
            "objective's needs": json.dumps(asdict(self._module.objective.needs)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint()} if "train" in self._splits else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume with other data or batches than the checkpoint's: it would be another run.

        Raises:
            ValueError: naming what differs. Nothing is checked where no training data are set up.
        """
        if "train" not in self._splits or "fingerprint" not in state_dict:
            return
        saved, now = state_dict["fingerprint"], self._fingerprint()
        saved = {"max_length": now["max_length"]} | saved  # older checkpoints do not say
        differing = [self._difference(key, saved.get(key), now[key]) for key in now if saved.get(key) != now[key]]
        if differing:
            raise ValueError(
                f"the checkpoint is of a run with other data or batches: {'; '.join(differing)}. "
                "Resume with the same settings, or start a new run."
            )

    def _difference(self, key: str, saved: Any, now: Any) -> str:
        """What differs, in words; of hashes and of what is kept as JSON only the parts that say something."""
        if key == "training data":
            changed = getattr(getattr(self._module, "record", None), "found", ())
            return f"{key} (other rows{''.join(f', {c}' for c in changed if c.key.startswith('data.'))})"
        if key == "objective's needs":
            before, after = json.loads(saved or "{}"), json.loads(now)
            named = [f"{k}: {before.get(k)} -> {v}" for k, v in after.items() if before.get(k) != v]
            return f"{key} ({', '.join(named)})"
        return f"{key} (saved {saved}, now {now})"
