"""What a DataModule needs to know of a model: its tokenizer and the needs of its objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Needs

Tokenizer = PreTrainedTokenizerBase


class Connection:
    """A tokenizer, loaded when it is first used, and the needs of an objective.

    Args:
        tokenizer: the tokenizer, or a function that loads it.
        needs: the objective's needs.

    Raises:
        TypeError: if an argument has the wrong type.
    """

    def __init__(self, tokenizer: Tokenizer | Callable[[], Tokenizer], needs: Needs) -> None:
        if not isinstance(needs, Needs):
            raise TypeError(f"needs is a {type(needs).__name__}; pass the needs of an objective, objective.needs")
        if not isinstance(tokenizer, Tokenizer) and not callable(tokenizer):
            raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; pass load_tokenizer(ModelSpec(path))")
        self._tokenizer: Any = tokenizer
        self.needs = needs

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        if not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = self._tokenizer()
        return self._tokenizer


class NotConnected:
    """Stands in until a DataModule is connected, and says how to do that."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("tokenizer", "needs"):
            raise AttributeError(name)
        raise RuntimeError(
            "FeedbackDataModule is not connected to a model: call data.connect(tokenizer=..., needs=...) before"
            " data.setup(), or pass both to Trainer.fit(HALOModule(...), datamodule=data)"
        )
