"""What of an example was judged: the last turn of the assistant, or every turn (``data.loss_on``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from halos_pl.data.example import Example, Prompt, Skipped
from halos_pl.data.schemas import Schema
from halos_pl.data.spans import LossOn, begun
from halos_pl.data.values import LATER, PARTED


def judged(example: Example, schema: Schema, loss_on: LossOn) -> Iterator[Example | Skipped]:
    """The example with prompt and completions parted by what carries the loss.

    ``last``: what comes before the last turn of the assistant belongs to the prompt, so that a prompt that is too long
    is cut there. Completions that differ before it stay as they are if only tools speak in them, and are skipped if a
    user does: they answer different questions.

    ``all``: of a conversation that was judged as a whole the completion begins with the assistant's first turn.
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
    said = [_messages(completion) for completion in example.completions]
    before = said[0][:-1]
    # Behind a turn of its own the last one would go on with that.
    if all(turns[:-1] == before for turns in said) and before[-1]["role"] != "assistant":
        prompt: list[Any] = list(example.prompt)
        if begun(example.prompt) and before[0]["role"] == "assistant":
            prompt[-1] = {**prompt[-1], **before[0], "content": prompt[-1]["content"] + before[0]["content"]}
            before = before[1:]
        yield replace(example, prompt=prompt + before, completions=tuple(turns[-1:] for turns in said))
        return
    asked = [any(message["role"] == "user" for message in turns) for turns in said]
    if example.paired:
        if any(asked):
            yield Skipped(example.row_id, LATER if "prompt" in schema.columns else PARTED)
        else:
            yield example
        return
    kept = [i for i, later in enumerate(asked) if not later]
    yield from (Skipped(f"{example.row_id}#{i}", LATER) for i, later in enumerate(asked, start=1) if later)
    if kept:
        columns = {name: getattr(example, name) for name in ("completions", "labels", "scores", "finished")}
        few: dict[str, Any] = {name: tuple(values[i] for i in kept) for name, values in columns.items()}
        yield replace(example, **few)
