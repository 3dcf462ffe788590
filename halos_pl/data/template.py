"""The user's chat template (``data.chat_template``), for a base model or to replace the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from halos_pl.data.example import DataError

#: The file in a run's folder with the template that the run was trained with.
CHAT_TEMPLATE = "chat_template.jinja"

_CHATML_END = "'<|im_end|>\\n'"
#: Templates by name; see :func:`use_template`.
NAMED = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
}


def template_of(template: str, name: str = "data.chat_template") -> str:
    """The text of a template.

    Args:
        template: a file, a folder with a tokenizer, a key of ``NAMED``, or the template itself (anything with braces).
        name: name of the setting, for messages.

    Raises:
        DataError: it cannot be read.
    """
    if "{{" in template or "{%" in template:
        return template
    if template in NAMED and not Path(template).exists():
        return NAMED[template]
    path = Path(template).expanduser()
    try:
        if path.is_dir():
            return _of_folder(path, name)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise DataError(
            f"{name}: {template}: {why}; name a .jinja file, a folder with a tokenizer, {' or '.join(NAMED)},"
            " or give the template itself"
        ) from error
    if not text.strip():
        raise DataError(f"{name}: {template} is empty; name a file with a Jinja template")
    return text


def _of_folder(folder: Path, name: str) -> str:
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    except (ValueError, AttributeError):
        template = None
    if isinstance(template, list):  # several by name, of which tokenizers use "default"
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    if not isinstance(template, str):
        raise DataError(f"{name}: {folder} has no chat template ({CHAT_TEMPLATE}); name a .jinja file")
    return template


def use_template(tokenizer: PreTrainedTokenizerBase, text: str, name: str = "data.chat_template") -> None:
    """Sets the tokenizer's template.

    If the tokenizer has no token ``<|im_end|>``, the named ``chatml`` ends turns with EOS, as the model would otherwise
    spell the end of its answer letter by letter.

    Raises:
        DataError: the template is not valid Jinja.
    """
    if text == NAMED["chatml"] and "<|im_end|>" not in tokenizer.get_vocab() and tokenizer.eos_token:
        text = text.replace(_CHATML_END, "eos_token + '\\n'")
    before, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        tokenizer.chat_template = before
        raise DataError(f"{name} is not valid Jinja (line {error.lineno}: {error.message}); correct it") from error
    except Exception:  # it rejects this dialogue, but may accept those of the data
        return
