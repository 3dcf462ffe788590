"""Which part of an example carries the loss: the assistant's last turn, or every turn (``data.loss_on``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from halos_pl.data.example import Example, Prompt, Skipped
from halos_pl.data.items import LATER, PARTED
from halos_pl.data.schemas import Schema
from halos_pl.data.spans import LossOn, begun


def judged(example: Example, schema: Schema, loss_on: LossOn) -> Iterator[Example | Skipped]:
    """The example, split into prompt and completions by what carries the loss.

    ``last``: everything before the assistant's last turn becomes part of the prompt, where a long prompt is cut.
    Completions that differ earlier are kept if only tools speak in them, and skipped if a user does: then they answer
    different questions.

    ``all``: the completion of a conversation judged as a whole begins with the assistant's first turn.
    """
    if isinstance(example.prompt, str):
        yield example
    elif loss_on == "all":
        yield _from_first(example) if schema.conversation else example
    else:
        yield from _last(example, schema)


def _from_first(example: Example) -> Example:
    prompt: Any = example.prompt
    first = next((i for i, message in enumerate(prompt) if message["role"] == "assistant"), None)
    if first is None:
        return example
    completions = tuple([*prompt[first:], *_messages(completion)] for completion in example.completions)
    return replace(example, prompt=prompt[:first], completions=completions)


def _messages(completion: Prompt) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _last(example: Example, schema: Schema) -> Iterator[Example | Skipped]:
    if all(isinstance(completion, str) or len(completion) == 1 for completion in example.completions):
        yield example
        return
    dialogues = [_messages(completion) for completion in example.completions]
    before = dialogues[0][:-1]
    # After another assistant turn, the last one would continue it.
    if all(turns[:-1] == before for turns in dialogues) and before[-1]["role"] != "assistant":
        prompt: list[Any] = list(example.prompt)
        if begun(example.prompt) and before[0]["role"] == "assistant":
            prompt[-1] = {**prompt[-1], **before[0], "content": prompt[-1]["content"] + before[0]["content"]}
            before = before[1:]
        yield replace(example, prompt=prompt + before, completions=tuple(turns[-1:] for turns in dialogues))
        return
    user_speaks = [any(message["role"] == "user" for message in turns) for turns in dialogues]
    if example.paired:
        if any(user_speaks):
            yield Skipped(example.row_id, LATER if "prompt" in schema.columns else PARTED)
        else:
            yield example
        return
    kept = [i for i, later in enumerate(user_speaks) if not later]
    yield from (Skipped(f"{example.row_id}#{i}", LATER) for i, later in enumerate(user_speaks, start=1) if later)
    if kept:
        columns = {name: getattr(example, name) for name in ("completions", "labels", "scores", "finished")}
        selected: dict[str, Any] = {name: tuple(values[i] for i in kept) for name, values in columns.items()}
        yield replace(example, **selected)
