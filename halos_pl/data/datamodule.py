"""The DataModule: files in, one ``TokenBatch`` an optimizer step out."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs, TokenBatch
from halos_pl.common.stopping import ignore_signals
from halos_pl.data.batches import StepDataset
from halos_pl.data.ends import prefix_ids
from halos_pl.data.example import DataError
from halos_pl.data.formats import refuse_missing
from halos_pl.data.memory import MemorySource
from halos_pl.data.order import Order, StepSampler
from halos_pl.data.prompts import TextPrompts, asked, convention, counted, say
from halos_pl.data.resume import plain, refuse_other_data
from halos_pl.data.source import OnBadRows
from halos_pl.data.sources import Sources, sources_of
from halos_pl.data.spans import LossOn, check_loss_on
from halos_pl.data.special import SpecialTokens
from halos_pl.data.split import ControlTokens, Split, Together
from halos_pl.data.steps import training_order
from halos_pl.data.store import Store, fault_list
from halos_pl.data.stores import Stores
from halos_pl.data.table import Table
from halos_pl.data.template import template_of, use_template
from halos_pl.data.transforms import Transform, apply, in_order

SPLITS = ("train", "validation", "test", "predict")
# Settings that decide which rows are trained on, beside the sources.
DECIDE_ROWS = (
    "max_length",
    "truncate_completions",
    "on_bad_rows",
    "special_tokens_in_text",
    "text_prompts",
    "chat_template",
    "loss_on",
    "transforms",
    "keep_together",
    "control_tokens",
)
Tokenizer = PreTrainedTokenizerBase


def _identity(batch: Any) -> Any:
    return batch


class FeedbackDataModule(LightningDataModule):
    """Human feedback, as one ``TokenBatch`` per optimizer step.

    Every source is read, checked and tokenised once, before a model is loaded, into a cache that later runs find by
    its content. Batches are read from there, so memory grows by only some 60 bytes per row. Tokenizer and objective
    are set by :meth:`connect`; pairs become independent rows where the objective needs no pairs.

    Args:
        train, validation, test, predict: a source or a list of sources for each stage: a path or hub name, or a
            mapping ``{path: ..., split: ..., weight: ...}`` of the settings of ``halos_pl.data.Source``; in Python
            also a ``datasets.Dataset``, a pandas DataFrame, or a list of rows. ``predict`` defaults to ``test``, then
            to ``validation``. All but ``train`` keep every row, and pairs as pairs, whatever the objective needs.
        batch_size: examples per optimizer step over all ranks: rows; pairs if the objective needs pairs; prompts
            with all their rows if it compares the rows of a prompt.
        eval_batch_size: the same for the other stages; default: ``batch_size``.
        max_length: tokens of prompt and completion together. A longer prompt is cut at its start, the same for both
            completions of a pair.
        truncate_completions: cut a completion of ``max_length`` tokens or more at its end; false drops the row (the
            pair, if the objective needs pairs). Either way they are counted in the log.
        on_bad_rows: ``error`` names the faulty rows and stops before a model is loaded; ``skip`` leaves them out and
            counts them in the log and the run's summary.
        special_tokens_in_text: how special tokens spelled in the data are treated, such as ``<|im_end|>`` in a
            message: ``refuse`` makes a row faulty if a message spells a token that marks turns; ``split`` encodes
            them as plain text; ``allow`` encodes them as special tokens.
        text_prompts: how plain-text prompts are encoded in training, evaluation and generation: ``plain`` as they
            are, as in TRL; ``chat`` as a user message in the chat template, with the completion as the answer. Message
            lists always go through the template.
        chat_template: replaces the tokenizer's (a base model has none): a .jinja file, a folder with a tokenizer,
            ``chatml``, or the template itself. It is kept in the run's folder, for evaluation, generation and export.
        loss_on: which assistant turns carry the loss, each with the token that ends it. ``last``: the last one; what
            comes before it counts as prompt. ``all``: every turn of a completion, and of a conversation judged as a
            whole (``messages``); a prompt in its own column, and what both conversations of a pair begin with, carry
            none. Other roles never do.
        transforms: changes to the data for studies, applied in order (see ``halos_pl.data.transforms``). Rows with
            only a score are labelled by ``ThresholdScores`` at their prompt's mean, unless a transform does it.
        shuffle: shuffle the training examples in each epoch.
        keep_together: rows that come in the same step even if the objective does not need it: ``pairs``, or
            ``prompts`` with all their rows; ``batch_size`` then counts these. Null: single rows.
        balance_classes: give every training step desirable and undesirable rows in the proportion of the whole data.
        group_by_length: make training steps of examples of similar length, which need less padding.
        drop_last: leave out a smaller last training step.
        one_completion_per_prompt: train on one random row per distinct prompt: the transform ``OnePerPrompt``, before
            all that need labels. A setting of its own, so that an objective file can ask for it.
        control_tokens: texts between prompt and completion that name the row's label; null for none.
        num_workers: processes that make batches; the batches do not depend on it.
        seed: of order and mismatches; default: the global seed (``seed_everything``), else 0.
        cache_dir: of tokenised sources; default: ``data`` in ``$HALOS_CACHE``, else in ``~/.cache/halos_pl``.
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
        splits = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.sources = {split: sources_of(split, data) for split, data in splits.items()}
        self.sources["predict"] = self.sources["predict"] or self.sources["test"] or self.sources["validation"]
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length, self.truncate_completions = max_length, truncate_completions
        self.on_bad_rows = on_bad_rows
        self.special_tokens_in_text, self.text_prompts = special_tokens_in_text, text_prompts
        self.loss_on = loss_on
        #: The text of the template; None for the tokenizer's own.
        self.chat_template = None if chat_template is None else template_of(chat_template)
        asked("", text_prompts)  # raises for an unknown value
        check_loss_on(loss_on)
        self.transforms = in_order(list(transforms or []), one_completion_per_prompt)
        self.shuffle, self.drop_last, self.keep_together = shuffle, drop_last, keep_together
        self.balance_classes, self.group_by_length = balance_classes, group_by_length
        self.control_tokens = control_tokens
        self.num_workers, self.seed = num_workers, seed
        self._connection: tuple[Tokenizer | Callable[[], Tokenizer], Needs] | None = None
        self._stores = Stores(
            on_bad_rows=on_bad_rows,
            cache_dir=Path(cache_dir) if cache_dir else None,
            special_tokens_in_text=special_tokens_in_text,
            text_prompts=text_prompts,
            loss_on=loss_on,
        )
        self._splits: dict[str, Split] = {}
        self._transformed: dict[str, list[dict[str, Any]]] = {}
        self._resume = (0, 0)

    # Connection --------------------------------------------------------------------------------------

    def connect(self, *, tokenizer: Tokenizer | Callable[[], Tokenizer], needs: Needs) -> None:
        """Sets the model's tokenizer and the objective's needs. ``HALOModule`` calls it under a Trainer.

        Without a Trainer, call it before :meth:`setup`. For another model or objective, call both again.

        Args:
            tokenizer: of the policy, or a function that loads it; it is called after the files have been found.
            needs: of the objective, see :class:`halos_pl.batch.Needs`.
        """
        self._connection = tokenizer, needs

    @property
    def _connected(self) -> tuple[Tokenizer | Callable[[], Tokenizer], Needs]:
        if self._connection is None:
            raise RuntimeError(
                "FeedbackDataModule is not connected to a model: call data.connect(tokenizer=..., needs=...) before"
                " data.setup(), or pass both to Trainer.fit(HALOModule(...), datamodule=data)"
            )
        return self._connection

    @property
    def needs(self) -> Needs:
        """The objective's needs, after :meth:`connect`."""
        return self._connected[1]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with ``chat_template`` where that is set, after :meth:`connect`."""
        tokenizer, needs = self._connected
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = tokenizer()
            self._connection = tokenizer, needs
        if self.chat_template is not None:
            use_template(tokenizer, self.chat_template)
        return tokenizer

    # Reading -----------------------------------------------------------------------------------------

    def _wanted(self, stage: str | None) -> list[str]:
        """The splits of a stage that have sources; without a stage, all splits that have."""
        required = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}.get(stage or "")
        if required and not self.sources[required]:
            raise ValueError(f"No {required} data: set data.{required} to a file or a list of files.")
        wanted = SPLITS if required is None else (required, *(["validation"] if stage == "fit" else []))
        return [split for split in wanted if self.sources[split]]

    def _open(self, splits: Sequence[str]) -> None:
        _ = self._connected
        sources = [source for split in splits for source in self.sources[split]]
        refuse_missing(sources)
        self._stores.open(sources, self.tokenizer)

    def prepare_data(self) -> None:
        """Reads, checks and tokenises every source of the stage. Lightning calls it before a model is loaded.

        Raises:
            DataError: a source or a row is faulty.
        """
        state = self.trainer.state.fn if self.trainer else None
        # With several ranks ``setup`` raises instead, on all of them: if one rank failed here, the others would hang.
        with suppress(*([DataError] if self.trainer and self.trainer.world_size > 1 else [])):
            self._open(self._wanted(str(state.value) if state else None))

    def setup(self, stage: str | None = None) -> None:
        """Prepares the splits of a stage for the objective's needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for every split that has sources.

        Raises:
            DataError: a source or a row is faulty, or the data do not suit the objective.
            RuntimeError: :meth:`connect` has not been called.
        """
        splits = self._wanted(stage)
        self._open(splits)
        for split in splits:
            self._splits[split] = self._split(split)
            self._steps(split)  # fails now rather than after a model is loaded and an earlier run is moved aside

    def stores(self, split: str) -> list[Store]:
        """The tokenised sources of a split, after :meth:`setup`."""
        return self._stores.of(self.sources[split])

    def _split(self, split: str) -> Split:
        table, self._transformed[split] = apply(
            Table.of(self.stores(split)),
            self.transforms,
            train=split == "train",
            # A loss that compares the rows of a prompt reads the scores themselves, so rows at the mean count there.
            drop_ties=not self.needs.groups,
            seed=self._seed,
        )
        for report in self._transformed[split]:
            counts = ", ".join(f"{name} {value}" for name, value in report.items() if name != "transform")
            rank_zero_info(f"{split} data, {report['transform']}: {counts}")
        needs, together = self.needs, self.keep_together
        if split != "train":
            # Held-out data are measured on every row, and pairs as pairs, whatever the loss needs.
            needs = replace(needs, undesirable=True)
            together = "pairs" if bool((table.pair >= 0).any()) else None
        prepared = Split(
            table,
            needs,
            max_length=self.max_length,
            truncate_completions=self.truncate_completions,
            control=None if self.control_tokens is None else self.control_tokens.ids(self.tokenizer),
            keep_together=together,
        )
        self._log(split, prepared)
        if not len(prepared.table):
            labels = ", ".join(store.path for store in table.stores)
            raise DataError(f"{labels}: no row is left for {split}; see the counts above.")
        return prepared

    def _log(self, split: str, prepared: Split) -> None:
        for source, store in zip(self.sources[split], prepared.table.stores, strict=True):
            name, counts = f"{split} data {store.path}", prepared.counts[store.path]
            rank_zero_info(f"{name}: {counts}")
            prompts = convention(store.text_prompts, self.text_prompts, bool(self.tokenizer.chat_template))
            say(name, [*([prompts] if prompts else []), *counted(store.notes)])
            if store.unused:
                rank_zero_info(f"{name}: not used: {', '.join(store.unused)}")
            if store.fault_count:
                rank_zero_info(f"{split} data, skipped:\n{fault_list(store.causes, store.fault_count)}")
            if source.weight != 1:
                number = round(source.weight * counts.rows)
                rank_zero_info(f"{name}: weight {source.weight:g}, about {number} rows per epoch")

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def counts(self) -> dict[str, dict[str, Any]]:
        """What became of the rows of the splits set up so far.

        Returns:
            ``{split: {source: {name: number}}}`` with the names of ``FileCounts`` and ``unused``, the source's columns
            that nothing reads; beside the sources ``transforms``, a list of what each of them did.
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
        """A hash of tokens and labels of each source, by its name, after :meth:`setup`."""
        return {store.path: store.digest for store in self.stores(split)}

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and completion together, of the splits set up so far."""
        return max((split.longest for split in self._splits.values()), default=0)

    def tokens(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and token ids (prompt, control tokens, completion) of each row of the splits set up so far."""
        for split in self._splits.values():
            for row in split.rows:
                prompt = split.prompts[row.prompt][-row.prompt_length :]
                yield row.row_id, np.concatenate([prompt, np.array(row.control, np.int32), row.completion])

    # Loaders -----------------------------------------------------------------------------------------

    def _steps(self, split: str) -> tuple[StepDataset, StepSampler]:
        """The data set and sampler that make the batches of a split.

        Raises:
            DataError: the data cannot make such batches.
        """
        train, rows = split == "train", self._splits[split]
        # None for a single process; with model parallelism these differ from the world's rank and size.
        share: dict[str, Any] = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        world_size, rank = share.get("num_replicas", 1), share.get("rank", 0)
        try:
            dataset = StepDataset(
                rows.prompts,
                rows.rows,
                rows.examples,
                prompt_of=rows.table.prompt,
                max_length=self.max_length,
                mismatched=self.needs.mismatched,
                seed=self._seed,
                rank=rank,
                world_size=world_size,
                prefix=prefix_ids(self.tokenizer),
            )
            order = Order(len(dataset), seed=self._seed, shuffle=False)
            if train:
                order = training_order(
                    rows,
                    self.sources["train"],
                    seed=self._seed,
                    shuffle=self.shuffle,
                    balance_classes=self.balance_classes,
                    group_by_length=self.group_by_length,
                    batch_size=self.batch_size,
                )
            sampler = StepSampler(
                order,
                batch_size=self.batch_size if train else self.eval_batch_size,
                world_size=world_size,
                drop_last=self.drop_last and train,
                same_every_epoch=not train,
            )
        except ValueError as error:
            reason = str(error) if train else str(error).replace("batch_size", "eval_batch_size")
            labels = ", ".join(source.label for source in self.sources[split])
            raise DataError(f"{split} data ({labels}): {reason}") from error
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
            # Each iterator draws a seed for the workers. Drawn from the global state, it would change a resumed run,
            # which makes fewer iterators.
            generator=torch.Generator().manual_seed(self._seed),
            collate_fn=_identity,
        )

    def resume_at(self, epoch: int, step: int) -> None:
        """Makes the next training loader begin at step ``step`` of ``epoch``; later epochs are whole."""
        self._resume = (epoch, step)

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        loader = self._loader("train")
        self._resume = (0, 0)
        return loader

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[Any]:
        if not self.sources["validation"]:
            # Lightning would ask whether that was intended.
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        return self._loader("predict")

    # Checkpoints -------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        return {
            "training data": self._splits["train"].digest,
            "batch_size": self.batch_size,
            "seed": self._seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "balance_classes": self.balance_classes,
            "group_by_length": self.group_by_length,
            # The prompt of a mismatched row is cut to what its completion leaves of it.
            "max_length": self.max_length if self.needs.mismatched else None,
            "weights": json.dumps([source.weight for source in self.sources["train"]]),
            "objective's needs": json.dumps(asdict(self.needs)),
        }

    def _settings(self) -> dict[str, Any]:
        """The settings that decide which rows are trained on."""
        named = {name: getattr(self, name) for name in DECIDE_ROWS}
        digests = self.digests("train")
        train = [
            f"{source.label} (in memory, {digests[source.label][:12]})"
            if isinstance(source, MemorySource)
            else source.label
            for source in self.sources["train"]
        ]
        settings: dict[str, Any] = plain({"train": train, **named})
        return settings

    def state_dict(self) -> dict[str, Any]:
        if "train" not in self._splits:
            return {}
        return {"fingerprint": self._fingerprint(), "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses to resume with other data or batches than the checkpoint's; without training data, does nothing.

        Raises:
            ValueError: names what differs.
        """
        if "train" in self._splits and "fingerprint" in state_dict:
            settings = state_dict.get("settings", {})
            refuse_other_data(state_dict["fingerprint"], self._fingerprint(), settings, self._settings())
