"""Whether a loaded model is the one in its files, of which transformers at most warns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from halos_pl.policy.spec import ModelError, ModelSpec

#: What older files hold besides weights: masks and frequencies, which are now computed.
_BUFFERS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias")
#: How safetensors calls the dtypes that can be read without a scale.
_PLAIN = {"F64", "F32", "F16", "BF16"}


def check_loaded(model: Any, info: Mapping[str, Any], spec: ModelSpec, folder: Path) -> None:
    """Compares a model with what it was loaded from.

    Args:
        model: the model.
        info: what ``from_pretrained(output_loading_info=True)`` says of it.
        spec: what was loaded.
        folder: of its files; a path that does not exist for a hub name.

    Raises:
        ModelError: where the files hold other weights than the model has, or weights that are quantised or not finite.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, in_file, in_model = mismatched[0]
        raise ModelError(
            f"{spec.path}: {name} is {list(in_file)} in the weights, and {list(in_model)} by config.json"
            f" ({_count(mismatched)}); correct config.json, e.g. vocab_size after a resized vocabulary"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{spec.path} lacks {_count(missing)} of a {type(model).__name__}"
            f" ({_some(missing)}); is it a causal language model, and complete?"
        )
    _check_unexpected(model, sorted(info["unexpected_keys"]), spec)
    # transformers dequantises some formats, and then removes what the configuration says of them.
    if (left := getattr(model.config, "quantization_config", None)) is not None and not (
        spec.lora and getattr(model, "is_quantized", False)
    ):
        method = left.get("quant_method") if isinstance(left, dict) else getattr(left, "quant_method", left)
        raise ModelError(
            f"{spec.path} is quantised ({method}): its weights cannot be trained; take the model before it was"
            " quantised, or remove quantization_config from config.json if it is not"
        )
    if folder.is_dir():
        _check_files(folder)
    _check_stops(model, spec)
    for name, value in model.named_parameters():
        if not is_finite(value):
            raise ModelError(f"{spec.path}: {name} holds NaN or infinite numbers; is it of a run that diverged?")


def is_finite(value: Tensor) -> bool:
    """Whether all elements are finite; in one pass without a copy, a tenth of the time of ``isfinite().all()``."""
    return value.numel() == 0 or all(bool(end.isfinite()) for end in value.detach().aminmax())


def _count(names: list[Any]) -> str:
    return f"{len(names)} weight{'s' * (len(names) > 1)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_unexpected(model: Any, unexpected: list[str], spec: ModelSpec) -> None:
    """Refuses unused weights in the model's layers; warns of others, such as those of a value head.

    Raises:
        ModelError: naming some. The model would differ from its files, for example by their scales, an adapter or a
            layer.
    """
    parts = dict(model.named_modules())

    def is_used(name: str) -> bool:
        if name.endswith(_BUFFERS):
            return False
        above = [name[:at] for at, letter in enumerate(name) if letter == "."]
        known = [parts[place] for place in above if place in parts]
        has_weights = any(True for part in known[-1:] for _ in part.parameters(recurse=False))
        return has_weights or any(isinstance(part, nn.ModuleList) for part in known)

    if inside := [name for name in unexpected if is_used(name)]:
        raise ModelError(
            f"{spec.path} holds {_count(inside)} that a {type(model).__name__} of its config.json does not use"
            f" ({_some(inside)}): it would be another model. Is it quantised, or saved with an adapter around it, or is"
            " config.json another model's?"
        )
    if unexpected:
        rank_zero_warn(
            f"halos: {spec.path}: {_count(unexpected)} that a {type(model).__name__} does not use: {_some(unexpected)}"
        )


def _check_stops(model: Any, spec: ModelSpec) -> None:
    """Refuses generation settings whose ``eos_token_id`` is not an id or a list of ids."""
    stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and (not isinstance(stop, int) or isinstance(stop, bool) or stop < 0):
            raise ModelError(
                f"{spec.path}: eos_token_id is {stops!r}, in generation_config.json or config.json; it must be the id"
                " of a token, or a list of ids"
            )


def _check_files(folder: Path) -> None:
    """Refuses files that transformers would misread or skip.

    Raises:
        ModelError: for quantised weights whose config.json does not give the quantisation; and for a
            generation_config.json, which says where an answer ends, that is not JSON.
    """
    generation = folder / "generation_config.json"
    try:
        if generation.is_file() and not isinstance(json.loads(generation.read_text(encoding="utf-8")), dict):
            raise ValueError("no mapping")
    except ValueError as error:
        raise ModelError(f"{generation} cannot be read ({error}); get it again, or remove it") from error
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name.endswith(".weight") and entry["dtype"] not in _PLAIN:
                raise ModelError(
                    f"{file}: {name} is {entry['dtype']}: quantised, but config.json has no quantization_config, so"
                    " that the numbers would be read as they are; take the model before it was quantised"
                )
