"""The text to store for a sampled completion, chosen so that training on it gives the sampled tokens.

Encoding does not always invert decoding: special tokens may be dropped, the model may split a word differently from its
tokenizer, and chat templates strip text. So each candidate text is encoded as in training and compared.
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
        text: text of the completion, without the token that ended it.
        finished: whether the model ended it.
        same_tokens: whether training on the text gives the sampled tokens, including the one that ended it, after the
            same prompt tokens.
    """

    text: str
    finished: bool
    same_tokens: bool


def sampled_texts(
    encoder: Encoder,
    requests: Sequence[tuple[Prompt, Tools]],
    samples: Sequence[Sequence[Sample]],
    *,
    control: str = "",
    together: bool = False,
) -> list[list[SampledText]]:
    """The text of each sample, with its special tokens if training accepts them.

    Args:
        encoder: encoder with the settings that will be used in training.
        requests: prompt and tools of each list of samples.
        samples: completions of each prompt.
        control: text between every prompt and its completion.
        together: whether the completions of a prompt will be in one row. Training then gives them the same prompt, so a
            completion without the thoughts that the prompt opened (``<think>``) changes the tokens of the others.

    Returns:
        For each prompt, in order, a text for each sample.
    """
    tried: list[tuple[Sample, list[str]]] = []
    examples: list[Example] = []
    for (prompt, tools), completions in zip(requests, samples, strict=True):
        for sample in completions:
            ids = sample.completion_ids[: -1 if sample.finished else None]
            whole = str(encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            # Some templates add whitespace around an answer; the text must then be stripped.
            texts = list(dict.fromkeys([whole, whole.strip(), sample.raw, sample.text]))
            tried.append((sample, texts))
            examples += [Example(prompt, (t,), (None,), "", tools=tools, finished=(sample.finished,)) for t in texts]
    encoded = encoder.encode(examples)
    suffix = list(encoder.tokenizer(control, add_special_tokens=False)["input_ids"]) if control else []
    each = iter([_chosen(sample, [(text, next(encoded)) for text in texts], suffix) for sample, texts in tried])
    chosen = [[next(each) for _ in completions] for completions in samples]
    return _in_one_row(encoder, requests, samples, chosen, suffix) if together else chosen


def _in_one_row(
    encoder: Encoder,
    requests: Sequence[tuple[Prompt, Tools]],
    samples: Sequence[Sequence[Sample]],
    chosen: list[list[SampledText]],
    suffix: list[int],
) -> list[list[SampledText]]:
    """The chosen texts, with ``same_tokens`` updated for encoding all texts of a prompt as one example."""
    examples = [
        Example(
            prompt,
            tuple(each.text for each in texts),
            (None,) * len(texts),
            "",
            tools=tools,
            finished=tuple(each.finished for each in texts),
        )
        for (prompt, tools), texts in zip(requests, chosen, strict=True)
    ]
    updated = []
    for completions, texts, encoded in zip(samples, chosen, encoder.encode(examples), strict=True):
        same = [False] * len(completions)
        if isinstance(encoded, Tokens):
            prompt = encoded.prompt + suffix
            same = [
                ids == sample.completion_ids and prompt == sample.prompt_ids
                for ids, sample in zip(encoded.completions, completions, strict=True)
            ]
        updated.append([replace(text, same_tokens=equal) for text, equal in zip(texts, same, strict=True)])
    return updated


def _chosen(sample: Sample, tried: list[tuple[str, Tokens | ValueError]], suffix: list[int]) -> SampledText:
    """The first text that encodes to the sampled tokens; otherwise the first that is accepted at all."""
    accepted = []
    for text, encoded in tried:
        if isinstance(encoded, ValueError) or is_blank(text):
            continue
        if encoded.completions == [sample.completion_ids] and encoded.prompt + suffix == sample.prompt_ids:
            return SampledText(text, sample.finished, True)
        accepted.append(text)
    return SampledText((accepted or [sample.raw])[0], sample.finished, False)
