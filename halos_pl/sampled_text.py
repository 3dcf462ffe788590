"""The text that stands for a sampled completion in a file of feedback: one that trains on the tokens that were sampled.

Text need not give back the tokens that it was decoded from: special tokens may be dropped, a model may have spelled a
word with other tokens than its tokenizer does, and chat templates trim blanks. So each text is encoded as training will
encode it, and compared.
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
        finished: the model ended it by itself.
        same_tokens: training on it gives the tokens that were sampled, the one that ended it included.
    """

    text: str
    finished: bool
    same_tokens: bool


def sampled_texts(
    encoder: Encoder, asked: Sequence[tuple[Prompt, Tools]], samples: Sequence[Sequence[Sample]]
) -> list[list[SampledText]]:
    """The text of each sample: with its special tokens where training accepts them, else without.

    Args:
        encoder: as training will use it.
        asked: the prompt and the tools of each list of samples.
        samples: completions of each prompt.

    Returns:
        for each prompt, in order, a text for each sample.
    """
    tried: list[tuple[Sample, list[str]]] = []
    examples: list[Example] = []
    for (prompt, tools), own in zip(asked, samples, strict=True):
        for sample in own:
            ids = sample.completion_ids[: -1 if sample.finished else None]
            whole = str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            # Some templates put blanks around an answer, which then must not have them itself.
            texts = list(dict.fromkeys([whole, whole.strip(), sample.raw, sample.text]))
            tried.append((sample, texts))
            examples += [Example(prompt, (t,), (None,), "", tools=tools, finished=(sample.finished,)) for t in texts]
    encoded = encoder.encode(examples)
    chosen = iter([_chosen(sample, [(text, next(encoded)) for text in texts]) for sample, texts in tried])
    return [[next(chosen) for _ in own] for own in samples]


def _chosen(sample: Sample, tried: list[tuple[str, Tokens | ValueError]]) -> SampledText:
    """Of the texts with what they are encoded to, the first that gives the sampled tokens, or that is accepted."""
    accepted = []
    for text, found in tried:
        if isinstance(found, ValueError) or is_blank(text):
            continue
        if found.completions == [sample.completion_ids]:
            return SampledText(text, sample.finished, True)
        accepted.append(text)
    return SampledText((accepted or [sample.raw])[0], sample.finished, False)
