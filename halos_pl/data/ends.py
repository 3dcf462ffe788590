"""Tokens at the edges of a text: what a tokenizer prepends, and the token that ends a completion."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from halos_pl.data.calls import all_texts
from halos_pl.data.example import Prompt


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Token ids of a text; with ``special``, including the special tokens that the tokenizer adds."""
    # verbose=False: a text longer than model_max_length is truncated, and counted, later.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens (BOS, [CLS]) that the tokenizer itself prepends to a text.

    Found by encoding, because ``add_bos_token``, post-processors and ``bos_token`` need not agree.
    """
    with_special, plain = ids_of(tokenizer, "a", special=True), ids_of(tokenizer, "a")
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def blank_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a line break, if the tokenizer prepends a blank to a text (SentencePiece's dummy prefix).

    A completion continues a rendered prompt, so no blank belongs before it: it is tokenised after a line break, which
    is then removed. Empty for tokenizers without such a prefix.
    """
    head = ids_of(tokenizer, "\n")
    return head if ids_of(tokenizer, "\na") != head + ids_of(tokenizer, "a") else []


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of EOS.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so the model could never learn to stop: "
            "set tokenizer.eos_token to a token of its vocabulary and save the tokenizer again."
        )
    return int(tokenizer.eos_token_id)


def _unended(ends: Sequence[str], text: str) -> str:
    """The text without end tokens at its end, and without the blanks that follow them in rendered dialogues."""
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
    return text


def without_end(ends: Sequence[str], completion: Prompt) -> Prompt:
    """The completion without end tokens at the end of its texts; they are added again later.

    Raises:
        ValueError: it contains nothing else.
    """
    if isinstance(completion, str):
        stripped: Prompt = _unended(ends, completion)
    else:
        stripped = [{**message, "content": _unended(ends, message["content"])} for message in completion]
    if not any(text.strip() for text in all_texts(stripped)) and any(text.strip() for text in all_texts(completion)):
        raise ValueError("The completion is nothing but the EOS token; give it some text, or remove the row.")
    return stripped


def refuse_end_inside(ends: Sequence[str], eos: str, completion: Prompt) -> None:
    """Refuses end tokens within a text, where the model would learn both to stop and to continue."""
    for text in all_texts(completion):
        for end in ends:
            if end in text:
                name = "the EOS token" if end == eos else "the token that ends a turn,"
                raise ValueError(
                    f"The completion spells {name} {end} before its end; remove it, or the row, or set"
                    " special_tokens_in_text to split, which encodes it as plain text."
                )


def with_end(end: int | None, ids: list[int]) -> list[int]:
    """``ids`` with ``end`` exactly once at the end; unchanged for None."""
    if end is None:
        return ids
    while ids and ids[-1] == end:
        ids.pop()
    return [*ids, end]
