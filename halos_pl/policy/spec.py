"""Which model is loaded, and how; and what is raised where that cannot be done."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import dataclass
from typing import Literal


class ModelError(ValueError):
    """A model that cannot be loaded, or not be used as asked."""


def reason(error: Exception) -> str:
    """What a library's exception says, in a line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to execute it
        return "the file is damaged, or a pickle that holds more than tensors; get the weights as safetensors"
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return kind + (" ".join(str(error).split()).removesuffix(".")[:300] or type(error).__name__)


@dataclass
class LoRASpec:
    """A low-rank adapter (peft): only it is trained.

    Attributes:
        r: rank.
        alpha: scale; the adapter's output is multiplied with alpha / r.
        dropout: probability of dropout before the adapter, in training.
        target_modules: names of the layers that get one, or ``all-linear``.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ModelError(
                "model.policy.lora: r must be at least 1, alpha above 0 and dropout in [0, 1); got r"
                f" {self.r}, alpha {self.alpha}, dropout {self.dropout}"
            )
        if not self.target_modules:
            raise ModelError("model.policy.lora.target_modules names no layer; say all-linear, or name some")


@dataclass
class ModelSpec:
    """Which model, and how it is loaded.

    Attributes:
        path: a hub name, a local folder, or ``package:NAME`` for a folder that an installed Python package
            ships.
        gguf_file: a GGUF file in that folder. It may be left out where the folder holds exactly one and no
            ``config.json``.
        revision: branch, tag or commit of a hub name.
        dtype: of the weights. Log-probs and losses are computed in float32 whatever it is.
        attn_implementation: as transformers takes it; null: what it chooses for the architecture.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time.
        compile: put the normalisation and feed-forward parts of each layer through ``torch.compile``: one compilation
            at the start, which takes half a minute and a C++ compiler (on a GPU Triton). Worth trying on a GPU; on a
            CPU it was measured not to pay.
        dropout: keep the model's dropout. Off, every dropout probability is set to 0 (GPT-2 ships with 0.1),
            so that rewards start at exactly 0.
        lora: train an adapter instead of the whole model.
        trust_remote_code: run code that the model's repository ships.
    """

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    dropout: bool = False
    lora: LoRASpec | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ModelError("model.policy.path is empty; name a folder, a model of the hub, or package:NAME")
        compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
        if self.compile and not any(map(shutil.which, compilers)):
            raise ModelError(
                f"model.policy.compile is true, but torch.compile needs a C++ compiler, and none of"
                f" {', '.join(compilers)} is here; install one, or say compile: false"
            )
