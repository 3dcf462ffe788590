"""The chat templates that TRL ships, each with a tokenizer that knows its special tokens."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TOKEN = re.compile(r"<[|｜]?/?[\w▁|]+[|｜]?>|\[/?INST\]|\[gMASK\]")


def _folder() -> Path:
    found = importlib.util.find_spec("trl")  # importing it takes seconds
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "chat_templates"


_ALL = {path.stem: path.read_text("utf-8") for path in sorted(_folder().glob("*.jinja"))}
#: The templates for inference, by name.
TEMPLATES = {name: text for name, text in _ALL.items() if not name.endswith("_training")}
#: Those that say themselves, by ``{% generation %}``, what the assistant says.
MARKED = {name: text for name, text in _ALL.items() if "endgeneration" in text}


def _marked(form: str, text: str = "m.content", head: str = "", end: str = "eos_token") -> str:
    """``form`` with ``ANSWER`` for an answer, of which ``text`` and ``end`` are marked as generated."""
    answer = f"{head}{{% generation %}}{{{{ {text} + {end} }}}}{{% endgeneration %}}"
    return form.replace("ANSWER", answer)


_EACH = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}ANSWER"
#: The forms of further models, as far as a plain dialogue goes; marked like those of ``MARKED``.
FORMS = {
    "llama2": _marked(
        _EACH + "{% else %}[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}", "' ' + m.content.strip()"
    ),
    "mistral": _marked(_EACH + "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}", "' ' + m.content"),
    "tekken": _marked(_EACH + "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"),
    "zephyr": _marked(
        _EACH + "{% else %}<|{{ m.role }}|>\n{{ m.content + eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        head="<|assistant|>\n{{ '' }}",
    ),
    "phi4": _marked(
        _EACH + "{% else %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        head="<|im_start|>assistant<|im_sep|>",
        end="'<|im_end|>'",
    ),
    "olmo": _marked(
        _EACH + "{% if not loop.last %}\n{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        head="<|assistant|>\n{{ '' }}",
    ),
    "smollm3, thinking off": _marked(
        _EACH + "\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}",
        head="<|im_start|>assistant\n<think>\n\n</think>\n{{ '' }}",
        end="'<|im_end|>'",
    ),
    "deepseek v2": _marked(
        _EACH + "{% else %}User: {{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "' ' + m.content",
        head="Assistant:",
    ),
    "granite": _marked(
        _EACH + "\n{% else %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        head="<|start_of_role|>assistant<|end_of_role|>",
        end="'<|end_of_text|>'",
    ),
}


def stub(template: str, eos: str = "<eos>", *, special: bool = True) -> PreTrainedTokenizerBase:
    """One token a byte, beside the tokens that the template spells."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens(["<bos>", "<pad>", eos])
    own = list(dict.fromkeys(_TOKEN.findall(template)))
    if special:
        base.add_special_tokens(own)
    else:
        base.add_tokens(own)
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token="<bos>",
        eos_token=eos,
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@cache
def shipped(name: str) -> PreTrainedTokenizerBase:
    return stub((_ALL | FORMS)[name])
