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
        use_rslora: whether to multiply by alpha / sqrt(r) instead, so that high ranks learn as fast (Kalajdzievski
            2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA").
        use_dora: whether to train the length of each weight vector separately from its direction (Liu et al. 2024,
            "DoRA: Weight-Decomposed Low-Rank Adaptation"); slower.
        modules_to_save: names of modules to train whole, such as ``lm_head`` or ``norm``; their layers get no adapter.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None

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
class QuantizeSpec:
    """Quantization of a model whose weights are frozen, while a LoRA adapter is trained on it (QLoRA).

    The matrices of the layers are quantized, but neither the embedding nor the head. (Dettmers et al. 2023, "QLoRA:
    Efficient Finetuning of Quantized LLMs".)

    Attributes:
        method: library that quantizes: ``bitsandbytes`` or ``torchao``.
        bits: bits of a weight, 4 or 8. torchao rounds to 4 bits but stores a byte, so only bitsandbytes saves memory by
            4 bits instead of 8.
        quant_type: code of bitsandbytes with 4 bits: ``nf4`` or ``fp4``; null: nf4.
        double_quant: whether to quantize the scales too, which saves 0.4 bits per weight; for bitsandbytes with 4 bits.
            Null: true, as in the paper.
        compute_dtype: dtype of the products with the weights, for bitsandbytes with 4 bits; null: that of the model.
        storage_dtype: dtype that the packed weights are stored as, for bitsandbytes with 4 bits; null: uint8. Sharding
            needs the dtype of the other weights. It does not change any value.
        outlier_threshold: magnitude from which inputs are multiplied in float16, for bitsandbytes with 8 bits; null: 0,
            never. Above 0, as in the paper, a row's log-probs depend on the other rows of its batch. (Dettmers et al.
            2022, "LLM.int8()".)
        group_size: number of weights with a common scale, for torchao with 4 bits; null: 32.
    """

    method: Literal["bitsandbytes", "torchao"]
    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] | None = None
    double_quant: bool | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    storage_dtype: Literal["uint8", "float32", "bfloat16", "float16"] | None = None
    outlier_threshold: float | None = None
    group_size: int | None = None

    def stored_bits(self, itemsize: int) -> float:
        """Bits of memory per weight of a quantized matrix, with its scales.

        Args:
            itemsize: bytes of a number in the dtype of the model.
        """
        if self.method == "torchao":  # a byte per weight; in a group, a scale and a zero point
            return 8 + (8 * itemsize + 8) / (self.group_size or 32) if self.bits == 4 else 8
        if self.bits == 8:
            return 8
        # A float32 scale for 64 weights; with double_quant a byte, and another float32 scale for 256 of these.
        return 4 + (32 / 64 if self.double_quant is False else 8 / 64 + 32 / (64 * 256))

    def __post_init__(self) -> None:
        options = {
            ("bitsandbytes", 4): ("quant_type", "double_quant", "compute_dtype", "storage_dtype"),
            ("bitsandbytes", 8): ("outlier_threshold",),
            ("torchao", 4): ("group_size",),
            ("torchao", 8): (),
        }
        kind = (self.method, self.bits)
        if kind not in options:
            raise ModelError(
                f"model.policy.quantize: method {self.method!r} and bits {self.bits!r}; method must be bitsandbytes or"
                " torchao, and bits 4 or 8"
            )
        for (method, bits), names in options.items():
            wrong = [name for name in names if name not in options[kind] and getattr(self, name) is not None]
            if wrong:
                raise ModelError(
                    f"model.policy.quantize.{wrong[0]} is an option of {method} with {bits} bits, and has no effect on"
                    f" {self.method} with {self.bits}; remove it"
                )
        if self.group_size is not None and self.group_size < 1:
            raise ModelError(f"model.policy.quantize.group_size is {self.group_size}; it must be at least 1")
        if self.outlier_threshold is not None and not self.outlier_threshold >= 0:
            raise ModelError(
                f"model.policy.quantize.outlier_threshold is {self.outlier_threshold}; it must be at least 0"
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
        quantize: quantization of the model below the adapter; needs ``lora``.
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
    quantize: QuantizeSpec | None = None
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
        if self.quantize is not None:
            self._check_quantize(self.quantize)

    def _check_quantize(self, quantize: QuantizeSpec) -> None:
        """Refuses settings that do not work with quantized weights.

        Raises:
            ModelError: naming the setting.
        """
        if self.lora is None:
            raise ModelError(
                "model.policy.quantize needs model.policy.lora: quantized weights cannot be trained, only an adapter on"
                " them; set model.policy.lora, or remove model.policy.quantize"
            )
        if self.compile:
            raise ModelError(
                "model.policy.compile does not work with model.policy.quantize, whose kernels are not compiled; set"
                " model.policy.compile to false"
            )
        if self.gguf_file is not None:
            raise ModelError(
                "model.policy.quantize does not work with model.policy.gguf_file: the GGUF file's weights are already"
                " quantized; use the original model"
            )
        if (quantize.method, quantize.bits) == ("bitsandbytes", 8) and self.lora.use_dora:
            raise ModelError(
                "model.policy.lora.use_dora does not work with 8-bit weights of bitsandbytes; set"
                " model.policy.quantize.bits to 4, or model.policy.quantize.method to torchao"
            )
