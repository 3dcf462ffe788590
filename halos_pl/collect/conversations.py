"""Conversations of the people on the page, and the queue of those who wait for the model."""

from __future__ import annotations

import secrets
import threading
import time
import traceback
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any, Literal

from halos_pl.collect.engine import Answer, Engine, EngineError, Messages
from halos_pl.collect.feedback_file import FeedbackFile, refuse_unreadable
from halos_pl.data.messages import is_blank

#: Conversations kept in memory; the oldest are forgotten, their verdicts are in the file.
MOST = 1000
#: Characters of a message.
LONGEST = 50_000
#: Seeds are drawn below this number, which every engine and JSON reader can represent.
SEEDS = 2**31

Status = Literal["waiting", "writing", "done", "failed", "stopped"]
#: Thumbs: whether the answer is good. Choices: the number of the better answer, from 0.
Value = bool | int


class Refused(ValueError):
    """A request that the page should not have made, or that the person can correct; one line."""


class _Stopped(Exception):
    """The person has stopped the answer."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def opening(system: str) -> Messages:
    """The start of a conversation: a system message, if there is one."""
    return [{"role": "system", "content": system}] if system else []


@dataclass(eq=False)
class Turn:
    """A message of the person, and the answers to it.

    Attributes:
        prompt: the conversation up to the message, which comes last.
        number: its position in the conversation, from 0.
        row_id: the column ``id`` of its row; each sample has a new one.
        status: progress of the answers.
        texts: the answers so far, while they are being written.
        answers: the complete answers.
        seeds: seed of each answer.
        error: why there is no answer.
        value: the verdict; None without one.
        time: time of the verdict.
        earlier: verdicts that were corrected or undone.
    """

    prompt: Messages
    number: int
    row_id: str = ""
    status: Status = "waiting"
    texts: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    error: str = ""
    value: Value | None = None
    time: str = ""
    earlier: list[dict[str, Any]] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether there are two equal answers, so that there is nothing to choose."""
        return len(self.answers) == 2 and self.answers[0].text == self.answers[1].text

    @property
    def continued(self) -> Answer | None:
        """The answer with which the conversation continues; None if one must be chosen first."""
        if self.status != "done":
            return None
        if len(self.answers) == 1 or self.same:
            return self.answers[0]
        return None if self.value is None else self.answers[int(self.value)]

    def answer_before(self, following: Turn | None) -> int | None:
        """The number of the answer with which ``following`` continues the conversation."""
        if following is None:
            return None
        texts = [answer.text for answer in self.answers]
        return texts.index(following.prompt[-2]["content"])


@dataclass(eq=False)
class Conversation:
    """The turns of one person in one tab of a browser.

    Attributes:
        id: its name, which others cannot guess.
        owner: session of the person.
        annotator: name that the person entered.
        turns: messages with their answers.
    """

    id: str
    owner: str
    annotator: str
    turns: list[Turn] = field(default_factory=list)


class Conversations:
    """All conversations, and the threads that sample the answers.

    Args:
        engine: the model.
        file: where verdicts go.
        system: system message of every conversation; empty for none.
        seed: seed of the first answer, the next ones count up; None draws a seed for each answer.

    Attributes:
        closed: whether :meth:`close` was called.
    """

    def __init__(self, engine: Engine, file: FeedbackFile, system: str = "", seed: int | None = None) -> None:
        self.engine, self.file, self.system, self._seed = engine, file, system, seed
        self.answers_per_turn = 2 if file.kind == "choices" else 1
        self._all: OrderedDict[str, Conversation] = OrderedDict()
        self._mutex = threading.RLock()
        self._judging = threading.Lock()  # rows are written in the order of the clicks
        self._waits = threading.Condition(self._mutex)
        self._queue: deque[Turn] = deque()
        self.closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(engine.workers)]
        for thread in self._threads:
            thread.start()

    def close(self, timeout: float = 30.0) -> None:
        """Stops the sampling, at the latest after ``timeout`` seconds; answers in progress are dropped."""
        with self._mutex:
            self.closed = True
            self._waits.notify_all()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # Requests -------------------------------------------------------------------------------------------

    def new(self, owner: str, annotator: str) -> Conversation:
        """A new conversation."""
        with self._mutex:
            chat = Conversation(secrets.token_urlsafe(12), owner, annotator)
            self._all[chat.id] = chat
            while len(self._all) > MOST:
                self._all.popitem(last=False)
            return chat

    def find(self, chat_id: str, owner: str) -> Conversation | None:
        """A conversation; None if it is unknown, or belongs to someone else."""
        with self._mutex:
            chat = self._all.get(chat_id)
            if chat is None or chat.owner != owner:
                return None
            self._all.move_to_end(chat_id)
            return chat

    def say(self, chat: Conversation, text: str) -> None:
        """Adds a message, and queues its answers.

        Raises:
            Refused: there is an unanswered or unjudged message, or nothing to answer.
            ValueError: the model cannot read the message.
        """
        text = text.strip().replace("\r\n", "\n")
        if is_blank(text):
            raise Refused("write a message first")
        if len(text) > LONGEST:
            raise Refused(f"the message has {len(text)} characters; at most {LONGEST} are possible")
        with self._mutex:
            prompt = opening(self.system)
            if chat.turns:
                last = chat.turns[-1]
                answer = last.continued
                if answer is None:
                    raise Refused(
                        "choose an answer first" if last.status == "done" else "the last message has no answer"
                    )
                prompt = [*last.prompt, {"role": "assistant", "content": answer.text}]
            prompt = [*prompt, {"role": "user", "content": text}]
            before = list(chat.turns)
        refuse_unreadable({"prompt": prompt, "completion": "x", "label": True})
        self.engine.refuse(prompt)
        with self._mutex:
            if chat.turns != before:  # sent twice, or answered again meanwhile
                raise Refused("the last message has no answer")
            chat.turns.append(Turn(prompt, len(before)))
            self._enqueue(chat.turns[-1])

    def sample_again(self, chat: Conversation, number: int) -> None:
        """Replaces the answers to the last message, unless one was judged.

        Raises:
            Refused: that is not possible now.
        """
        with self._judging, self._mutex:
            turn = self._turn(chat, number)
            if turn is not chat.turns[-1] or turn.value is not None or turn.status in ("waiting", "writing"):
                raise Refused("only the last message can be answered again, before a verdict")
            chat.turns[-1] = Turn(turn.prompt, number)
            self._enqueue(chat.turns[-1])

    def stop(self, chat: Conversation, number: int) -> None:
        """Ends the sampling of an answer, which is dropped."""
        with self._mutex:
            turn = self._turn(chat, number)
            if turn.status in ("waiting", "writing"):
                turn.status, turn.texts = "stopped", []
                if turn in self._queue:
                    self._queue.remove(turn)

    def judge(self, chat: Conversation, number: int, value: Value | None) -> None:
        """Records a verdict, replaces an earlier one, or with None removes it.

        Raises:
            Refused: there is no such answer.
            OSError: the file could not be written; the earlier verdict stands.
        """
        with self._judging:
            turn = self._turn(chat, number)
            choices = self.file.kind == "choices"
            fits = value is None or ((value in (0, 1) if choices else True) and isinstance(value, bool) is not choices)
            if turn.status != "done" or (choices and turn.same) or not fits:
                raise Refused("there is no answer to judge")
            if value == turn.value:
                return
            clicked = _now()
            earlier = list(turn.earlier)
            if turn.value is not None:
                earlier.append({"verdict": self._shown(turn.value), "time": turn.time})
            if value is None:
                self.file.replace(turn.row_id, None)
            else:
                row = self._row(chat, turn, value, clicked, earlier)
                self.file.add(row) if turn.value is None else self.file.replace(turn.row_id, row)
            with self._mutex:
                turn.value, turn.time, turn.earlier = value, clicked if value is not None else "", earlier

    def shown(self, chat: Conversation) -> dict[str, Any]:
        """The conversation as the page needs it."""
        with self._mutex:
            turns = [self._shown_turn(*pair) for pair in zip_longest(chat.turns, chat.turns[1:])]
            return {"id": chat.id, "turns": turns, "recorded": self.file.rows}

    # Rows -----------------------------------------------------------------------------------------------

    def _shown(self, value: Value) -> Any:
        return value if self.file.kind == "thumbs" else "AB"[int(value)]

    def _row(
        self, chat: Conversation, turn: Turn, value: Value, clicked: str, earlier: list[dict[str, Any]]
    ) -> dict[str, Any]:
        if self.file.kind == "thumbs":
            [answer] = turn.answers
            judged: dict[str, Any] = {"completion": answer.text, "label": bool(value), "finished": answer.finished}
            same, seeds = answer.same_tokens, {"seed": turn.seeds[0]}
        else:
            chosen, rejected = turn.answers[int(value)], turn.answers[1 - int(value)]
            judged = {"chosen": chosen.text, "rejected": rejected.text}
            judged |= {"chosen_finished": chosen.finished, "rejected_finished": rejected.finished}
            judged["chosen_position"] = self._shown(value)
            same = None if chosen.same_tokens is None else bool(chosen.same_tokens and rejected.same_tokens)
            seeds = {"chosen_seed": turn.seeds[int(value)], "rejected_seed": turn.seeds[1 - int(value)]}
        return {
            "prompt": turn.prompt,
            **judged,
            **({} if same is None else {"same_tokens": same}),
            "annotator": chat.annotator,
            "time": clicked,
            "model": self.engine.model,
            "sampling": self.engine.sampling,
            **(seeds if self.engine.seeded else {}),
            "chat": chat.id,
            "turn": turn.number,
            "id": turn.row_id,
            **({"corrections": earlier} if earlier else {}),
        }

    # State ----------------------------------------------------------------------------------------------

    def _turn(self, chat: Conversation, number: int) -> Turn:
        if not 0 <= number < len(chat.turns):
            raise Refused("there is no such message")
        return chat.turns[number]

    def _shown_turn(self, turn: Turn, following: Turn | None) -> dict[str, Any]:
        answers = [{"text": answer.text, "finished": answer.finished} for answer in turn.answers]
        return {
            "number": turn.number,
            "message": turn.prompt[-1]["content"],
            "status": turn.status,
            "ahead": self._queue.index(turn) if turn in self._queue else 0,
            "answers": answers or [{"text": text, "finished": True} for text in turn.texts],
            "same": turn.same,
            "continued": turn.answer_before(following),
            "error": turn.error,
            "value": turn.value,
            "time": turn.time,
        }

    def _enqueue(self, turn: Turn) -> None:
        if self._seed is None:
            turn.seeds = [secrets.randbelow(SEEDS) for _ in range(self.answers_per_turn)]
        else:
            turn.seeds = [self._seed + i for i in range(self.answers_per_turn)]
            self._seed += self.answers_per_turn
        turn.row_id = secrets.token_hex(12)
        self._queue.append(turn)
        self._waits.notify()

    # Threads --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Answers the messages in the queue, in order, until the conversations are closed."""
        while True:
            with self._mutex:
                while not self._queue and not self.closed:
                    self._waits.wait()
                if self.closed:
                    return
                turn = self._queue.popleft()
                turn.status = "writing"
            self._answer(turn)

    def _answer(self, turn: Turn) -> None:
        def show(texts: list[str]) -> None:
            with self._mutex:
                if turn.status == "stopped" or self.closed:
                    raise _Stopped
                turn.texts = texts

        try:
            answers = self.engine.answer(turn.prompt, turn.seeds, show)
            if any(is_blank(answer.text) for answer in answers):
                raise EngineError("the model gave an empty answer")
            self._refuse_unreadable(turn, answers)
        except _Stopped:
            return
        except Exception as error:  # whatever the model raises, the page stays alive and shows it
            with self._mutex:
                if turn.status == "writing":
                    turn.status, turn.texts = "failed", []
                    turn.error = _in_a_line(error)
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exc()
            return
        with self._mutex:
            if turn.status == "writing":
                turn.answers, turn.texts, turn.status = answers, [], "done"

    def _refuse_unreadable(self, turn: Turn, answers: list[Answer]) -> None:
        """Refuses answers that could not be recorded, such as one with a placeholder for a picture."""
        for answer in answers:
            refuse_unreadable({"prompt": turn.prompt, "completion": answer.text, "label": True})


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
