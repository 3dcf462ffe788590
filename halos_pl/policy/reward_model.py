"""Reward models of Hugging Face's format: sequence classifiers with one label, which score completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

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
    is too long loses the beginning of its prompt.

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
        result = load_pretrained(loader, spec, weights=True, dtype=dtype or "auto", **extra)
        tokenizer = load_tokenizer(spec)
        model, info = (result, {}) if is_adapter else result
        if missing := sorted(info.get("missing_keys", ())):
            raise ModelError(
                f"{name} is not a trained reward model: its files lack {some(missing)} of a {type(model).__name__}"
            )
        if is_adapter:  # its base has another padding token, or none
            text_config(model).pad_token_id = tokenizer.pad_token_id
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, name=name, **options)

    def score(
        self, rows: Sequence[tuple[Prompt, Prompt]], finished: Sequence[bool] | None = None, *, progress: bool = False
    ) -> list[float]:
        """The reward of each row.

        Args:
            rows: Prompts, as text or messages, and completions.
            finished: Whether each completion is complete, so that it ends with the token at which the model stops;
                default: all are.
            progress: Whether to show the progress.

        Raises:
            ValueError: naming the first row, counted from 1, that cannot be encoded, or whose reward is not finite.
        """
        encoded = list(self._encoded(rows, finished or [True] * len(rows)))
        order = sorted(range(len(rows)), key=lambda i: -len(encoded[i][0]))  # the longest first, should memory be short
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        rewards = [0.0] * len(rows)
        for batch in counted(batches, "scoring") if progress else batches:
            for i, reward in zip(batch, self._rewards([encoded[i] for i in batch]).tolist(), strict=True):
                rewards[i] = reward
        for number, reward in enumerate(rewards, start=1):
            if not abs(reward) < float("inf"):
                raise ValueError(f"row {number}: the reward that {self.name} gives it is {reward}")
        return rewards

    def _encoded(
        self, rows: Sequence[tuple[Prompt, Prompt]], finished: Sequence[bool]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids and token types of each row."""
        if self.tokenizer.cls_token_id is not None and self.tokenizer.sep_token_id is not None:
            yield from self._pairs(rows)
            return
        examples = [
            Example(asked(prompt, self.text_prompts), (completion,), (), "", finished=(whole,))
            for (prompt, completion), whole in zip(rows, finished, strict=True)
        ]
        prefix = prefix_ids(self.tokenizer)
        for number, tokens in enumerate(Encoder(self.tokenizer, self._special).encode(examples), start=1):
            if isinstance(tokens, ValueError):
                raise ValueError(f"row {number}: {tokens}") from tokens
            prompt, completion = tokens.prompt, tokens.completions[0]
            if self.max_length and len(prompt) + len(completion) > self.max_length:
                self.truncated += 1
                kept = prefix if prompt[: len(prefix)] == prefix else []
                room = self.max_length - len(completion) - len(kept)
                prompt = [*kept, *prompt[-room:]] if room > 0 else prompt[-1:]
                completion = completion[: self.max_length - len(prompt)]
            yield prompt + completion, []

    def _pairs(self, rows: Sequence[tuple[Prompt, Prompt]]) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids of rows as pairs of texts, for an encoder."""
        for number, (prompt, completion) in enumerate(rows, start=1):
            texts = [_text(part, f"row {number}", self.name) for part in (prompt, completion)]
            tokens: Any = self.tokenizer(*texts, verbose=False)
            if self.max_length and len(tokens["input_ids"]) > self.max_length:
                self.truncated += 1
                tokens = self.tokenizer(*texts, truncation="longest_first", max_length=self.max_length)
            yield list(tokens["input_ids"]), list(tokens.get("token_type_ids") or [])

    @torch.no_grad()
    def _rewards(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        device = next(self.model.parameters()).device

        def padded(lists: Sequence[Sequence[int]], value: int) -> Tensor:
            tensors = [torch.tensor(each, dtype=torch.long, device=device) for each in lists]
            return pad_sequence(tensors, batch_first=True, padding_value=value)

        ids = [row for row, _ in rows]
        inputs = {
            "input_ids": padded(ids, self._pad or 0),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }
        if rows[0][1]:
            inputs["token_type_ids"] = padded([types for _, types in rows], 0)
        return self.model(**inputs).logits.float().view(-1)  # type: ignore[no-any-return]


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
