"""Locates the assistant's turns in a rendered conversation, and decides which of them carry the loss.

Turns are located in the rendering of the whole conversation. Many templates reject a lone assistant turn, and many
render a turn differently by position: they cut thoughts from earlier turns, or add an empty span to the last one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from halos_pl.data.calls import CALLS, THOUGHTS, message_texts
from halos_pl.data.render import (
    DOUBLED_SPAN,
    OPENED,
    Message,
    Tools,
    around_content,
    before_content,
    refuse_dropped,
    refuse_ignored,
    render,
    render_begun,
    without_opening,
)
from halos_pl.data.turns import TurnEnd, any_of, call_end, ending, turn_markers

#: Which of the assistant's turns in a completion carry the loss.
LossOn = Literal["last", "all"]


def check_loss_on(loss_on: str) -> None:
    """Checks the setting ``data.loss_on``.

    Raises:
        ValueError: the setting is unknown.
    """
    if loss_on not in get_args(LossOn):
        raise ValueError(f"data.loss_on is {loss_on!r}; it must be last or all")


#: A span at the start of a content.
_SPAN = re.compile(r"\s*<(\w+)>(.*?)</\1>", re.DOTALL)
#: Tags at the end of a generation prompt that a rendered turn may lack.
_TAGS = re.compile(r"(\s|</?\w+>)*")
_LONGEST = 32  # characters of one


@dataclass(frozen=True)
class Written:
    """A rendered conversation.

    Attributes:
        prompt: the text before the assistant's first turn in the completion.
        pieces: the rest up to the end of the last turn, each piece with whether it carries the loss.
        ends: whether the last piece ends with an end-of-turn token or EOS; false for a truncated answer.
        end: how the template ends the last turn; None if it writes no token there.
        unopened: what the generation prompt ends with but ``prompt`` does not, because answers are rendered without it.
    """

    prompt: str
    pieces: tuple[tuple[str, bool], ...]
    ends: bool = True
    end: TurnEnd | None = None
    unopened: str = ""

    def behind(self, prompt: str) -> Written:
        """The same with a shorter prompt; the rest of the prompt becomes part of the answer.

        Raises:
            ValueError: ``prompt`` is not a prefix of this one's.
        """
        if not self.prompt.startswith(prompt):
            raise ValueError(
                "The chat template writes the prompt differently for the completions of this row; use a template whose"
                " prompt does not depend on the answer, or give each completion its own row."
            )
        opened = self.prompt[len(prompt) :]
        if not opened:
            return self
        (first, loss), *rest = self.pieces
        pieces = ((opened + first, True), *rest) if loss else ((opened, False), *self.pieces)
        return replace(self, prompt=prompt, pieces=pieces)


def begun(prompt: object) -> bool:
    """Whether the prompt ends with an unfinished assistant message, which the completion continues."""
    if not isinstance(prompt, list) or not prompt or prompt[-1].get("role") != "assistant":
        return False
    return CALLS not in prompt[-1]


def _same(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices are compared in C, characters one by one are not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[low:middle], low) else (low, middle - 1)
    return low


class Conversation:
    """A conversation, and the positions of its turns in its rendering.

    Args:
        tokenizer: tokenizer with a chat template.
        prompt: messages.
        completion: messages; the first continues the prompt's last one if that is the assistant's.
        tools: tools that the model may call.
        end: how the template ends the assistant's last turn; None if it writes no token there.
        finished: whether the last answer is complete, not truncated.
        heads: shared by the completions of one prompt, so that the prompt is rendered once.

    Raises:
        ValueError: the conversation is at fault.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[Message],
        completion: list[Message],
        *,
        tools: Tools,
        end: TurnEnd | None,
        finished: bool = True,
        heads: dict[int, str] | None = None,
    ) -> None:
        self.tokenizer, self.tools, self.end, self.finished = tokenizer, tools, end, finished
        self.first, self.unopened = len(prompt), ""
        self._heads: dict[int, str] = {} if heads is None else heads
        self._cut: str = completion[-1]["content"]
        self._begun = begun(prompt) and completion[0]["role"] == "assistant"
        if self._begun:
            self.first -= 1
            if self.first not in self._heads:
                self._heads[self.first] = render_begun(tokenizer, prompt, tools)
            continued = {**prompt[-1], **completion[0], "content": prompt[-1]["content"] + completion[0]["content"]}
            prompt, completion = prompt[:-1], [continued, *completion[1:]]
        self.messages = prompt + completion
        spoken = [i for i in range(self.first, len(self.messages)) if self.messages[i]["role"] == "assistant"]
        #: The assistant's turns in the completion.
        self.turns = spoken or [self.first]
        self.messages = self.messages[: self.turns[-1] + 1] if spoken else self.messages
        self.whole = self._whole()
        #: How the last turn ends.
        self.last_end = call_end(tokenizer, self.whole, end) if CALLS in self.messages[-1] else end

    def _head(self, turn: int) -> str:
        """The model's input when it generates this turn."""
        if turn == self.first and turn in self._heads:
            return self._heads[turn]
        head = render(self.tokenizer, self.messages[:turn], prompt=True, tools=self.tools)
        if turn == self.first:
            self._heads[turn] = head
        return head

    def _closed(self, turn: int) -> str:
        """The conversation before this turn."""
        return render(self.tokenizer, self.messages[:turn], prompt=False, tools=self.tools) if turn else ""

    def _whole(self) -> str:
        """The conversation up to the end of the last turn."""
        last = self.messages[-1]
        plain = last["role"] == "assistant" and last.keys() <= {"role", "content"}
        if plain and not self.finished:
            return self._literal("")  # exactly what was sampled
        continued = plain and self._begun and self.turns == [self.first]
        try:
            whole = render(self.tokenizer, self.messages, prompt=False, tools=self.tools)
            self._rendered = self.messages, whole
            whole = self._with_thoughts(last["content"], whole) if last["role"] == "assistant" else whole
        except ValueError:
            if not continued:
                raise
        else:
            if not continued or whole.startswith(self._head(self.first)):
                return whole
        # The template rewrites the unfinished answer. In generation it stays unchanged, and so does its continuation.
        return self._literal(self._after())

    def _after(self) -> str:
        """What the template writes after the last answer."""
        around = around_content(self.tokenizer, self.messages, len(self.messages) - 1, self.tools)
        return around[1] if around else ""

    def _literal(self, end: str) -> str:
        """The last answer, unchanged, after the model's input for it."""
        head = self._head(len(self.messages) - 1)
        self._rendered = self.messages[:-1], head
        return head + self._cut + end

    def _with_thoughts(self, content: str, whole: str) -> str:
        """``whole`` with the thoughts of the last answer, which some templates cut as they do in earlier turns.

        If the generation prompt opens the span, the answer continues from there, as the model generates it.

        Raises:
            ValueError: the template drops thoughts, and its generation prompt does not open a span for them.
        """
        if "</" not in content:
            return whole
        head = self._head(len(self.messages) - 1)
        opened, span = OPENED.search(head), _SPAN.match(content)
        close = f"</{opened[1]}>" if opened else ""
        thoughts, closing, answer = content.partition(close) if close else (content, "", "")
        inner = thoughts.strip().removeprefix(f"<{opened[1]}>").strip() if opened else ""
        # The text that follows the head may also be an empty span that the template adds.
        continued = whole.startswith(head) and whole[len(head) :].lstrip().startswith(inner)
        if opened and closing and not continued:
            at = self._end_of(answer, whole)
            after = whole[at:] if at is not None else self._after()
            return head + without_opening(head, thoughts) + close + answer.rstrip() + after
        if span and span[2].strip() and span[2].strip() not in whole:
            raise ValueError(
                f"The chat template drops what stands in <{span[1]}>...</{span[1]}> in the last answer, so the model"
                " would not learn it; use a template that keeps it (chat_template), or remove it."
            )
        return whole

    def start(self, turn: int) -> int:
        """Where a turn starts: after the head that the template writes before an answer.

        The head may open a span (``<think>``) that the rendered turn lacks; the turn then starts where the two diverge.

        Raises:
            ValueError: the rendered turn has another head.
        """
        head: str | None
        try:
            head = self._head(turn)
        except ValueError:
            if turn == self.first and turn:
                raise
            head = None  # the assistant may speak first, and templates reject an empty prompt
        if head is not None:
            same = _same(head, self.whole)
            if same == len(head):
                return same
            closed = self._closed(turn)
            # They may diverge within a tag.
            for at in range(same, max(_same(closed, head), same - _LONGEST), -1):
                if _TAGS.fullmatch(head, at):
                    self.unopened = self.unopened or head[at:]
                    return at
        # Earlier turns may be rendered differently once there are later ones: find the head in its full context.
        before = before_content(self.tokenizer, self.messages, turn, self.tools)
        if before and (head is None or turn != self.first):
            if self.whole.startswith(before):
                return len(before)
            # The template writes this turn's thoughts before its content, so the two agree only up to the head.
            opening = head.removeprefix(self._closed(turn)) if head else ""
            at = before.rfind(opening) + len(opening)
            if opening and len(opening) <= at <= _same(before, self.whole):
                return at
        raise ValueError(_not_continued(head or "", self.whole))

    def _end_of(self, text: str, whole: str) -> int | None:
        """Where the last occurrence of a text before the end of the turn ends; None if there is none."""
        tail = self.end.token + self.end.after if self.end else ""
        text = text.strip()
        at = whole.removesuffix(tail).rfind(text) if text else -1
        return None if at < 0 else at + len(text)

    def _cut_off(self, start: int) -> int:
        """Where a truncated last turn ends: after its text, before anything that the template appends."""
        last = self.messages[-1]
        if last["role"] != "assistant" or last.keys() <= {"role", "content"}:
            return len(self.whole)
        texts = [last["content"], *(last[key] for key in THOUGHTS if key in last)]
        text = next((text.strip() for text in texts if text.strip()), "")
        if CALLS not in last and (at := self._end_of(text, self.whole)) is not None:
            return at
        if self.last_end is None:
            return len(self.whole)
        return start + len(self.last_end.cut(self.whole[start:]).removesuffix(self.last_end.token).rstrip())

    def stop(self, turn: int, start: int) -> int:
        """Where the turn that starts at ``start`` ends: after the token at which the model stops."""
        if turn == len(self.messages) - 1:
            if not self.finished:
                return self._cut_off(start)
            return len(self.whole) if self.last_end is None else start + len(self.last_end.cut(self.whole[start:]))
        nearest = before_content(self.tokenizer, self.messages, turn + 1, self.tools)
        if nearest is not None and self.whole.startswith(nearest):
            bound = len(nearest)
        else:
            later = self.messages[turn + 1]["content"].strip()
            bound = self.whole.find(later, start) if later else -1
        region = self.whole[start : max(start, bound)]
        if self.end is not None and (at := region.find(self.end.token)) >= 0:
            return start + at + len(self.end.token)
        # It ends unlike the last turn: as it would if it were last, or at the next token that marks turns.
        closed = self._closed(turn + 1)
        if len(closed.rstrip()) > start and self.whole.startswith(closed.rstrip()):
            return len(closed.rstrip())
        closing = ending(self.tokenizer, closed)
        if closing is not None and (at := region.find(closing.token)) >= 0:
            return start + at + len(closing.token)
        spoken = 0
        for text in message_texts([self.messages[turn]]):
            at = region.find(text.strip(), spoken)
            spoken = at + len(text.strip()) if text.strip() and at >= 0 else spoken
        if spoken and (marker := any_of(turn_markers(self.tokenizer)).search(region, spoken)):
            return start + marker.end()
        if not spoken:
            raise ValueError(
                f"The end of message {turn + 1} cannot be found in the rendered conversation; use loss_on: last, or a"
                " chat template that ends every turn with a token."
            )
        return start + spoken

    def written(self, loss_on: LossOn) -> Written:
        """The conversation split into prompt and completion.

        Args:
            loss_on: whether every turn of the completion carries the loss, or only the last.

        Raises:
            ValueError: a turn cannot be located in the rendering.
        """
        at = begin = self.start(self.turns[0])
        if begin == len(self.whole):
            raise ValueError(
                "The chat template writes nothing for the completion; its messages should have the role 'assistant'."
            )
        messages, text = self._rendered
        refuse_dropped(self.tokenizer, messages, text, self.tools)
        refuse_ignored(self.tokenizer, messages, self.tools)
        pieces = []
        for turn in self.turns if loss_on == "all" else self.turns[-1:]:
            start = begin if turn == self.turns[0] else self.start(turn)
            stop = self.stop(turn, start)
            if start > at:
                pieces.append((self.whole[at:start], False))
            pieces.append((self.whole[start:stop], True))
            at = stop
        if doubled := DOUBLED_SPAN.search(self.whole, max(0, begin - 40)):
            raise ValueError(
                f"The chat template writes {doubled[0]!r}: it adds an empty <{doubled[1]}> before the one in the"
                " content. Use a template that reads thoughts from the content (chat_template), or remove them."
            )
        return Written(self.whole[:begin], tuple(pieces), self.finished, self.last_end, self.unopened)


def _not_continued(before: str, whole: str) -> str:
    same = _same(before, whole)
    return (
        f"The chat template does not continue the prompt when the completion is added: the prompt continues with"
        f" {before[same : same + 40]!r}, the conversation with {whole[same : same + 40]!r}, so the model would be"
        " trained on another prefix than it meets in generation. Use a template whose generation prompt is the start of"
        " an assistant message (chat_template), or plain text."
    )


def common_prompt(written: Sequence[Written]) -> list[Written]:
    """Completions of one prompt, all with the same prompt text.

    Raises:
        ValueError: their prompts differ by more than an opened span.
    """
    shortest = min((each.prompt for each in written), key=len, default="")
    return [each.behind(shortest) for each in written]
