"""The text with which a sampled completion is stored, chosen so that training on it gives the sampled tokens.

Decoding and encoding need not be inverse: special tokens may be dropped, the model may have split a word unlike its
tokenizer, and chat templates trim blanks. So each candidate text is encoded as in training and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from halos_pl.data.example import Example, Prompt
from halos_pl.data.messages import is_blank
from halos_pl.data.render import Tools
from halos_pl.data.tokenize import Encoder, Tokens
from halos_pl.policy.sampling import Sample


@dataclass(frozen=True)
class SampledText:
    """A completion as text.

    Attributes:
        text: of the completion, without the token that ended it.
        finished: whether the model ended it.
        same_tokens: whether training on the text gives the sampled tokens, including the one that ended it, after the
            tokens that they were sampled from.
    """

    text: str
    finished: bool
    same_tokens: bool


def sampled_texts(
    encoder: Encoder,
    asked: Sequence[tuple[Prompt, Tools]],
    samples: Sequence[Sequence[Sample]],
    *,
    control: str = "",
    together: bool = False,
) -> list[list[SampledText]]:
    """The text of each sample: with its special tokens if training accepts them, else without.

    Args:
        encoder: with the settings of the training to come.
        asked: prompt and tools for each list of samples.
        samples: completions of each prompt.
        control: text between every prompt and its completion.
        together: the completions of a prompt stand in one row. Training gives them one prompt, so that one which lacks
            the thoughts that the prompt opened (``<think>``) changes the tokens of the others.

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
    behind = list(encoder.tokenizer(control, add_special_tokens=False)["input_ids"]) if control else []
    each = iter([_chosen(sample, [(text, next(encoded)) for text in texts], behind) for sample, texts in tried])
    chosen = [[next(each) for _ in own] for own in samples]
    return _in_one_row(encoder, asked, samples, chosen, behind) if together else chosen


def _in_one_row(
    encoder: Encoder,
    asked: Sequence[tuple[Prompt, Tools]],
    samples: Sequence[Sequence[Sample]],
    chosen: list[list[SampledText]],
    behind: list[int],
) -> list[list[SampledText]]:
    """The chosen texts, with ``same_tokens`` as it is where those of a prompt are encoded as one example."""
    examples = [
        Example(
            prompt,
            tuple(each.text for each in own),
            (None,) * len(own),
            "",
            tools=tools,
            finished=tuple(each.finished for each in own),
        )
        for (prompt, tools), own in zip(asked, chosen, strict=True)
    ]
    told = []
    for own, texts, found in zip(samples, chosen, encoder.encode(examples), strict=True):
        same = [False] * len(own)
        if isinstance(found, Tokens):
            prompt = found.prompt + behind
            same = [
                ids == sample.completion_ids and prompt == sample.prompt_ids
                for ids, sample in zip(found.completions, own, strict=True)
            ]
        told.append([replace(text, same_tokens=it) for text, it in zip(texts, same, strict=True)])
    return told


def _chosen(sample: Sample, tried: list[tuple[str, Tokens | ValueError]], behind: list[int]) -> SampledText:
    """The first text that is encoded to the sampled tokens; else the first that is accepted at all."""
    accepted = []
    for text, found in tried:
        if isinstance(found, ValueError) or is_blank(text):
            continue
        if found.completions == [sample.completion_ids] and found.prompt + behind == sample.prompt_ids:
            return SampledText(text, sample.finished, True)
        accepted.append(text)
    return SampledText((accepted or [sample.raw])[0], sample.finished, False)
