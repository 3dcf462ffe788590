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
    return stub(_ALL[name])
