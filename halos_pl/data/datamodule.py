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

from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from halos_pl import distributed
from halos_pl.batch import Needs, TokenBatch
from halos_pl.data.batches import StepDataset
from halos_pl.data.connection import Connection, NotConnected, Tokenizer
from halos_pl.data.ends import prefix_ids
from halos_pl.data.example import DataError
from halos_pl.data.formats import refuse_missing
from halos_pl.data.order import Order, StepSampler
from halos_pl.data.prompts import TextPrompts, asked
from halos_pl.data.report import counts_of, log_merged, log_split, log_transforms
from halos_pl.data.resume import DECIDE_ROWS, described, plain, refuse_other_data
from halos_pl.data.source import OnBadRows
from halos_pl.data.sources import Sources, sources_of
from halos_pl.data.spans import LossOn, check_loss_on
from halos_pl.data.special import SpecialTokens
from halos_pl.data.split import ControlTokens, Split, Together
from halos_pl.data.steps import Batching, loader_of, training_sampler
from halos_pl.data.store import Store
from halos_pl.data.stores import Stores
from halos_pl.data.table import Table
from halos_pl.data.template import template_of, use_template
from halos_pl.data.transform_lists import apply, in_order
from halos_pl.data.transforms import Transform

STAGES = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}  # the split each one needs


class FeedbackDataModule(LightningDataModule):
    """Human feedback as one ``TokenBatch`` per optimizer step.

    Every source is read, checked and tokenised once, before a model is loaded, into a cache that later runs find by
    its content. Batches are read from the cache, so memory grows by only about 70 bytes per row. :meth:`connect` sets
    the tokenizer and the objective's needs; pairs become independent rows unless the objective needs pairs.

    Args:
        train, validation, test, predict: source or list of sources for each stage: a path or hub name, or a mapping
            ``{path: ..., split: ..., weight: ...}`` of the settings of ``halos_pl.data.Source``; in Python also a
            ``datasets.Dataset``, a pandas DataFrame, or a list of rows. ``predict`` defaults to ``test``, then to
            ``validation``. Outside ``train`` every row is kept, and pairs stay pairs, whatever the objective needs.
        batch_size: examples per optimizer step over all ranks: rows; pairs if the objective needs pairs; prompts
            with all their rows if it compares the rows of a prompt.
        eval_batch_size: the same for the other stages; default: ``batch_size``.
        max_length: maximum number of tokens of prompt and completion together. A longer prompt is cut at its start,
            equally for both completions of a pair.
        truncate_completions: whether a completion of ``max_length`` tokens or more is cut at its end; if false, its
            row (or pair, if the objective needs pairs) is dropped. The log counts either.
        on_bad_rows: ``error`` names the faulty rows and stops before a model is loaded; ``skip`` leaves them out and
            counts them in the log and the run's summary.
        special_tokens_in_text: treatment of special tokens spelled in the data, such as ``<|im_end|>`` in a message:
            ``refuse`` makes a row faulty if a message spells a token that marks turns; ``split`` encodes them as
            plain text; ``allow`` encodes them as special tokens.
        text_prompts: encoding of plain-text prompts in training, evaluation and generation: ``plain`` leaves them
            unchanged, as in TRL; ``chat`` makes each a user message in the chat template, with the completion as the
            answer. Message lists always go through the template.
        chat_template: replacement for the tokenizer's template (a base model has none): a .jinja file, a folder with
            a tokenizer, ``chatml``, or the template itself. The run's folder keeps it for evaluation, generation and
            export.
        loss_on: assistant turns that carry the loss, each with the token that ends it. ``last``: the last one; the
            turns before it count as prompt. ``all``: every turn of a completion, or of a conversation judged as a
            whole (``messages``), but none of a prompt in its own column or of the shared start of a pair. Other roles
            never carry it.
        transforms: changes to the data for studies, applied in order (see ``halos_pl.data.transforms``). Rows with
            only a score are labelled by ``ThresholdScores`` at their prompt's mean, unless a transform labels them.
        shuffle: whether to shuffle the training examples in each epoch.
        keep_together: rows that share a step even if the objective does not need it: ``pairs``, or ``prompts`` with
            all their rows; ``batch_size`` then counts these. Null: single rows.
        balance_classes: whether every training step has desirable and undesirable rows in the proportion of the
            whole data.
        group_by_length: whether training steps have examples of similar length, which need less padding.
        drop_last: whether to leave out a smaller last training step.
        one_completion_per_prompt: whether to train on one random row per distinct prompt: the transform
            ``OnePerPrompt``, before all that need labels. A separate setting, so that an objective file can enable it.
        control_tokens: texts between prompt and completion that name the row's label; null for none.
        num_workers: number of processes that make batches; the batches do not depend on it.
        seed: seed of order and mismatches; default: the global seed (``seed_everything``), else 0.
        cache_dir: folder of tokenised sources; default: ``data`` in ``$HALOS_CACHE``, else in ``~/.cache/halos_pl``.
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
        self.batch_size, self.max_length, self.num_workers = batch_size, max_length, num_workers
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("max_length", 2), ("num_workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"data.{name} is {value}; it must be at least {least}.")
        splits = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.sources = {split: sources_of(split, data) for split, data in splits.items()}
        self.sources["predict"] = self.sources["predict"] or self.sources["test"] or self.sources["validation"]
        self.truncate_completions, self.on_bad_rows = truncate_completions, on_bad_rows
        self.special_tokens_in_text, self.text_prompts = special_tokens_in_text, text_prompts
        self.loss_on = loss_on
        #: The text of the template; None for the tokenizer's own.
        self.chat_template = None if chat_template is None else template_of(chat_template)
        asked("", text_prompts)  # raises for an unknown value
        check_loss_on(loss_on)
        self.transforms = in_order(list(transforms or []), one_completion_per_prompt)
        self.shuffle, self.drop_last, self.keep_together = shuffle, drop_last, keep_together
        self.balance_classes, self.group_by_length = balance_classes, group_by_length
        self.control_tokens, self.seed = control_tokens, seed
        self._connection: Connection | NotConnected = NotConnected()
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
            tokenizer: the policy's tokenizer, or a function that loads it, called once all files are known to exist.
            needs: the objective's needs.

        Raises:
            TypeError: if an argument has the wrong type.
        """
        self._connection = Connection(tokenizer, needs)

    @property
    def needs(self) -> Needs:
        """The objective's needs, after :meth:`connect`."""
        return self._connection.needs

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with ``chat_template`` if set, after :meth:`connect`."""
        tokenizer = self._connection.tokenizer
        if self.chat_template is not None:
            use_template(tokenizer, self.chat_template)
        return tokenizer

    # Reading -----------------------------------------------------------------------------------------

    def _wanted(self, stage: str | None) -> list[str]:
        """The splits of a stage that have sources; without a stage, all that have."""
        required = STAGES.get(stage or "")
        if required and not self.sources[required]:
            raise ValueError(f"No {required} data: set data.{required} to a file or a list of files.")
        splits = list(self.sources) if required is None else [required, *(["validation"] if stage == "fit" else [])]
        return [split for split in splits if self.sources[split]]

    def _open(self, splits: Sequence[str]) -> None:
        _ = self.needs  # raises if not connected, before anything is read
        sources = [source for split in splits for source in self.sources[split]]
        refuse_missing(sources)
        self._stores.open(sources, self.tokenizer)

    def prepare_data(self) -> None:
        """Reads, checks and tokenises every source of the stage. Lightning calls it before a model is loaded.

        Raises:
            DataError: a source or a row is faulty.
        """
        state = self.trainer.state.fn if self.trainer else None
        # With several ranks ``setup`` raises instead, on all of them: the others would hang if one failed here.
        with suppress(*([DataError] if self.trainer and self.trainer.world_size > 1 else [])):
            self._open(self._wanted(str(state.value) if state else None))

    def setup(self, stage: str | None = None) -> None:
        """Prepares the splits of a stage for the objective's needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: every split that has sources.

        Raises:
            DataError: a source or a row is faulty, or the data do not suit the objective.
            RuntimeError: :meth:`connect` has not been called.
        """
        splits = self._wanted(stage)
        self._open(splits)
        for split in splits:
            self._splits[split] = self._split(split)
            log_merged(split, self._steps(split)[1])  # faults show before a model is loaded, or a run moved aside

    def stores(self, split: str) -> list[Store]:
        """The tokenised sources of a split, after :meth:`setup`."""
        return self._stores.of(self.sources[split])

    def _split(self, split: str) -> Split:
        table, self._transformed[split] = apply(
            Table.of(self.stores(split)),
            self.transforms,
            train=split == "train",
            # A loss that compares the rows of a prompt reads their scores, so a row at the mean still counts.
            drop_ties=not self.needs.groups,
            seed=self._seed,
        )
        log_transforms(split, self._transformed[split])
        needs, together = self.needs, self.keep_together
        if split != "train":
            # Held-out metrics use every row, and pairs as pairs, whatever the loss needs.
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
        template = bool(self.tokenizer.chat_template)
        log_split(split, prepared, self.sources[split], self.text_prompts, template, needs, self.transforms)
        if not len(prepared.table):
            paths = ", ".join(store.path for store in table.stores)
            raise DataError(f"{paths}: no row is left for {split}; see the counts above.")
        if split == "train":
            prepared.check_groups()
        return prepared

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def counts(self) -> dict[str, dict[str, Any]]:
        """How the rows of the splits set up so far are used.

        Returns:
            ``{split: {source: {name: number}}}`` with the names of ``FileCounts``, and ``unused``, the source's unread
            columns. Beside the sources, ``transforms`` lists the effect of each transform.
        """
        return {name: counts_of(split, self._transformed[name]) for name, split in self._splits.items()}

    def digests(self, split: str) -> dict[str, str]:
        """A hash of the tokens, labels and weights of each source, by its name, after :meth:`setup`."""
        return {store.path: store.digest for store in self.stores(split)}

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt and completion together, of the splits set up so far."""
        return max((split.longest for split in self._splits.values()), default=0)

    def tokens(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Name and token ids (prompt, control tokens, completion) of each row of the splits set up so far."""
        for split in self._splits.values():
            yield from split.tokens()

    def row_names(self, split: str) -> list[str]:
        """The names of a split's rows in the order of the data, after :meth:`setup`."""
        table = self._splits[split].table
        return [table.name(row) for row in range(len(table))]

    @property
    def _batching(self) -> Batching:
        return Batching(self.batch_size, self.shuffle, self.drop_last, self.balance_classes, self.group_by_length)

    # Loaders -----------------------------------------------------------------------------------------

    def _steps(self, split: str) -> tuple[StepDataset, StepSampler]:
        """The data set and the sampler of a split's batches.

        Raises:
            DataError: the data do not fill such batches.
        """
        if split not in self._splits:
            raise RuntimeError(f"the {split} data are not set up: call data.setup() first")
        rank, world_size = distributed.rank(), distributed.world_size()
        if self.trainer:
            # None for a single process; with model parallelism these differ from the world's rank and size.
            share: dict[str, Any] = self.trainer.distributed_sampler_kwargs or {}
            rank, world_size = share.get("rank", 0), share.get("num_replicas", 1)
        prepared, train, seed = self._splits[split], split == "train", self._seed
        try:
            dataset = prepared.dataset(
                prefix_ids(self.tokenizer),
                mismatched=self.needs.mismatched,
                seed=seed,
                rank=rank,
                world_size=world_size,
            )
            if train:
                sampler = training_sampler(
                    prepared, self.sources["train"], self._batching, seed=seed, world_size=world_size
                )
            else:
                order = Order(len(dataset), seed=seed, shuffle=False)
                # The batches of one device; a rank may have no row of one.
                sampler = StepSampler(order, batch_size=self.eval_batch_size, same_every_epoch=True)
        except ValueError as error:
            reason = str(error) if train else str(error).replace("batch_size", "eval_batch_size")
            labels = ", ".join(source.label for source in self.sources[split])
            raise DataError(f"{split} data ({labels}): {reason}") from error
        return dataset, sampler

    def _loader(self, split: str) -> DataLoader[TokenBatch]:
        dataset, sampler = self._steps(split)
        if split == "train":
            # Lightning makes the first iterator before it sets the sampler's epoch.
            epoch, sampler.start = self._resume
            sampler.set_epoch(epoch)
        return loader_of(dataset, sampler, num_workers=self.num_workers, seed=self._seed)

    def resume_at(self, epoch: int, step: int) -> None:
        """Starts the next training loader at step ``step`` of ``epoch``; later epochs are whole."""
        self._resume = (epoch, step)

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        loader = self._loader("train")
        self._resume = (0, 0)
        return loader

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[Any]:
        if not self.sources["validation"]:
            # Lightning would warn that the loader is empty.
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        return self._loader("predict")

    # Checkpoints -------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        """Values that a resumed run must share with its checkpoint."""
        return {
            "training data": self._splits["train"].digest,
            **asdict(self._batching),
            "seed": self._seed,
            # The prompt of a mismatched row is cut to fit its completion.
            "max_length": self.max_length if self.needs.mismatched else None,
            "weights": json.dumps([source.weight for source in self.sources["train"]]),
            "objective's needs": json.dumps(asdict(self.needs)),
        }

    def _settings(self) -> dict[str, Any]:
        """The settings that decide which rows are trained on."""
        train = described(self.sources["train"], self.digests("train"))
        return dict(plain({"train": train, **{name: getattr(self, name) for name in DECIDE_ROWS}}))

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
            saved = state_dict.get("settings", {})
            refuse_other_data(state_dict["fingerprint"], self._fingerprint(), saved, self._settings())
