"""The engine ``transformers``: a model in this process, on one device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from halos_pl.data.prompt_files import SAME_TOKENS, PromptRow
from halos_pl.data.tokenize import Encoder
from halos_pl.data.turns import stop_ids
from halos_pl.policy.drawing import Decoding, Drawn, draw, plan_batches
from halos_pl.policy.identity import identity
from halos_pl.policy.limits import check_prompts
from halos_pl.policy.sampled_text import sampled_texts
from halos_pl.policy.sampling import as_samples, encode_prompts
from halos_pl.sampling.engine import Sampled, SamplingSettings
from halos_pl.training.named_model import NamedModel


class TransformersEngine:
    """Samples with a model in this process. Equal prompts of a batch are processed once.

    Args:
        named: The model.
        rows: The prompts.
        sampling: How to draw.
        control: Text between every prompt and its completion.
        special_tokens_in_text: How to treat special tokens in the text of messages.
        batch_size: Maximum number of completions in a batch.
        together: Whether the completions of a prompt will be in one row.

    Raises:
        ValueError: A prompt cannot be encoded; names it.
    """

    def __init__(
        self,
        named: NamedModel,
        rows: Sequence[PromptRow],
        sampling: SamplingSettings,
        *,
        control: str,
        special_tokens_in_text: Any,
        batch_size: int,
        together: bool,
    ) -> None:
        self.named, self.rows, self.sampling = named, rows, sampling
        self.control, self.together = control, together
        n = sampling.n
        self.batch_size = batch_size - batch_size % n if n <= batch_size else batch_size  # keeps prompts whole
        self.tokenizer = named.tokenizer()
        self._encoder = Encoder(self.tokenizer, special_tokens_in_text)
        self._names, tools = [row.place for row in rows], [row.tools for row in rows]
        prompts = [row.prompt for row in rows]
        self._encoded = encode_prompts(self.tokenizer, prompts, self._names, control, special_tokens_in_text, tools)
        self._model: nn.Module | None = None
        self._drawn = self._others = 0

    def load(self) -> dict[str, Any]:
        self._model = self.named.load()
        check_prompts(self._model, self.tokenizer, self._encoded, self._names, self.sampling.max_new_tokens)
        return identity(self._model, self.tokenizer)

    def sample(self, done: Collection[int]) -> Iterator[tuple[int, list[Sampled]]]:
        model, n = self._model, self.sampling.n
        assert model is not None  # load() comes first
        prompts = [ids for ids in self._encoded for _ in range(n)]
        seeds = [seed for row in self.rows for seed in self.sampling.seeds(row)]
        stops, pad = tuple(stop_ids(self.tokenizer)), self.tokenizer.pad_token_id
        waiting: dict[int, dict[int, Drawn]] = {}
        # The batches do not depend on what is done, since a completion's last bits depend on its batch.
        for batch in plan_batches(model, prompts, self.sampling.max_new_tokens, self.batch_size):
            if all(i // n in done for i in batch.rows):
                continue
            decoding = Decoding(stops, pad, batch.room, self.sampling.temperature, self.sampling.top_p)
            some, names = [prompts[i] for i in batch.rows], [self._names[i // n] for i in batch.rows]
            drawn = draw(model, some, names, decoding, [seeds[i] for i in batch.rows])
            for i, each in zip(batch.rows, drawn, strict=True):
                waiting.setdefault(i // n, {})[i % n] = each
            for row in [row for row, completions in waiting.items() if len(completions) == n]:
                completions = waiting.pop(row)
                if row not in done:
                    yield row, self._texts(row, [completions[k] for k in range(n)])

    def _texts(self, row: int, drawn: list[Drawn]) -> list[Sampled]:
        assert self._model is not None
        prompt, n = self.rows[row], self.sampling.n
        samples = as_samples(self._model, self.tokenizer, [self._encoded[row]] * n, [each.ids for each in drawn])
        request = (prompt.prompt, prompt.tools)
        (texts,) = sampled_texts(self._encoder, [request], [samples], control=self.control, together=self.together)
        self._drawn += n
        self._others += sum(not text.same_tokens for text in texts)
        return [
            Sampled(text.text, text.finished, seed, len(each.ids), each.logprobs, text.same_tokens)
            for text, seed, each in zip(texts, self.sampling.seeds(prompt), drawn, strict=True)
        ]

    def summary(self) -> str:
        if not self._others:
            return ""
        return (
            f"training on {self._others} of {self._drawn} completions would not give the sampled tokens"
            f" ({SAME_TOKENS}: false): the tokenizer splits their text differently, or a special token that would forge"
            " a turn was dropped"
        )
