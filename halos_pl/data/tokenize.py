"""From text or messages to token ids: at most one BOS, one end, and one prompt–completion boundary.

A completion ends with the token at which the model stops: EOS after plain text, the end of the assistant's turn after
messages (``<end_of_turn>``, ``<|eot_id|>``) if the chat template writes one. What the template writes after that token,
a line break or EOS, carries no loss, because the model never generates it.

A completion is tokenised on its own, never together with its prompt: in use, too, generation starts after the prompt's
last token. So no token spans the boundary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.data.calls import all_texts
from halos_pl.data.example import Example, Prompt
from halos_pl.data.spans import Conversation, LossOn, Written, begun, check_loss_on, common_prompt
from halos_pl.data.special import SpecialText, SpecialTokens
from halos_pl.data.turns import (
    Tools,
    TurnEnd,
    refuse_dropped,
    refuse_ignored,
    render,
    render_begun,
    spelled_end,
    turn_end,
)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # verbose=False: a text longer than model_max_length is truncated, and counted, later.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens (BOS, [CLS]) that the tokenizer itself prepends to a text.

    Found by encoding, because ``add_bos_token``, post-processors and ``bos_token`` need not agree.
    """
    with_special, plain = _ids(tokenizer, "a", special=True), _ids(tokenizer, "a")
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def _blank_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a line break, if the tokenizer prepends a blank to a text (SentencePiece's dummy prefix).

    A completion continues a rendered prompt, so no blank belongs before it: it is tokenised after a line break, which
    is then removed. Empty for tokenizers without such a prefix.
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


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tools: Tools = None) -> str:
    if isinstance(prompt, str):
        return prompt
    if begun(prompt):
        text = render_begun(tokenizer, prompt, tools)
    else:
        text = render(tokenizer, prompt, prompt=True, tools=tools)
    refuse_dropped(tokenizer, prompt, text, tools)
    refuse_ignored(tokenizer, prompt, tools)
    return text


def _prompt_ids(prefix: list[int], prompt: Prompt, ids: list[int]) -> list[int]:
    if isinstance(prompt, str) and ids[: len(prefix)] != prefix:  # the text may spell its BOS itself
        ids = prefix + ids
    if not ids:
        raise ValueError("The prompt gives no token with this tokenizer; give it some text.")
    return ids


def _unended(ends: Sequence[str], text: str) -> str:
    """The text without end tokens at its end, and without the blanks that follow them in rendered dialogues."""
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
    return text


def _stripped(ends: Sequence[str], completion: Prompt) -> Prompt:
    """The completion without end tokens at the end of its texts; they are added again later.

    Raises:
        ValueError: it holds nothing else.
    """
    if isinstance(completion, str):
        found: Prompt = _unended(ends, completion)
    else:
        found = [{**message, "content": _unended(ends, message["content"])} for message in completion]
    if not any(text.strip() for text in all_texts(found)) and any(text.strip() for text in all_texts(completion)):
        raise ValueError("The completion is nothing but the EOS token; give it some text, or remove the row.")
    return found


def _refuse_end_inside(ends: Sequence[str], eos: str, completion: Prompt) -> None:
    """Refuses end tokens within a text, where the model would learn both to stop and to continue."""
    for text in all_texts(completion):
        for end in ends:
            if end in text:
                name = "the EOS token" if end == eos else "the token that ends a turn,"
                raise ValueError(
                    f"The completion spells {name} {end} before its end; remove it, or the row, or set"
                    " data.special_tokens_in_text to split, which encodes it as plain text."
                )


#: An empty span at the start of a text, ``<think>\n\n</think>\n\n``, or the closing tag of one opened by the prompt.
_EMPTY_SPAN = re.compile(r"\s*(?:<(\w+)>\s*</\1>|</\w+>)\s*")


def _empty_span(written: Written, answer: list[dict[str, Any]]) -> str | None:
    """The empty span with which the template, not the answer itself, begins the last turn."""
    found = _EMPTY_SPAN.match(written.pieces[-1][0])
    return None if found is None or _EMPTY_SPAN.match(answer[-1]["content"]) else found[0]


def _ended(end: int | None, ids: list[int]) -> list[int]:
    if end is None:
        return ids
    while ids and ids[-1] == end:
        ids.pop()
    return [*ids, end]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, special: SpecialText | None = None, tools: Tools = None
) -> list[int]:
    """Token ids of a prompt: at least one, without EOS.

    Text: its tokens, with BOS first iff the tokenizer prepends one. Messages: the chat template with the generation
    prompt, or up to the end of the last message if that is the assistant's, which the completion then continues; it is
    up to the template whether there is a BOS.

    Args:
        tokenizer: of the model.
        prompt: text or messages.
        special: how special tokens in it are treated; default: encoded as the tokenizer encodes them.
        tools: JSON schemas of what the model may call, for the chat template.

    Raises:
        ValueError: there is no chat template for messages, the template refuses or ignores messages or tools, the
            prompt gives no token, or ``special`` refuses it.
    """
    if tools and isinstance(prompt, str):
        raise ValueError(_TEXT_TOOLS)
    if special is not None:
        special.refuse("The prompt", prompt)
        special.refuse("The tools", _as_messages(tools))
    if special is not None and special.mode == "split" and special.found(prompt, _as_messages(tools)):
        held: Any = [m["content"] for m in special.hold(_as_messages(tools))]  # type: ignore[index, union-attr]
        [ids] = special.encode_held([_prompt_text(tokenizer, special.hold(prompt), held or None)])
    else:
        ids = _ids(tokenizer, _prompt_text(tokenizer, prompt, tools))
    return _prompt_ids(prefix_ids(tokenizer), prompt, ids)


_TEXT_TOOLS = "There are tools, but the prompt is plain text, which has no place for them; give the prompt as messages."


def _as_messages(tools: Tools) -> list[dict[str, Any]]:
    """Tools in the form of messages, for functions that look at the texts of messages."""
    return [{"role": "tools", "content": tool} for tool in tools or ()]


def encode_completion(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> list[int]:
    """Token ids of a completion; the last one, and only that one, is the token at which the model stops.

    Text after a text prompt is tokenised on its own and ends with EOS, or with an end-of-turn token if the text itself
    does. After a message prompt, messages (or text, taken as one assistant message) are what the chat template writes
    for the whole conversation after the prompt, up to the end of the last turn (see
    :func:`halos_pl.data.turns.turn_end`); EOS is added only if the template ends a turn without a token.

    Raises:
        ValueError: there is no EOS token, no chat template for messages, or a text prompt before messages; the template
            does not continue the prompt's rendering; or a text forges a turn.
    """
    [encoded] = encode_batch(tokenizer, [(prompt, [completion])])
    if isinstance(encoded, ValueError):
        raise encoded
    return encoded[1][0]


Encoded = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and of each of its completions."""


@dataclass(frozen=True)
class Tokens:
    """An example as token ids.

    Attributes:
        prompt: ids.
        completions: ids of each.
        spans: for each completion the (start, stop) ranges of tokens that carry the loss; empty if all of them do.
    """

    prompt: list[int]
    completions: list[list[int]]
    spans: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class _Texts:
    """An example as texts to be encoded.

    Attributes:
        held: whether they hold placeholders for special tokens.
        prompt: the text.
        pieces: of each completion, each with whether it carries the loss.
        ends: the last token id of each completion; None if it was truncated.
    """

    held: bool
    prompt: str
    pieces: list[tuple[tuple[str, bool], ...]]
    ends: list[int | None]


class Encoder:
    """Encodes conversations with one tokenizer.

    Args:
        tokenizer: with a chat template if the conversations are messages.
        special_tokens_in_text: how they are treated, see :class:`halos_pl.data.special.SpecialText`.
        loss_on: which assistant turns of a completion carry the loss.

    Attributes:
        spelled: for each special token, the number of conversations with it in a text or role, refused ones included;
            end-of-turn tokens at the end of a completion are not counted.
        spelling: the number of conversations with any special token in a text or role.
        notes: notes about some of the examples, each with the number of examples.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special_tokens_in_text: SpecialTokens = "refuse",
        loss_on: LossOn = "last",
    ) -> None:
        check_loss_on(loss_on)
        self.tokenizer, self.special = tokenizer, SpecialText(tokenizer, special_tokens_in_text)
        self.loss_on = loss_on
        self.spelled: Counter[str] = Counter()
        self.spelling = 0
        self.notes: Counter[str] = Counter()
        self._eos, self._prefix, self._blank = _eos(tokenizer), prefix_ids(tokenizer), _blank_before(tokenizer)
        self._ends: dict[tuple[str, ...], TurnEnd | None] = {}
        self._spelled_end = spelled_end(tokenizer)

    def _turn_end(self, prompt: Prompt, completion: Prompt) -> TurnEnd | None:
        """How the last turn of this conversation ends; its roles are tried where templates refuse a plain dialogue."""
        try:
            if () not in self._ends:
                self._ends[()] = turn_end(self.tokenizer)
            return self._ends[()]
        except ValueError:
            if isinstance(prompt, str):
                return None
            answers = ["assistant"] if isinstance(completion, str) else [m["role"] for m in completion]
            roles = (*(m["role"] for m in (prompt[:-1] if begun(prompt) else prompt)), *answers)
            if roles not in self._ends:
                self._ends[roles] = turn_end(self.tokenizer, roles)
            return self._ends[roles]

    def _texts(self, example: Example) -> _Texts:
        """
        Raises:
            ValueError: what is wrong with the conversation.
        """
        eos: str = str(self.tokenizer.eos_token)
        prompt: Any = example.prompt
        tools = example.tools
        chat = not isinstance(prompt, str)
        split = self.special.mode == "split"
        try:
            found = [self._turn_end(prompt, completion) for completion in example.completions]
        except ValueError:  # the template refuses these messages; rendering them below raises its reason
            found = [None] * len(example.completions)
        ends = [(eos,) if end is None or not chat else tuple({eos: 0, end.token: 0}) for end in found]
        spoken = [_stripped(own, completion) for own, completion in zip(ends, example.completions, strict=True)]
        spelled = self.special.found(prompt, *spoken, _as_messages(tools))
        self.spelled.update(spelled)
        self.spelling += bool(spelled)
        for own, completion in zip(ends, spoken, strict=True):
            if not split:
                _refuse_end_inside(own, eos, completion)
        if not chat:
            return self._plain(example, spoken, found, held=split and bool(spelled))
        answers = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in spoken]
        self.special.refuse("The prompt", prompt)
        self.special.refuse("The tools", _as_messages(tools))
        for answer in answers:
            self.special.refuse("The completion", answer)
        held = split and bool(spelled)
        if held:
            hold: Any = self.special.hold
            prompt, answers = hold(prompt), [hold(answer) for answer in answers]
            tools = [message["content"] for message in hold(_as_messages(tools))] or None
        heads: dict[int, str] = {}
        how: dict[str, Any] = {"tools": tools, "heads": heads}
        written = common_prompt(
            [
                Conversation(self.tokenizer, prompt, answer, end=end, finished=whole, **how).written(self.loss_on)
                for answer, end, whole in zip(answers, found, example.finished, strict=True)
            ]
        )
        self._note(written, answers)
        pieces, last = [], []
        for each in written:
            (text, loss), *before = each.pieces[::-1]
            end = each.end
            complete = each.ends and end is not None and text.rstrip().endswith(end.token)
            pieces.append((*before[::-1], (text.rstrip() if complete else text, loss)))
            last.append(None if not each.ends else end.id if end is not None and complete else self._eos)
        before_all = written[0].prompt if written else _prompt_text(self.tokenizer, prompt, tools)
        return _Texts(held, before_all, pieces, last)

    def _plain(self, example: Example, spoken: list[Prompt], found: list[TurnEnd | None], *, held: bool) -> _Texts:
        if example.tools:
            raise ValueError(_TEXT_TOOLS)
        prompt, last = example.prompt, []
        pieces: list[tuple[tuple[str, bool], ...]] = []
        for text, end, finished in zip(spoken, found, example.finished, strict=True):
            if not isinstance(text, str):
                raise ValueError(
                    "The completion is a message list but the prompt is plain text: give both as messages "
                    'or both as text (a prompt as messages: [{"role": "user", "content": ...}]).'
                )
            complete = finished and end is not None and text.rstrip().endswith(end.token)
            text = text.rstrip() if complete else text
            pieces.append(((str(self.special.hold(text)) if held else text, True),))
            last.append(None if not finished else end.id if end is not None and complete else self._eos)
        return _Texts(held, str(self.special.hold(prompt)) if held else str(prompt), pieces, last)

    def _note(self, written: list[Written], answers: list[list[dict[str, Any]]]) -> None:
        if unopened := next((each.unopened for each in written if each.unopened), None):
            self.notes[f"the generation prompt ends with {unopened!r}, but answers are rendered without it"] += 1
        if self._spelled_end and any(each.ends for each in written):
            self.notes[
                f"the chat template ends an answer with {self._spelled_end!r}, in which there is no token of the"
                " tokenizer, so the model writes it as text before EOS; use a template that ends turns with eos_token"
            ] += 1
        if empty := next((span for pair in zip(written, answers, strict=True) if (span := _empty_span(*pair))), None):
            self.notes[
                f"the chat template writes {empty!r} before the answer; it carries the loss like the answer itself (as"
                " in TRL)"
            ] += 1
        if self.loss_on == "last" and any(sum(m["role"] == "assistant" for m in a) > 1 for a in answers):
            self.notes["only the last of several turns in the completion carries the loss (loss_on: last)"] += 1

    def _ids(self, texts: list[str], held: bool) -> list[list[int]]:
        if not texts:
            return []
        if held:
            return self.special.encode_held(texts)
        ids: Any = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(each) for each in ids]

    def encode(self, examples: Sequence[Example]) -> Iterator[Tokens | ValueError]:
        """Token ids of each example in order, or what is wrong with it; all texts are tokenised in one call."""
        texts: dict[bool, list[str]] = {False: [], True: []}
        places: list[tuple[_Texts, int] | ValueError] = []
        for example in examples:
            try:
                found = self._texts(example)
            except ValueError as error:
                places.append(error)
                continue
            behind = self._behind(example)
            places.append((found, len(texts[found.held])))
            texts[found.held] += [found.prompt, *(behind + text for own in found.pieces for text, _ in own)]
        ids: dict[bool, list[list[int]] | ValueError] = {}
        for held, some in texts.items():
            try:
                ids[held] = self._ids(some, held)
            except ValueError as error:
                ids[held] = error
        for place, example in zip(places, examples, strict=True):
            try:
                yield self._encoded(example, place, ids)
            except ValueError as error:
                yield error

    def _behind(self, example: Example) -> str:
        return "\n" if self._blank and not isinstance(example.prompt, str) else ""

    def _encoded(
        self,
        example: Example,
        place: tuple[_Texts, int] | ValueError,
        ids: dict[bool, list[list[int]] | ValueError],
    ) -> Tokens:
        if isinstance(place, ValueError):
            raise place
        texts, at = place
        found = ids[texts.held]
        if isinstance(found, ValueError):
            raise found
        prompt, blank = found[at], self._blank if self._behind(example) else []
        completions, spans = [], []
        for pieces, end in zip(texts.pieces, texts.ends, strict=True):
            completion: list[int] = []
            own: list[tuple[int, int]] = []
            for number, (text, loss) in enumerate(pieces, start=1):
                at += 1
                piece = found[at]
                if blank:  # a line break that has merged with the next character cannot be removed
                    piece = piece[len(blank) :] if piece[: len(blank)] == blank else self._ids([text], texts.held)[0]
                piece = _ended(end, piece) if number == len(pieces) else piece
                own += [(len(completion), len(completion) + len(piece))] if loss and piece else []
                completion += piece
            if not completion:
                raise ValueError("The completion gives no token with this tokenizer; give it some text.")
            completions.append(completion)
            spans.append([] if own == [(0, len(completion))] else own)
        return Tokens(_prompt_ids(self._prefix, example.prompt, prompt), completions, spans)

    def batch(self, conversations: Sequence[tuple[Prompt, Sequence[Prompt]]]) -> Iterator[Encoded | ValueError]:
        """As :func:`encode_batch`."""
        for found in self.encode([Example(prompt, tuple(own), (), "") for prompt, own in conversations]):
            yield found if isinstance(found, ValueError) else (found.prompt, found.completions)


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[tuple[Prompt, Sequence[Prompt]]]
) -> Iterator[Encoded | ValueError]:
    """``encode_prompt`` and ``encode_completion`` for many prompts and their completions at once.

    Each prompt is rendered once, and all texts go through the tokenizer in one call, on all cores.

    Yields:
        For each conversation, in order, its token ids, or the error that the single functions would raise.
    """
    yield from Encoder(tokenizer).batch(conversations)
