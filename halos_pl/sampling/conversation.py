"""A conversation in the terminal, whose answers appear as they are drawn."""

from __future__ import annotations

import io
import sys
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from halos_pl.common.messages import plain
from halos_pl.data.example import DataError
from halos_pl.data.turns import stop_ids
from halos_pl.policy.drawing import Decoding, draw, plan_batches
from halos_pl.policy.limits import check_prompts
from halos_pl.policy.sampling import as_samples, check_sampling, encode_prompts
from halos_pl.training.named_model import named_model

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit ends"


class _Printer(TextStreamer):
    """Prints an answer as it is drawn, without control characters."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints the next words."""
        self._console.out(plain(text), end="\n" if stream_end else "", highlight=False)


def _is_text(text: str) -> bool:
    """Whether UTF-8 can encode it: bytes of another encoding became surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def talk(
    model: str,
    system: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    chat_template: str | None,
    special_tokens_in_text: Any,
    ckpt_path: str | None,
) -> None:
    """Talks until the user leaves; for the arguments see :func:`halos_pl.sampling.chat.chat`.

    Raises:
        ValueError: A setting is invalid, or the model cannot be loaded or has no chat template.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if not _is_text(system):
        raise DataError("--system is not UTF-8 text; encode it as UTF-8")
    named = named_model(model, ckpt_path, chat_template)
    tokenizer = named.tokenizer()
    if not tokenizer.chat_template:
        raise DataError(f"{model} has no chat template; name one with --chat_template, such as chatml")
    special = named.text_settings(special_tokens_in_text=special_tokens_in_text)["special_tokens_in_text"]
    policy = named.load()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that a line with other bytes is refused, not the input
    console = Console()
    console.print(f"halos: {HELP}", highlight=False, markup=False)

    def answer(messages: list[dict[str, Any]], number: int) -> str:
        (ids,) = encode_prompts(tokenizer, [messages], ["the conversation"], "", special)
        check_prompts(policy, tokenizer, [ids], ["the conversation"], max_new_tokens)
        (batch,) = plan_batches(policy, [ids], max_new_tokens, 1)
        decoding = Decoding(tuple(stop_ids(tokenizer)), tokenizer.pad_token_id, batch.room, temperature, top_p)
        (drawn,) = draw(policy, [ids], ["the answer"], decoding, [seed + number], _Printer(tokenizer, console))
        (sample,) = as_samples(policy, tokenizer, [ids], [drawn.ids])
        if not sample.finished:
            console.print("[dim](cut at max_new_tokens)[/dim]")
        return sample.text

    history: list[dict[str, Any]] = []
    first = [{"role": "system", "content": system}] if system else []
    number = 0
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not _is_text(text):
            console.print("halos: this line is not UTF-8 text, so it is ignored", highlight=False, markup=False)
            continue
        command, _, rest = text.partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            history = []
            if command == "/system":
                first = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            about = "" if command == "/reset" else "; the system message is set" if first else "; no system message"
            console.print(f"halos: a new conversation begins{about}", highlight=False, markup=False)
        elif command.startswith("/"):
            console.print(HELP, highlight=False, markup=False)
        elif text:
            turn = [*history, {"role": "user", "content": text}]
            try:
                reply = answer([*first, *turn], number)
            except ValueError as error:  # too long, or with special tokens: the conversation stays as it was
                console.print(f"halos: {plain(error)}", highlight=False, markup=False)
                continue
            history, number = [*turn, {"role": "assistant", "content": reply}], number + 1
