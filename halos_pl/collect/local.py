"""Answers of a model in this process."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.collect.engine import Answer, EngineError, Messages
from halos_pl.data.example import Example
from halos_pl.data.messages import is_blank
from halos_pl.data.special import SpecialTokens
from halos_pl.data.tokenize import Encoder
from halos_pl.policy.architecture import positions
from halos_pl.policy.reference import model_fingerprint
from halos_pl.policy.sampled_text import sampled_texts
from halos_pl.policy.sampling import encode_prompts, ends_of, generate
from halos_pl.training.named_model import NamedModel

#: Seconds between two updates of an answer that is being written.
UPDATE = 0.08


class LocalEngine:
    """A model in this process.

    Args:
        named: the model, which is loaded here.
        tokenizer: its tokenizer, with a chat template.
        sampling: ``max_new_tokens``, ``temperature`` and ``top_p`` of :func:`halos_pl.policy.sampling.generate`.
        special_tokens_in_text: treatment of special tokens spelled in a message.
    """

    workers = 1

    def __init__(
        self,
        named: NamedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: dict[str, Any],
        special_tokens_in_text: SpecialTokens,
    ) -> None:
        self.tokenizer = tokenizer
        self._options = sampling | {"special_tokens_in_text": special_tokens_in_text}
        self._encoder = Encoder(self.tokenizer, special_tokens_in_text)
        self._policy = named.load()
        # Requests are checked while the model samples, and a tokenizer may be used by one thread only.
        self._checks, self._checking = copy.deepcopy(self.tokenizer), threading.Lock()
        self._ends = ends_of(self._policy, self.tokenizer)
        self.sampling = {"engine": "transformers", **sampling}
        self.model = {"name": named.name, "checkpoint": named.ckpt_path, "weights": model_fingerprint(self._policy)}

    def refuse(self, messages: Messages) -> None:
        name, special = "the conversation", self._options["special_tokens_in_text"]
        with self._checking:
            [ids] = encode_prompts(self._checks, [messages], [name], "", special)
        most, longest = positions(self._policy).most, self.sampling["max_new_tokens"]
        if most and len(ids) + longest > most:
            raise EngineError(
                f"{name} has {len(ids)} tokens, and an answer up to {longest}, but the model was trained with {most};"
                " start a new one"
            )

    def answer(self, messages: Messages, number: int, seed: int, show: Callable[[list[str]], None]) -> list[Answer]:
        written = _Written(self.tokenizer, self._ends, number, show)
        options: dict[str, Any] = {"num_samples": number, "batch_size": number, "seed": seed, "progress": False}
        samples = generate(
            self._policy,
            self.tokenizer,
            [messages],
            names=["the conversation"],
            on_tokens=written,
            **options,
            **self._options,
        )
        [texts] = sampled_texts(self._encoder, [(messages, None)], samples, together=number > 1)
        for text in texts:
            if is_blank(text.text):
                raise EngineError("the model gave an empty answer")
            [encoded] = self._encoder.encode([Example(messages, (text.text,), (None,), "", finished=(text.finished,))])
            if isinstance(encoded, ValueError):
                raise EngineError(f"the model gave an answer that cannot be recorded: {encoded}")
        return [Answer(text.text, text.finished, text.same_tokens) for text in texts]


class _Written:
    """The texts of the answers so far, shown every ``UPDATE`` seconds."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], number: int, show: Callable[[list[str]], None]) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, {*ends}, show
        self._ids: list[list[int]] = [[] for _ in range(number)]
        self._ended = [False] * number
        self._next = 0.0

    def __call__(self, tokens: list[int]) -> None:
        for i, token in enumerate(tokens):
            self._ended[i] = self._ended[i] or token in self._ends
            if not self._ended[i]:
                self._ids[i].append(token)
        if (now := time.monotonic()) >= self._next:
            self._next = now + UPDATE
            # A character of several tokens is shown once it is complete.
            self._show([self._tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd") for ids in self._ids])
