"""``halos chat``: a conversation with a model in the terminal."""

from __future__ import annotations

from typing import Literal


def chat(
    model: str,
    *,
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    chat_template: str | None = None,
    special_tokens_in_text: Literal["refuse", "split", "allow"] | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Talk to a model in the terminal. The code that a run's config.yaml names is executed.

    /reset forgets the conversation, /system TEXT sets the system message and forgets the conversation, and /exit or the
    end of the input ends it.

    Args:
        model: folder of a run, a Hugging Face folder, a folder with a peft adapter, a hub name, or package:NAME.
        system: system message.
        max_new_tokens: maximum length of an answer, in tokens.
        temperature: temperature of the softmax; 0 always takes the likeliest token.
        top_p: probability mass of the likeliest tokens to sample from.
        seed: seed of the first answer; each further one adds 1.
        chat_template: chat template that replaces the model's: a .jinja file, a folder with a tokenizer, chatml, or the
            template itself; default: that of the run's training, else the tokenizer's.
        special_tokens_in_text: treatment of special tokens in messages; default: as the run was trained, else refuse.
        ckpt_path: checkpoint of a run other than the last: best (from its ModelCheckpoint), or a file.
    """
    arguments = dict(locals())
    # Imported here: it loads torch and transformers, for which --help should not wait.
    from halos_pl.sampling.conversation import talk

    talk(**arguments)
