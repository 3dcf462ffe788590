"""From text or messages to token ids: BOS at most once, one end, and the boundary in one place.

A completion ends at the token at which the model stops: EOS after plain text, the end of the assistant's turn after
messages (``<end_of_turn>``, ``<|eot_id|>``), where the chat template writes one. What the template writes behind that
token, a line break or EOS, carries no loss, because in use nothing is generated behind it.

A completion is tokenised alone, never together with its prompt: that is what the model meets in use, where
generation starts after the prompt's last token. So prompt and completion cannot merge into other tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.data.example import Prompt
from halos_pl.data.special import SpecialText, SpecialTokens
from halos_pl.data.turns import TurnEnd, refuse_dropped, render, turn_end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # verbose=False: a text longer than model_max_length is cut later and counted there.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens (BOS, [CLS]) that the tokenizer itself puts before a text.

    Found by encoding, because ``add_bos_token``, post-processors and ``bos_token`` need not agree.
    """
    with_special, plain = _ids(tokenizer, "a", special=True), _ids(tokenizer, "a")
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def _blank_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a line break, where the tokenizer puts a blank before a text (SentencePiece's dummy prefix).

    What comes after a prompt's rendering is no beginning of a text, so no blank belongs there: it is tokenised behind a
    line break, which is then cut off. Empty for a tokenizer to which a text is the same wherever it stands.
    """
    head = _ids(tokenizer, "\n")
    return head if _ids(tokenizer, "\na") != head + _ids(tokenizer, "a") else []


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so the model could never learn to stop: "
            "set tokenizer.eos_token to a token of its vocabulary and save the tokenizer again."
        )
    return int(tokenizer.eos_token_id)


def _begun(prompt: Prompt) -> bool:
    """Whether the prompt ends in what the assistant has begun to say, and the completion goes on with."""
    return isinstance(prompt, list) and bool(prompt) and prompt[-1].get("role") == "assistant"


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    text = render(tokenizer, prompt, prompt=True, begun=_begun(prompt))
    refuse_dropped(tokenizer, prompt, text)
    return text


def _prompt_ids(prefix: list[int], prompt: Prompt, ids: list[int]) -> list[int]:
    if isinstance(prompt, str) and ids[: len(prefix)] != prefix:  # the text may spell its BOS itself
        ids = prefix + ids
    if not ids:
        raise ValueError("The prompt gives no token with this tokenizer; give it some text.")
    return ids


def _completion_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, before: str, completion: Prompt) -> str:
    """What the completion adds to the prompt's text ``before``; of messages with all that the template writes."""
    if isinstance(prompt, str):
        if isinstance(completion, str):
            return completion
        raise ValueError(
            "The completion is a message list but the prompt is plain text: give both as messages "
            'or both as text (a prompt as messages: [{"role": "user", "content": ...}]).'
        )
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if _begun(prompt) and completion[0]["role"] == "assistant":
        said = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
        prompt, completion = prompt[:-1], [said, *completion[1:]]
    whole = render(tokenizer, prompt + completion, prompt=False)
    if not whole.startswith(before):
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
        mend = "Use a template whose generation prompt is the start of an assistant message, or plain text."
        if opened := _OPENED.search(before):
            tag = opened[1]
            mend = (
                f"Its generation prompt opens <{tag}>: begin the completion with <{tag}>...</{tag}>, or use a template"
                " that does not open it."
            )
        raise ValueError(
            "The chat template does not continue the prompt when the completion is added: at the end of the "
            f"prompt it writes {before[same : same + 40]!r}, and with the completion "
            f"{whole[same : same + 40]!r} in its place, so the model would be trained on another prefix than it"
            f" meets in use. {mend}"
        )
    text = whole[len(before) :]
    if not text:
        raise ValueError(
            "The chat template writes nothing for the completion; its messages should have the role 'assistant'."
        )
    refuse_dropped(tokenizer, prompt + completion, whole)
    if doubled := _DOUBLED_SPAN.search(before[-40:] + text):
        raise ValueError(
            f"The chat template writes {doubled[0]!r}: an empty <{doubled[1]}> of its own before the one in the"
            " content, which it does not take for its own. Use a template that reads thoughts from the content, or"
            " remove them from it."
        )
    return text


#: A span that the end of a text opens: ``<think>\n``.
_OPENED = re.compile(r"<(\w+)>\s*$")
#: An empty span, and another of the same name behind it: ``<think>\n\n</think>\n\n<think>``.
_DOUBLED_SPAN = re.compile(r"<(\w+)>\s*</\1>\s*<\1>")


def _texts(completion: Prompt) -> list[str]:
    return [completion] if isinstance(completion, str) else [message["content"] for message in completion]


def _unended(ends: Sequence[str], text: str) -> str:
    """The text without the end tokens at its end, and what is blank behind them, as a rendered dialogue has it."""
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
    return text


def _stripped(ends: Sequence[str], completion: Prompt) -> Prompt:
    """The completion without end tokens at the end of its texts: the row's own end belongs there.

    Raises:
        ValueError: nothing else is in it.
    """
    if isinstance(completion, str):
        found: Prompt = _unended(ends, completion)
    else:
        found = [{**message, "content": _unended(ends, message["content"])} for message in completion]
    if not any(text.strip() for text in _texts(found)) and any(text.strip() for text in _texts(completion)):
        raise ValueError("The completion is nothing but the EOS token; give it some text, or remove the row.")
    return found


def _refuse_end_inside(ends: Sequence[str], eos: str, completion: Prompt) -> None:
    """The model would learn to stop there, and to go on; at the end of a text it is the one that belongs there."""
    for text in _texts(completion):
        for end in ends:
            if end in text:
                name = "the EOS token" if end == eos else "the token that ends a turn,"
                raise ValueError(
                    f"The completion spells {name} {end} before its end; remove it, or the row, or set"
                    " data.special_tokens_in_text to split, which encodes it as plain text."
                )


def _ended(end: int, ids: list[int]) -> list[int]:
    while ids and ids[-1] == end:
        ids.pop()
    return [*ids, end]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, special: SpecialText | None = None
) -> list[int]:
    """Token ids of a prompt: at least one, never followed by EOS.

    Text: its plain tokens, with BOS first iff the tokenizer puts one before a text. Messages: the chat
    template with the generation prompt, or up to the end of the last message if that is the assistant's, which the
    completion then goes on with; whether there is a BOS is the template's to say, as in use.

    Args:
        tokenizer: of the model.
        prompt: text or messages.
        special: what is done with special tokens in it; default: they are encoded as the tokenizer does it.

    Raises:
        ValueError: messages without a chat template, messages that the template refuses, a prompt
            that gives no token at all, or one that ``special`` refuses.
    """
    if special is not None:
        special.refuse("The prompt", prompt)
    if special is not None and special.mode == "split" and special.found(prompt):
        [ids] = special.encode_held([_prompt_text(tokenizer, special.hold(prompt))])
    else:
        ids = _ids(tokenizer, _prompt_text(tokenizer, prompt))
    return _prompt_ids(prefix_ids(tokenizer), prompt, ids)


def encode_completion(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> list[int]:
    """Token ids of a completion; the token at which the model stops is the last one and is not doubled.

    Text after a text prompt is tokenised alone, as any text is, and ends with EOS, or with the end of a turn where it
    spells that itself. Messages (or text, taken as one assistant message) after a message prompt are what the chat
    template writes for the whole conversation, less what it writes for the prompt, up to the end of the last turn
    (see :func:`halos_pl.data.turns.turn_end`); EOS follows only where the template ends a turn with no token.

    Raises:
        ValueError: no EOS token; no chat template for messages; messages after a text prompt; a template
            that does not continue the prompt's rendering; a text that forges a turn.
    """
    [encoded] = encode_batch(tokenizer, [(prompt, [completion])])
    if isinstance(encoded, ValueError):
        raise encoded
    return encoded[1][0]


Encoded = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and of each of its completions."""


class Encoder:
    """Encodes conversations with one tokenizer.

    Args:
        tokenizer: with a chat template where the conversations are messages.
        special_tokens_in_text: what is done with them, see :class:`halos_pl.data.special.SpecialText`.

    Attributes:
        spelled: for each special token, how many conversations have it in their text or in a role, whatever became of
            them; the end of a turn at the end of a completion is not counted.
        spelling: how many conversations have any.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens_in_text: SpecialTokens = "refuse") -> None:
        self.tokenizer, self.special = tokenizer, SpecialText(tokenizer, special_tokens_in_text)
        self.spelled: Counter[str] = Counter()
        self.spelling = 0
        self._eos, self._prefix, self._blank = _eos(tokenizer), prefix_ids(tokenizer), _blank_before(tokenizer)
        self._ends: dict[tuple[str, ...], TurnEnd | None] = {}

    def _turn_end(self, prompt: Prompt, completion: Prompt) -> TurnEnd | None:
        """How this conversation's last turn ends; templates that refuse a plain dialogue are asked with its roles."""
        try:
            if () not in self._ends:
                self._ends[()] = turn_end(self.tokenizer)
            return self._ends[()]
        except ValueError:
            if isinstance(prompt, str):
                return None
            answers = ["assistant"] if isinstance(completion, str) else [m["role"] for m in completion]
            roles = (*(m["role"] for m in (prompt[:-1] if _begun(prompt) else prompt)), *answers)
            if roles not in self._ends:
                self._ends[roles] = turn_end(self.tokenizer, roles)
            return self._ends[roles]

    def _texts(self, prompt: Prompt, completions: Sequence[Prompt]) -> tuple[bool, list[str], list[int]]:
        """(whether they hold placeholders, the texts to encode, the id that each completion ends with).

        Raises:
            ValueError: what is wrong with the conversation.
        """
        eos: str = str(self.tokenizer.eos_token)
        chat = not isinstance(prompt, str)
        split = self.special.mode == "split"
        try:
            found = [self._turn_end(prompt, completion) for completion in completions]
        except ValueError:  # it refuses these messages, and is to say why
            found = [None] * len(completions)
        ends = [(eos,) if end is None or not chat else tuple({eos: 0, end.token: 0}) for end in found]
        spoken = [_stripped(own, completion) for own, completion in zip(ends, completions, strict=True)]
        spelled = self.special.found(prompt, *spoken)
        self.spelled.update(spelled)
        self.spelling += bool(spelled)
        for own, completion in zip(ends, spoken, strict=True):
            if not split:
                _refuse_end_inside(own, eos, completion)
        if chat:
            self.special.refuse("The prompt", prompt)
            for completion in spoken:
                said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
                self.special.refuse("The completion", said)
        held = split and bool(spelled)
        if held:
            prompt, spoken = self.special.hold(prompt), [self.special.hold(completion) for completion in spoken]
        before = _prompt_text(self.tokenizer, prompt)
        texts, last = [before], []
        for end, completion in zip(found, spoken, strict=True):
            text = _completion_text(self.tokenizer, prompt, before, completion)
            if chat and end is not None:
                text = end.cut(text)
            complete = end is not None and text.rstrip().endswith(end.token)
            texts.append(text.rstrip() if complete else text)
            last.append(end.id if end is not None and complete else self._eos)
        return held, texts, last

    def _ids(self, texts: list[str], held: bool) -> list[list[int]]:
        if not texts:
            return []
        if held:
            return self.special.encode_held(texts)
        ids: Any = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(each) for each in ids]

    def batch(self, conversations: Sequence[tuple[Prompt, Sequence[Prompt]]]) -> Iterator[Encoded | ValueError]:
        """As :func:`encode_batch`."""
        texts: dict[bool, list[str]] = {False: [], True: []}
        places: list[tuple[bool, int, list[int]] | ValueError] = []
        for prompt, completions in conversations:
            try:
                held, (before, *own), last = self._texts(prompt, completions)
            except ValueError as error:
                places.append(error)
                continue
            behind = "\n" if self._blank and not isinstance(prompt, str) else ""
            places.append((held, len(texts[held]), last))
            texts[held] += [before, *(behind + text for text in own)]
        ids: dict[bool, list[list[int]] | ValueError] = {}
        for held, some in texts.items():
            try:
                ids[held] = self._ids(some, held)
            except ValueError as error:
                ids[held] = error
        for place, (prompt, _) in zip(places, conversations, strict=True):
            try:
                yield self._encoded(prompt, place, texts, ids)
            except ValueError as error:
                yield error

    def _encoded(
        self,
        prompt: Prompt,
        place: tuple[bool, int, list[int]] | ValueError,
        texts: dict[bool, list[str]],
        ids: dict[bool, list[list[int]] | ValueError],
    ) -> Encoded:
        if isinstance(place, ValueError):
            raise place
        held, at, last = place
        found = ids[held]
        if isinstance(found, ValueError):
            raise found
        first, *own = found[at : at + 1 + len(last)]
        if self._blank and not isinstance(prompt, str):
            # A line break that has merged with what follows cannot be cut off.
            n = len(self._blank)
            pieces = zip(own, texts[held][at + 1 : at + 1 + len(last)], strict=True)
            own = [c[n:] if c[:n] == self._blank else self._ids([text[1:]], held)[0] for c, text in pieces]
        return _prompt_ids(self._prefix, prompt, first), [_ended(e, c) for e, c in zip(last, own, strict=True)]


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[tuple[Prompt, Sequence[Prompt]]]
) -> Iterator[Encoded | ValueError]:
    """As ``encode_prompt`` and ``encode_completion`` of each prompt and its completions, many at a time.

    Each prompt is rendered once, and all texts go through the tokenizer in one call, on all cores.

    Yields:
        For each conversation, in order, its token ids, or what the one-by-one functions would raise for it.
    """
    yield from Encoder(tokenizer).batch(conversations)
