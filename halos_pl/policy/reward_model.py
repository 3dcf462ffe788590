"""Reward models of Hugging Face's format: sequence classifiers with one label, which score completions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from halos_pl.common.progress import counted
from halos_pl.data.ends import prefix_ids
from halos_pl.data.example import Example, Prompt
from halos_pl.data.prompts import TextPrompts, asked
from halos_pl.data.special import SpecialTokens
from halos_pl.data.tokenize import Encoder
from halos_pl.data.turns import stop_ids
from halos_pl.policy.architecture import base_model, positions, text_config
from halos_pl.policy.intact import some
from halos_pl.policy.loading import load_pretrained, load_tokenizer
from halos_pl.policy.source import ADAPTER_CONFIG
from halos_pl.policy.spec import ModelError, ModelSpec


class RewardModel:
    """Scores completions with a sequence classifier that has one label.

    Prompts and completions become tokens as in training: messages by the chat template, text unchanged, with the token
    at which a model stops. Encoders such as BERT and DeBERTa read prompt and completion as a pair of texts. A row that
    is too long loses the beginning of its prompt; a completion that does not fit by itself is refused.

    Args:
        model: Sequence classifier of transformers, or a peft model around one.
        tokenizer: Its tokenizer.
        name: Its name in messages.
        batch_size: Number of rows in a pass.
        max_length: Maximum number of tokens of prompt and completion together; default: the model's positions.
        text_prompts: How a prompt that is plain text is encoded: ``plain``, unchanged, or ``chat``, as a user message.
        special_tokens_in_text: Treatment of special tokens that texts spell, as in ``data.special_tokens_in_text``.

    Attributes:
        truncated: Number of rows whose prompt was cut.

    Raises:
        ModelError: if the model has several labels.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "the reward model",
        batch_size: int = 16,
        max_length: int | None = None,
        text_prompts: TextPrompts = "plain",
        special_tokens_in_text: SpecialTokens = "split",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        labels = base_model(model).config.num_labels
        if labels != 1:
            raise ModelError(f"{name} has {labels} labels; a reward model has one")
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.max_length = max_length or positions(model).most
        self.text_prompts: TextPrompts = text_prompts
        self.truncated = 0
        self._special: SpecialTokens = special_tokens_in_text
        #: Token that the classifier skips at the end of a row; without one, it cannot read rows of several lengths.
        self._pad: int | None = text_config(model).pad_token_id
        self._batch_size = 1 if self._pad is None else batch_size

    @classmethod
    def load(
        cls, name: str, *, device: str | torch.device | None = None, dtype: Any = None, **options: Any
    ) -> RewardModel:
        """Loads a reward model.

        Args:
            name: Folder that ``halos export`` has written, with or without ``--adapter``, or any other sequence
                classifier with one label in a folder or on the hub.
            device: Device; default: a GPU if there is one.
            dtype: dtype of the weights, such as ``float32``; default: that of the files.
            options: Further arguments of the class.

        Raises:
            ModelError: if there is no such model, or its head is not trained or has several labels.
        """
        folder = Path(name)
        if (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file():
            raise ModelError(f"{name} is the folder of a run; write its model with halos export {name} FOLDER")
        spec = ModelSpec(name, attn_implementation=None)
        is_adapter = (folder / ADAPTER_CONFIG).is_file()
        loader: Any = AutoPeftModelForSequenceClassification if is_adapter else AutoModelForSequenceClassification
        extra: dict[str, Any] = {"num_labels": 1} if is_adapter else {"output_loading_info": True}
        extra |= {"device_map": "meta"} if str(device) == "meta" else {}
        try:
            # transformers reports a missing head, which is refused below; an adapter's head is not in its base.
            with _only_errors():
                result = load_pretrained(loader, spec, weights=True, dtype=dtype or "auto", **extra)
            tokenizer = load_tokenizer(spec)
        except ModelError as error:
            raise ModelError(str(error).removeprefix("model.policy.path: ")) from error
        model, info = (result, {}) if is_adapter else result
        if missing := sorted(info.get("missing_keys", ())):
            raise ModelError(
                f"{name} is not a trained reward model: its files lack {some(missing)} of a {type(model).__name__}"
            )
        if is_adapter:  # its base has another padding token, or none
            text_config(model).pad_token_id = tokenizer.pad_token_id
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, name=name, **options)

    @classmethod
    def check(cls, name: str) -> None:
        """Refuses what :meth:`load` refuses, without reading weights.

        Raises:
            ModelError: as :meth:`load` does.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft copies an adapter into tensors without content
            cls.load(name, device="meta")

    def cut(
        self,
        rows: Sequence[tuple[Prompt, Prompt]],
        finished: Sequence[bool] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[str]:
        """The names of rows whose prompts would lose their beginning; the model does not run.

        Args:
            rows, finished, names: As for :meth:`score`.

        Raises:
            ValueError: naming the first row that cannot be encoded, or whose completion is too long.
        """
        names = names or _numbered(rows)
        encoded = self._encoded(rows, finished or [True] * len(rows), names)
        return [name for name, row in zip(names, encoded, strict=True) if row.cut]

    def score(
        self,
        rows: Sequence[tuple[Prompt, Prompt]],
        finished: Sequence[bool] | None = None,
        names: Sequence[str] | None = None,
        *,
        progress: bool = False,
    ) -> list[float]:
        """The reward of each row.

        Args:
            rows: Prompts, as text or messages, and completions.
            finished: Whether each completion is complete, so that it ends with the token at which the model stops;
                default: all are.
            names: The name of each row in errors; default: ``row 1`` and so on.
            progress: Whether to show the progress.

        Raises:
            ValueError: naming the first row that cannot be encoded, whose completion is too long, or whose reward is
                not finite.
        """
        names = names or _numbered(rows)
        encoded = list(self._encoded(rows, finished or [True] * len(rows), names))
        self.truncated += sum(row.cut for row in encoded)
        order = sorted(
            range(len(rows)), key=lambda i: -len(encoded[i].ids)
        )  # the longest first, should memory be short
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        rewards = [0.0] * len(rows)
        for batch in counted(batches, "scoring") if progress else batches:
            for i, reward in zip(batch, self._rewards([encoded[i] for i in batch]).tolist(), strict=True):
                rewards[i] = reward
        for row, reward in zip(names, rewards, strict=True):
            if not abs(reward) < float("inf"):
                raise ValueError(f"{row}: the reward that {self.name} gives it is {reward}")
        return rewards

    def _encoded(
        self, rows: Sequence[tuple[Prompt, Prompt]], finished: Sequence[bool], names: Sequence[str]
    ) -> Iterator[_Tokens]:
        if self.tokenizer.cls_token_id is not None and self.tokenizer.sep_token_id is not None:
            yield from self._pairs(rows, names)
            return
        examples = [
            Example(asked(prompt, self.text_prompts), (completion,), (), "", finished=(whole,))
            for (prompt, completion), whole in zip(rows, finished, strict=True)
        ]
        prefix = prefix_ids(self.tokenizer)
        encoded = Encoder(self.tokenizer, self._special).encode(examples)
        for name, tokens in zip(names, encoded, strict=True):
            if isinstance(tokens, ValueError):
                raise ValueError(f"{name}: {tokens}") from tokens
            prompt, completion = tokens.prompt, tokens.completions[0]
            cut = not self._fits(len(prompt) + len(completion))
            if cut:
                kept = prefix if prompt[: len(prefix)] == prefix else []
                room = self._room(name, len(completion) + len(kept))
                prompt = [*kept, *prompt[-room:]]
            yield _Tokens(prompt + completion, [], cut)

    def _pairs(self, rows: Sequence[tuple[Prompt, Prompt]], names: Sequence[str]) -> Iterator[_Tokens]:
        """Rows as pairs of texts, for an encoder."""
        for name, (prompt, completion) in zip(names, rows, strict=True):
            texts = [_text(part, name, self.name) for part in (prompt, completion)]
            tokens: Any = self.tokenizer(*texts, verbose=False)
            cut = not self._fits(len(tokens["input_ids"]))
            if cut:
                of_prompt = len(self.tokenizer(texts[0], add_special_tokens=False, verbose=False)["input_ids"])
                self._room(name, len(tokens["input_ids"]) - of_prompt)
                side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
                tokens = self.tokenizer(*texts, truncation="only_first", max_length=self.max_length)
                self.tokenizer.truncation_side = side
            yield _Tokens(list(tokens["input_ids"]), list(tokens.get("token_type_ids") or []), cut)

    def _fits(self, length: int) -> bool:
        return not self.max_length or length <= self.max_length

    def _room(self, name: str, length: int) -> int:
        """Number of tokens left for the prompt beside ``length`` others.

        Raises:
            ValueError: none are left.
        """
        assert self.max_length
        if length >= self.max_length:
            raise ValueError(
                f"{name}: the completion has about {length} tokens, but {self.name} reads {self.max_length} with the"
                " prompt; shorten or remove it"
            )
        return self.max_length - length

    @torch.no_grad()
    def _rewards(self, rows: Sequence[_Tokens]) -> Tensor:
        device = next(self.model.parameters()).device

        def padded(lists: Sequence[Sequence[int]], value: int) -> Tensor:
            tensors = [torch.tensor(each, dtype=torch.long, device=device) for each in lists]
            return pad_sequence(tensors, batch_first=True, padding_value=value)

        ids = [row.ids for row in rows]
        inputs = {
            "input_ids": padded(ids, self._pad or 0),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }
        if rows[0].types:
            inputs["token_type_ids"] = padded([row.types for row in rows], 0)
        return self.model(**inputs).logits.float().view(-1)  # type: ignore[no-any-return]


class _Tokens(NamedTuple):
    """Token ids and token types of a row, and whether its prompt was cut."""

    ids: list[int]
    types: list[int]
    cut: bool


def _numbered(rows: Sequence[Any]) -> list[str]:
    return [f"row {number}" for number in range(1, len(rows) + 1)]


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keeps transformers from logging less than errors."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _text(part: Prompt, row: str, name: str) -> str:
    """The text of a prompt or completion of one message.

    Raises:
        ValueError: it has several messages.
    """
    if isinstance(part, str):
        return part
    if len(part) != 1:
        raise ValueError(f"{row}: {name} reads pairs of texts, but this has {len(part)} messages; give it as text")
    return str(part[0]["content"])


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token to pad rows with that ends no row; None if the tokenizer has none.

    Sequence classifiers read the last token that is not padding. If rows end with the padding token, as with padding by
    EOS, they would read the token before it. So the tokenizer's own padding token is taken unless answers end with it;
    otherwise a special token that the chat template does not write.
    """
    ends = set(stop_ids(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return str(tokenizer.pad_token)
    used = ends | {tokenizer.bos_token_id}
    template = str(tokenizer.chat_template or "")
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in used)
    names = [str(tokenizer.added_tokens_decoder[i]) for i in special]
    unused = [name for name in names if name not in template]
    return next((name for name in unused if "pad" in name.lower()), unused[0] if unused else None)
