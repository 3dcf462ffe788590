"""Answers of a model in this process."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from halos_pl.collect.engine import Answer, EngineError, Messages
from halos_pl.data.example import Example
from halos_pl.data.messages import is_blank
from halos_pl.data.special import SpecialTokens
from halos_pl.data.tokenize import Encoder
from halos_pl.data.turns import stop_ids
from halos_pl.policy.architecture import positions
from halos_pl.policy.drawing import Decoding, draw, plan_batches
from halos_pl.policy.identity import model_fingerprint
from halos_pl.policy.limits import check_prompts
from halos_pl.policy.sampled_text import sampled_texts
from halos_pl.policy.sampling import as_samples, encode_prompts, ends_of
from halos_pl.training.named_model import NamedModel

#: Seconds between two updates of an answer that is being written.
UPDATE = 0.08


class LocalEngine:
    """A model in this process.

    Args:
        named: the model, which is loaded here.
        tokenizer: its tokenizer, with a chat template.
        sampling: ``max_new_tokens``, ``temperature`` and ``top_p`` of :class:`halos_pl.policy.drawing.Decoding`.
        special_tokens_in_text: treatment of special tokens spelled in a message.
    """

    workers, seeded = 1, True

    def __init__(
        self,
        named: NamedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: dict[str, Any],
        special_tokens_in_text: SpecialTokens,
    ) -> None:
        self.tokenizer = tokenizer
        self._special = special_tokens_in_text
        self._encoder = Encoder(self.tokenizer, special_tokens_in_text)
        self._policy = named.load()
        # Requests are checked while the model samples, and a tokenizer may be used by one thread only.
        self._checks, self._checking = copy.deepcopy(self.tokenizer), threading.Lock()
        self._ends = ends_of(self._policy, self.tokenizer)
        self.sampling = {"engine": "transformers", **sampling}
        self.model = {"name": named.name, "checkpoint": named.ckpt_path, "weights": model_fingerprint(self._policy)}

    def refuse(self, messages: Messages) -> None:
        name = "the conversation"
        with self._checking:
            [ids] = encode_prompts(self._checks, [messages], [name], "", self._special)
        most, longest = positions(self._policy).most, self.sampling["max_new_tokens"]
        if most and len(ids) + longest > most:
            raise EngineError(
                f"{name} has {len(ids)} tokens, and an answer up to {longest}, but the model was trained with {most};"
                " start a new one"
            )

    def answer(self, messages: Messages, seeds: Sequence[int], show: Callable[[list[str]], None]) -> list[Answer]:
        n, how = len(seeds), self.sampling
        names, special = ["the conversation"], self._special
        [ids] = encode_prompts(self.tokenizer, [messages], names, "", special)
        check_prompts(self._policy, self.tokenizer, [ids], names, how["max_new_tokens"])
        [batch] = plan_batches(self._policy, [ids] * n, how["max_new_tokens"], n)
        stops, pad = tuple(stop_ids(self.tokenizer)), self.tokenizer.pad_token_id
        decoding = Decoding(stops, pad, batch.room, how["temperature"], how["top_p"])
        written = _Written(self.tokenizer, self._ends, n, show)
        drawn = draw(self._policy, [ids] * n, names * n, decoding, seeds, written)
        samples = as_samples(self._policy, self.tokenizer, [ids] * n, [each.ids for each in drawn])
        [texts] = sampled_texts(self._encoder, [(messages, None)], [samples], together=n > 1)
        for text in texts:
            if is_blank(text.text):
                raise EngineError("the model gave an empty answer")
            [encoded] = self._encoder.encode([Example(messages, (text.text,), (None,), "", finished=(text.finished,))])
            if isinstance(encoded, ValueError):
                raise EngineError(f"the model gave an answer that cannot be recorded: {encoded}")
        return [Answer(text.text, text.finished, text.same_tokens) for text in texts]


class _Written(BaseStreamer):
    """The texts of the answers so far, shown every ``UPDATE`` seconds, from the tokens of a batch."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], number: int, show: Callable[[list[str]], None]) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, {*ends}, show
        self._ids: list[list[int]] = [[] for _ in range(number)]
        self._ended = [False] * number
        self._is_prompt = True
        self._next = 0.0

    def put(self, value: Any) -> None:
        if self._is_prompt:  # transformers passes the prompts first
            self._is_prompt = False
            return
        for i, token in enumerate(value.tolist()):
            self._ended[i] = self._ended[i] or token in self._ends
            if not self._ended[i]:
                self._ids[i].append(token)
        if (now := time.monotonic()) >= self._next:
            self._next = now + UPDATE
            # A character of several tokens is shown once it is complete.
            self._show([self._tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd") for ids in self._ids])

    def end(self) -> None:
        """The whole answers are shown by the caller."""
