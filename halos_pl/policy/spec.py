"""Specifications of models and their adapters, and the error for those that cannot be used."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import dataclass
from typing import Literal


class ModelError(ValueError):
    """A model cannot be loaded, or cannot be used as configured."""


def reason(error: Exception) -> str:
    """The message of a library's exception, on one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's message suggests unpickling it anyway
        return "the file is damaged, or a pickle that contains more than tensors; get the weights as safetensors"
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return kind + (" ".join(str(error).split()).removesuffix(".")[:300] or type(error).__name__)


@dataclass
class LoRASpec:
    """A low-rank adapter (peft), which is trained instead of the whole model.

    Attributes:
        r: rank.
        alpha: scale; the adapter's output is multiplied by alpha / r.
        dropout: probability of dropout before the adapter, in training.
        target_modules: names of the layers to adapt, or ``all-linear``.
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
            raise ModelError(
                "model.policy.lora.target_modules names no layer; set it to all-linear, or to a list of names"
            )


@dataclass
class ModelSpec:
    """A model, and how to load it.

    Attributes:
        path: hub name, local folder, or ``package:NAME`` for the model in an installed Python package.
        gguf_file: name of a GGUF file in that folder; optional if the folder has exactly one and no ``config.json``.
        revision: branch, tag or commit on the hub.
        dtype: dtype of the weights. Log-probs and losses are always computed in float32.
        attn_implementation: attention function, as in transformers; null: the default of the architecture.
        gradient_checkpointing: whether to recompute activations in the backward pass: less memory, more time.
        compile: whether to compile the layers with ``torch.compile``: on a GPU whole layers, around attention; on a
            CPU the normalisation and feed-forward parts, which did not pay off in measurements. Compilation takes half
            a minute at the start and needs a C++ compiler (on a GPU, Triton).
        liger: whether to use Liger's kernels for normalisation, rotary positions and gated feed-forward parts, on a
            GPU. Needs ``halos_pl[liger]``; compiled layers fuse the same operations, so choose one of the two.
        dropout: whether to keep the model's dropout. If not, every dropout probability is set to 0 (GPT-2 ships with
            0.1), so that rewards start at exactly 0.
        lora: adapter to train instead of the whole model.
        trust_remote_code: whether to run code from the model's repository.
    """

    path: str
    gguf_file: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    liger: bool = False
    dropout: bool = False
    lora: LoRASpec | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ModelError("model.policy.path is empty; name a folder, a model on the hub, or package:NAME")
        if self.compile and self.liger:
            raise ModelError(
                "model.policy.compile and model.policy.liger are both true, but they replace the same operations; set"
                " one of them to false"
            )
        compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
        if self.compile and not any(map(shutil.which, compilers)):
            raise ModelError(
                f"model.policy.compile is true, but torch.compile needs a C++ compiler, and none of"
                f" {', '.join(compilers)} is installed; install one, or set compile to false"
            )
