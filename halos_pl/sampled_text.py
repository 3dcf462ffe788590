"""The text with which a sampled completion is stored, chosen so that training on it gives the sampled tokens.

Decoding and encoding need not be inverse: special tokens may be dropped, the model may have split a word unlike its
tokenizer, and chat templates trim blanks. So each candidate text is encoded as in training and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halos_pl.data.example import Example, Prompt
from halos_pl.data.tokenize import Encoder, Tokens
from halos_pl.data.turns import Tools
from halos_pl.data.values import is_blank
from halos_pl.generate import Sample


@dataclass(frozen=True)
class SampledText:
    """A completion as text.

    Attributes:
        text: of the completion, without the token that ended it.
        finished: whether the model ended it.
        same_tokens: whether training on the text gives the sampled tokens, including the one that ended it.
    """

    text: str
    finished: bool
    same_tokens: bool


def sampled_texts(
    encoder: Encoder, asked: Sequence[tuple[Prompt, Tools]], samples: Sequence[Sequence[Sample]]
) -> list[list[SampledText]]:
    """The text of each sample: with its special tokens if training accepts them, else without.

    Args:
        encoder: with the settings of the training to come.
        asked: prompt and tools for each list of samples.
        samples: completions of each prompt.

    Returns:
        For each prompt, in order, a text for each sample.
    """
    tried: list[tuple[Sample, list[str]]] = []
    examples: list[Example] = []
    for (prompt, tools), own in zip(asked, samples, strict=True):
        for sample in own:
            ids = sample.completion_ids[: -1 if sample.finished else None]
            whole = str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            # Some templates add blanks around an answer, which the text must then lack.
            texts = list(dict.fromkeys([whole, whole.strip(), sample.raw, sample.text]))
            tried.append((sample, texts))
            examples += [Example(prompt, (t,), (None,), "", tools=tools, finished=(sample.finished,)) for t in texts]
    encoded = encoder.encode(examples)
    chosen = iter([_chosen(sample, [(text, next(encoded)) for text in texts]) for sample, texts in tried])
    return [[next(chosen) for _ in own] for own in samples]


def _chosen(sample: Sample, tried: list[tuple[str, Tokens | ValueError]]) -> SampledText:
    """The first text that is encoded to the sampled tokens; else the first that is accepted at all."""
    accepted = []
    for text, found in tried:
        if isinstance(found, ValueError) or is_blank(text):
            continue
        if found.completions == [sample.completion_ids]:
            return SampledText(text, sample.finished, True)
        accepted.append(text)
    return SampledText((accepted or [sample.raw])[0], sample.finished, False)
