"""The token stores of several sources, and the faults in all of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from halos_pl.data.example import DataError
from halos_pl.data.prompts import TextPrompts
from halos_pl.data.source import OnBadRows, Source
from halos_pl.data.spans import LossOn
from halos_pl.data.special import SpecialTokens
from halos_pl.data.store import Store, fault_list, open_store


class Stores:
    """Opens each source once per process and tokenizer.

    Args:
        on_bad_rows, cache_dir, special_tokens_in_text, text_prompts, loss_on: see ``FeedbackDataModule``.
    """

    def __init__(
        self,
        *,
        on_bad_rows: OnBadRows,
        cache_dir: Path | None,
        special_tokens_in_text: SpecialTokens,
        text_prompts: TextPrompts,
        loss_on: LossOn,
    ) -> None:
        self.on_bad_rows, self.cache_dir = on_bad_rows, cache_dir
        self.special_tokens_in_text, self.text_prompts, self.loss_on = special_tokens_in_text, text_prompts, loss_on
        self._tokenizer: tuple[PreTrainedTokenizerBase, Any] | None = None  # and its chat template
        self._stores: dict[str, Store] = {}  # by the source's key

    def open(self, sources: Iterable[Source], tokenizer: PreTrainedTokenizerBase) -> None:
        """Opens the stores of ``sources``.

        Raises:
            DataError: sources are faulty, or rows are and ``on_bad_rows`` is ``error``; names the faults of all.
        """
        if self._tokenizer != (state := (tokenizer, tokenizer.chat_template)):
            self._tokenizer, self._stores = state, {}
            if "strftime_now" in str(tokenizer.chat_template):
                rank_zero_warn(
                    "halos: the chat template writes today's date, so prompts encoded on different days"
                    " differ. Write a fixed date into the template and save the tokenizer"
                )
        faults: list[tuple[int, str]] = []
        count = 0
        for key, source in {source.key: source for source in sources}.items():
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

    def of(self, sources: Iterable[Source]) -> list[Store]:
        """The open stores of ``sources``."""
        return [self._stores[source.key] for source in sources]
