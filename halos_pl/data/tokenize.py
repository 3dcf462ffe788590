"""From text or messages to token ids: BOS at most once, EOS exactly once, and the boundary in one place.

A completion is tokenised alone, never together with its prompt: that is what the model meets in use, where
generation starts after the prompt's last token. So prompt and completion cannot merge into other tokens.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

#: Plain text, or a conversation: a list of ``{"role": ..., "content": ...}``.
Prompt = str | list[dict[str, str]]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # verbose=False: a text longer than model_max_length is cut later and counted there.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens (BOS, [CLS]) that the tokenizer itself puts before a text.

    Found by encoding, because ``add_bos_token``, post-processors and ``bos_token`` need not agree.
    """
    with_special, plain = _ids(tokenizer, "a", special=True), _ids(tokenizer, "a")
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so the model could never learn to stop: "
            "set tokenizer.eos_token to a token of its vocabulary and save the tokenizer again."
        )
    return int(tokenizer.eos_token_id)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "The data are message lists, but the tokenizer has no chat template: use an instruct model's "
            "tokenizer, set tokenizer.chat_template and save it, or give prompt and completion as plain text."
        )
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        )
    except Exception as error:  # templates raise what they like (jinja2.TemplateError, TypeError, ...)
        roles = [message.get("role") for message in messages]
        raise ValueError(f"The chat template refuses messages with the roles {roles}: {error}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: at least one, never followed by EOS.

    Text: its plain tokens, with BOS first iff the tokenizer puts one before a text. Messages: the chat
    template with the generation prompt; whether there is a BOS is then the template's to say, as in use.

    Raises:
        ValueError: messages without a chat template, messages that the template refuses, or a prompt
            that gives no token at all.
    """
    if isinstance(prompt, str):
        ids, prefix = _ids(tokenizer, prompt), _prefix(tokenizer)
        if ids[: len(prefix)] != prefix:  # the text may spell its BOS itself
            ids = prefix + ids
    else:
        ids = _ids(tokenizer, _render(tokenizer, prompt, generation_prompt=True))
    if not ids:
        raise ValueError("The prompt gives no token with this tokenizer; give it some text.")
    return ids


def encode_completion(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt) -> list[int]:
    """Token ids of a completion; EOS is the last one and is not doubled.

    Text after a text prompt is tokenised alone. Messages (or text, taken as one assistant message) after a
    message prompt are what the chat template writes for the whole conversation, less what it writes for the
    prompt; anything blank that it writes after the final EOS is cut.

    Raises:
        ValueError: no EOS token; no chat template for messages; messages after a text prompt; a template
            that does not continue the prompt's rendering.
    """
    eos = _eos(tokenizer)
    if isinstance(prompt, str):
        if isinstance(completion, str):
            text = completion
        else:
            raise ValueError(
                "The completion is a message list but the prompt is plain text: give both as messages "
                'or both as text (a prompt as messages: [{"role": "user", "content": ...}]).'
            )
    else:
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        text = _rendered_completion(tokenizer, prompt, completion)
    ids = _ids(tokenizer, text)
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos]


def _rendered_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], completion: list[dict[str, str]]
) -> str:
    before = _render(tokenizer, prompt, generation_prompt=True)
    whole = _render(tokenizer, prompt + completion, generation_prompt=False)
    if not whole.startswith(before):
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
        raise ValueError(
            "The chat template does not continue the prompt when the completion is added: at the end of the "
            f"prompt it writes {before[same : same + 40]!r}, and with the completion "
            f"{whole[same : same + 40]!r} in its place. "
            "Use a template whose generation prompt is the start of an assistant message, or plain text."
        )
    text = whole[len(before) :]
    if not text:
        raise ValueError(
            "The chat template writes nothing for the completion; "
            "its messages should have the role 'assistant'."
        )
    eos_text: Any = tokenizer.eos_token
    ended = text.rstrip()  # ChatML writes "<|im_end|>\n"; generation stops at EOS, so nothing follows it
    return ended if eos_text and ended.endswith(eos_text) else text
