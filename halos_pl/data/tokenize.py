"""From text or messages to token ids: at most one BOS, one end, and one prompt–completion boundary.

A completion ends with the token at which the model stops: EOS after plain text, the end of the assistant's turn after
messages (``<end_of_turn>``, ``<|eot_id|>``) if the chat template writes one. What the template writes after that token,
a line break or EOS, carries no loss, because the model never generates it.

A completion is tokenised on its own, never together with its prompt: generation, too, starts after the prompt's
last token. So no token spans the boundary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from halos_pl.data.ends import (
    blank_before,
    eos_id,
    ids_of,
    prefix_ids,
    refuse_end_inside,
    with_end,
    without_end,
)
from halos_pl.data.example import Example, Prompt
from halos_pl.data.render import Tools, refuse_dropped, refuse_ignored, render, render_begun
from halos_pl.data.spans import Conversation, LossOn, Written, begun, check_loss_on, common_prompt
from halos_pl.data.special import SpecialText, SpecialTokens
from halos_pl.data.turns import TurnEnd, spelled_end, turn_end


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


#: An empty span at the start of a text, ``<think>\n\n</think>\n\n``, or the closing tag of one opened by the prompt.
_EMPTY_SPAN = re.compile(r"\s*(?:<(\w+)>\s*</\1>|</\w+>)\s*")


def _empty_span(written: Written, answer: list[dict[str, Any]]) -> str | None:
    """The empty span with which the template, not the answer itself, begins the last turn."""
    span = _EMPTY_SPAN.match(written.pieces[-1][0])
    return None if span is None or _EMPTY_SPAN.match(answer[-1]["content"]) else span[0]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, special: SpecialText | None = None, tools: Tools = None
) -> list[int]:
    """Token ids of a prompt: at least one, without EOS.

    Text: its tokens, with BOS first iff the tokenizer prepends one. Messages: the chat template with the generation
    prompt, or up to the end of the last message if that is the assistant's, which the completion then continues; it is
    up to the template whether there is a BOS.

    Args:
        tokenizer: tokenizer of the model.
        prompt: text or messages.
        special: treatment of special tokens in it; default: encoded as the tokenizer encodes them.
        tools: JSON schemas of the tools that the model may call, for the chat template.

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
        held: Any = [m["content"] for m in special.hold(_as_messages(tools))]  # type: ignore[index]
        [ids] = special.encode_held([_prompt_text(tokenizer, special.hold(prompt), held or None)])
    else:
        ids = ids_of(tokenizer, _prompt_text(tokenizer, prompt, tools))
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
        prompt: ids of the prompt.
        completions: ids of each completion.
        spans: for each completion the (start, stop) ranges of tokens that carry the loss; empty if all of them do.
    """

    prompt: list[int]
    completions: list[list[int]]
    spans: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class _Texts:
    """An example as texts to be encoded.

    Attributes:
        held: whether they contain placeholders for special tokens.
        prompt: text of the prompt.
        pieces: pieces of each completion, each with whether it carries the loss.
        ends: the last token id of each completion; None if it was truncated.
    """

    held: bool
    prompt: str
    pieces: list[tuple[tuple[str, bool], ...]]
    ends: list[int | None]


class Encoder:
    """Encodes conversations with one tokenizer.

    Args:
        tokenizer: the tokenizer, with a chat template if the conversations are messages.
        special_tokens_in_text: treatment of special tokens, see :class:`halos_pl.data.special.SpecialText`.
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
        self._eos, self._prefix, self._blank = eos_id(tokenizer), prefix_ids(tokenizer), blank_before(tokenizer)
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
        """The example as texts to be encoded.

        Raises:
            ValueError: the conversation is at fault.
        """
        eos: str = str(self.tokenizer.eos_token)
        prompt: Any = example.prompt
        tools = example.tools
        chat = not isinstance(prompt, str)
        split = self.special.mode == "split"
        try:
            turn_ends = [self._turn_end(prompt, completion) for completion in example.completions]
        except ValueError:  # the template refuses these messages; rendering them below raises its reason
            turn_ends = [None] * len(example.completions)
        ends = [(eos,) if end is None or not chat else tuple({eos: 0, end.token: 0}) for end in turn_ends]
        texts = [without_end(tokens, c) for tokens, c in zip(ends, example.completions, strict=True)]
        spelled = self.special.found(prompt, *texts, _as_messages(tools))
        self.spelled.update(spelled)
        self.spelling += bool(spelled)
        for tokens, completion in zip(ends, texts, strict=True):
            if not split:
                refuse_end_inside(tokens, eos, completion)
        if not chat:
            return self._plain(example, texts, turn_ends, held=split and bool(spelled))
        answers = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in texts]
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
                for answer, end, whole in zip(answers, turn_ends, example.finished, strict=True)
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

    def _plain(self, example: Example, texts: list[Prompt], turn_ends: list[TurnEnd | None], *, held: bool) -> _Texts:
        if example.tools:
            raise ValueError(_TEXT_TOOLS)
        prompt, last = example.prompt, []
        pieces: list[tuple[tuple[str, bool], ...]] = []
        for text, end, finished in zip(texts, turn_ends, example.finished, strict=True):
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
                f"the chat template ends an answer with {self._spelled_end!r}, which contains no token of the"
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
        """Token ids of each example in order, or its fault; all texts are tokenised in one call."""
        texts: dict[bool, list[str]] = {False: [], True: []}
        places: list[tuple[_Texts, int] | ValueError] = []
        for example in examples:
            try:
                parts = self._texts(example)
            except ValueError as error:
                places.append(error)
                continue
            before = self._before(example)
            places.append((parts, len(texts[parts.held])))
            texts[parts.held] += [parts.prompt, *(before + text for pieces in parts.pieces for text, _ in pieces)]
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

    def _before(self, example: Example) -> str:
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
        encoded = ids[texts.held]
        if isinstance(encoded, ValueError):
            raise encoded
        prompt, blank = encoded[at], self._blank if self._before(example) else []
        completions, spans = [], []
        for pieces, end in zip(texts.pieces, texts.ends, strict=True):
            completion: list[int] = []
            ranges: list[tuple[int, int]] = []
            for number, (text, loss) in enumerate(pieces, start=1):
                at += 1
                piece = encoded[at]
                if blank:  # a line break that has merged with the next character cannot be removed
                    piece = piece[len(blank) :] if piece[: len(blank)] == blank else self._ids([text], texts.held)[0]
                piece = with_end(end, piece) if number == len(pieces) else piece
                ranges += [(len(completion), len(completion) + len(piece))] if loss and piece else []
                completion += piece
            if not completion:
                raise ValueError("The completion gives no token with this tokenizer; give it some text.")
            completions.append(completion)
            spans.append([] if ranges == [(0, len(completion))] else ranges)
        return Tokens(_prompt_ids(self._prefix, example.prompt, prompt), completions, spans)

    def batch(self, conversations: Sequence[tuple[Prompt, Sequence[Prompt]]]) -> Iterator[Encoded | ValueError]:
        """As :func:`encode_batch`."""
        for tokens in self.encode([Example(prompt, tuple(c), (), "") for prompt, c in conversations]):
            yield tokens if isinstance(tokens, ValueError) else (tokens.prompt, tokens.completions)


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[tuple[Prompt, Sequence[Prompt]]]
) -> Iterator[Encoded | ValueError]:
    """``encode_prompt`` and ``encode_completion`` for many prompts and their completions at once.

    Each prompt is rendered once, and all texts go through the tokenizer in one call, on all cores.

    Yields:
        For each conversation, in order, its token ids, or the error that the single functions would raise.
    """
    yield from Encoder(tokenizer).batch(conversations)
