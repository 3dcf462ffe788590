"""Checks that a loaded model matches its files; transformers at most warns if it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from halos_pl.policy.architecture import eos_setting, keeps_quantised, quantisation
from halos_pl.policy.quantized_weights import all_finite, quantized_layers
from halos_pl.policy.spec import ModelError, ModelSpec

#: Names in older files that are not weights: masks and frequencies, which are now computed.
_BUFFERS = ("inv_freq", "masked_bias", "attn.bias", "attention.bias")
#: Names of safetensors' dtypes that need no scale.
_PLAIN = {"F64", "F32", "F16", "BF16"}


def untrainable(spec: ModelSpec, method: str) -> ModelError:
    """The error about a model whose stored weights are quantized, where they would have to be trained."""
    return ModelError(
        f"{spec.path} is quantized ({method}), so its weights cannot be trained; set model.policy.lora to train an"
        " adapter on it, use the original model, or remove quantization_config from config.json if it is not quantized"
    )


def check_loaded(model: Any, info: Mapping[str, Any], spec: ModelSpec, folder: Path) -> None:
    """Compares a model with the files that it was loaded from.

    Args:
        model: model to check.
        info: loading info from ``from_pretrained(output_loading_info=True)``.
        spec: specification that was loaded.
        folder: folder of its files; need not exist, as for a hub name.

    Raises:
        ModelError: the weights in the files do not match the model's, are quantized, or are not finite.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, in_file, in_model = mismatched[0]
        raise ModelError(
            f"{spec.path}: {name} has shape {list(in_file)} in the weights and {list(in_model)} in config.json"
            f" ({_count(mismatched)}); fix config.json, e.g. vocab_size after resizing the vocabulary"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{spec.path} lacks {_count(missing)} of a {type(model).__name__}"
            f" ({some(missing)}); is it a complete causal language model?"
        )
    _check_unexpected(model, sorted(info["unexpected_keys"]), spec)
    method = quantisation(model)
    if method is not None and not (spec.lora and keeps_quantised(model)):
        raise untrainable(spec, method)
    if folder.is_dir():
        _check_files(folder)
    _check_stops(model, spec)
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(model)}
    for name, value in model.named_parameters():
        if not (all_finite(layers[name]) if name in layers else is_finite(value)):
            raise ModelError(f"{spec.path}: {name} contains NaN or infinite numbers; is it from a run that diverged?")


def is_finite(value: Tensor) -> bool:
    """Whether all elements are finite. One pass without a copy: a tenth of the time of ``isfinite().all()``."""
    return value.numel() == 0 or all(bool(end.isfinite()) for end in value.detach().aminmax())


def _count(names: list[Any]) -> str:
    return f"{len(names)} weight{'s' * (len(names) > 1)}"


def some(names: list[str]) -> str:
    """The first three names, for an error message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_unexpected(model: Any, unexpected: list[str], spec: ModelSpec) -> None:
    """Refuses unused weights in the model's layers; warns about others, such as those of a value head.

    Raises:
        ModelError: the model lacks something that its files have, such as scales, an adapter or a layer; names some of
            the weights.
    """
    parts = dict(model.named_modules())

    def is_used(name: str) -> bool:
        if name.endswith(_BUFFERS):
            return False
        above = [name[:at] for at, letter in enumerate(name) if letter == "."]
        parents = [parts[place] for place in above if place in parts]
        has_weights = any(True for part in parents[-1:] for _ in part.parameters(recurse=False))
        return has_weights or any(isinstance(part, nn.ModuleList) for part in parents)

    if inside := [name for name in unexpected if is_used(name)]:
        raise ModelError(
            f"{spec.path} contains {_count(inside)} that the {type(model).__name__} in config.json does not use"
            f" ({some(inside)}), so it would be another model. Is it quantised, was it saved with an adapter, or does"
            " config.json belong to another model?"
        )
    if unexpected:
        rank_zero_warn(
            f"halos: {spec.path}: {_count(unexpected)} not used by a {type(model).__name__}: {some(unexpected)}"
        )


def _check_stops(model: Any, spec: ModelSpec) -> None:
    """Refuses generation settings whose ``eos_token_id`` is not an id or a list of ids."""
    stops = eos_setting(model)
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and (not isinstance(stop, int) or isinstance(stop, bool) or stop < 0):
            raise ModelError(
                f"{spec.path}: eos_token_id in generation_config.json or config.json is {stops!r}; it must be a token"
                " id, or a list of ids"
            )


def _check_files(folder: Path) -> None:
    """Refuses files that transformers would misread or skip.

    Raises:
        ModelError: the weights are quantised, but config.json has no quantization_config; or generation_config.json,
            which determines where an answer ends, is not a JSON object.
    """
    generation = folder / "generation_config.json"
    try:
        if generation.is_file() and not isinstance(json.loads(generation.read_text(encoding="utf-8")), dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ModelError(f"{generation} cannot be read ({error}); download it again, or remove it") from error
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name.endswith(".weight") and entry["dtype"] not in _PLAIN:
                raise ModelError(
                    f"{file}: {name} is quantised ({entry['dtype']}), but config.json has no quantization_config, so"
                    " the numbers would be read without their scales; use the original model"
                )
