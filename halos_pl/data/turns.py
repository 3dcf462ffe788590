"""Where an assistant's turn ends in a chat template, and which tokens mark turns.

Both are derived from rendered test dialogues, so this works for any template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.data.render import WORD, render

#: An empty span such as ``<think>\n\n</think>``, which neither opens nor ends a turn.
_EMPTY_SPAN = re.compile(r"<(\w+)>\s*</\1>")
#: A token in brackets of some kind.
_FORM = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)
_TAG = re.compile(r"<(/?)(\w+)>")


def _segments(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str] | None:
    """What the template writes before, between and after the contents of a dialogue; None if it refuses it."""
    words = [WORD.format(i) for i in range(len(roles))]
    try:
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        text = render(tokenizer, messages, prompt=False)
    except ValueError:
        return None
    segments, at = [], 0
    for word in words:
        place = text.rfind(word) if word == words[-1] else text.find(word, at)
        if place < at:
            return None
        segments.append(text[at:place])
        at = place + len(word)
    return [*segments, text[at:]]


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, longest first; without tokens, nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """The added tokens that may mark the form of a dialogue, and whether each is special.

    Tokens that are not special count only in brackets, such as ``[INST]``: tokenizers also add line breaks and spaces,
    and users add words.
    """
    added = {token.content: bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    return {token: special for token, special in added.items() if token.strip() and (special or _FORM.fullmatch(token))}


@dataclass(frozen=True)
class TurnEnd:
    """How the template ends an assistant's turn.

    Attributes:
        token: token at which the model stops.
        id: id of that token.
        after: what the template writes after it at the end of a dialogue, such as a line break.
    """

    token: str
    id: int
    after: str

    def cut(self, text: str) -> str:
        """A rendered completion up to the end of its last turn, ``token`` included.

        Raises:
            ValueError: the completion ends differently from other turns.
        """
        if text.endswith(self.token + self.after):
            return text[: len(text) - len(self.after)]
        before, token, rest = text.rpartition(self.token)
        if not token or rest.strip():
            raise ValueError(
                f"The chat template ends this completion with {text[-40:]!r}, but other dialogues with"
                f" {self.token + self.after!r}; use a template that ends every assistant turn in the same way."
            )
        return before + token


def turn_end(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str] = ()) -> TurnEnd | None:
    """How an assistant's turn ends, found by rendering; None if the template writes no token there.

    Of the tokens after the content of the last message:

    1. Tokens from the first that begins a message are not part of the turn (some templates always add the head of an
       answer).
    2. What also follows an inner turn ends the turn: up to EOS, else up to the last such token
       (``<|END_RESPONSE|><|END_OF_TURN_TOKEN|>``; but of phi-3's ``<|end|>\\n<|endoftext|>`` only the first).
    3. If an inner turn ends with another token (harmony's ``<|end|>``, last ``<|return|>``), or the template refuses a
       second turn: of the adjacent tokens, the one that also ends the user's turn, else EOS, else the last.

    Added tokens that are not special count only if no special one but EOS is present.

    Args:
        tokenizer: without a chat template, the result is None.
        roles: roles of a dialogue to try if the template refuses the plain ones; the last is the assistant's.

    Raises:
        ValueError: the template refuses every dialogue.
    """
    if not tokenizer.chat_template:
        return None
    dialogues = dict.fromkeys(
        [("user", "assistant"), ("system", "user", "assistant"), *([tuple(roles)] if roles else [])]
    )
    tried = {dialogue: segments for dialogue in dialogues if (segments := _segments(tokenizer, dialogue))}
    if not tried:
        raise ValueError("The chat template refuses a dialogue of user and assistant.")
    first = next(iter(tried))
    tail, inner = tried[first][-1], _segments(tokenizer, [*first, "user", "assistant"])
    eos, added = str(tokenizer.eos_token), added_tokens(tokenizer)
    pattern = any_of([eos, *(token for token, special in added.items() if special)])
    if set(pattern.findall(tail)) <= {eos}:
        pattern = any_of([eos, *added])
    openers = set.intersection(*(set(pattern.findall(segments[0])) for segments in tried.values())) - {eos}
    matches = list(pattern.finditer(tail))
    matches = list(takewhile(lambda match: match[0] not in openers, matches)) or matches[:1]
    if not matches:
        return None
    pairs = enumerate(zip(tail, inner[len(first)], strict=False)) if inner else iter(())
    shared = next((i for i, (a, b) in pairs if a != b), min(len(tail), len(inner[len(first)])) if inner else 0)
    both = [match for match in matches if match.end() <= shared]
    if both:
        end = next((match for match in both if match[0] == eos), both[-1])
    else:
        run = matches[:1]
        for match in matches[1:]:
            if match.start() != run[-1].end():
                break
            run.append(match)
        users = pattern.search(tried[first][-2])
        likely = [match for token in (users and users[0], eos) for match in run if match[0] == token]
        end = (likely or run[-1:])[0]
    token: Any = tokenizer.convert_tokens_to_ids(end[0])
    return TurnEnd(end[0], int(token), tail[end.end() :])


def spelled_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after an answer, if that contains no token; else empty."""
    if not tokenizer.chat_template:
        return ""
    segments = _segments(tokenizer, ("user", "assistant"))
    tail = segments[-1].strip() if segments else ""
    return "" if any_of([str(tokenizer.eos_token), *added_tokens(tokenizer)]).search(tail) else tail


def ending(tokenizer: PreTrainedTokenizerBase, text: str) -> TurnEnd | None:
    """The added token at the end of a rendered dialogue; None if there is none."""
    *_, last = [None, *any_of(added_tokens(tokenizer)).finditer(text)]
    if last is None or text[last.end() :].strip():
        return None
    token: Any = tokenizer.convert_tokens_to_ids(last[0])
    return TurnEnd(last[0], int(token), text[last.end() :])


def call_end(tokenizer: PreTrainedTokenizerBase, text: str, usual: TurnEnd | None) -> TurnEnd | None:
    """How a rendered dialogue ends after a tool call, for which some templates write ``<|call|>``."""
    if usual is None or text.rstrip().endswith(usual.token):
        return usual
    return ending(tokenizer, text) or usual


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation stops, regardless of the model's settings: EOS and the end of a turn."""
    try:
        end = turn_end(tokenizer)
    except ValueError:
        end = None
    eos: Any = tokenizer.eos_token_id
    return sorted({*([] if eos is None else [eos]), *([] if end is None else [end.id])})


def _rendered(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the template writes around the messages of dialogues, without empty spans."""
    for roles in (
        ["user", "assistant", "user", "assistant"],
        ["user", "assistant"],
        ["system", "user", "assistant"],
    ):
        for segment in _segments(tokenizer, roles) or []:
            yield _EMPTY_SPAN.sub("", segment)


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The tokens with which a text could forge a turn; empty without a chat template.

    These are BOS, EOS, padding, [CLS] and [SEP]; added tokens that the template writes around the messages of a plain
    dialogue; and special tokens in the template's source. Paired tags such as ``<think>`` and ``</think>`` mark a span
    within a turn and count only if the template writes them around messages. A special token that the template never
    writes (``<tool>``, added by a user) cannot forge a turn.
    """
    if not tokenizer.chat_template:
        return frozenset()
    names = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token")
    named = (str(getattr(tokenizer, name, None) or "") for name in names)
    markers = {token for token in named if _FORM.fullmatch(token) or token == tokenizer.eos_token}
    added = added_tokens(tokenizer)
    pattern = any_of(added)
    markers |= {token for segment in _rendered(tokenizer) for token in pattern.findall(segment)}
    template: Any = tokenizer.chat_template
    source = "".join(template.values()) if isinstance(template, dict) else str(template)

    def paired(token: str) -> bool:
        tag = _TAG.fullmatch(token)
        return tag is not None and f"<{'' if tag[1] else '/'}{tag[2]}>" in added

    return frozenset(markers | {t for t, special in added.items() if special and t in source and not paired(t)})
