"""Loads a run from its folder: its module and its trained policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from halos_pl.common.foreign_code import model_of_config
from halos_pl.common.messages import cause
from halos_pl.data.template import CHAT_TEMPLATE, use_template
from halos_pl.run_dir import CONFIG
from halos_pl.training.checkpoint_contents import entry_kind
from halos_pl.training.checkpoint_reading import read_checkpoint
from halos_pl.training.checkpoint_search import find_checkpoint
from halos_pl.training.module import HALOModule
from halos_pl.training.sharded_checkpoint import load_sharded


def module_of_run(run: Path) -> HALOModule:
    """The module that a run's config describes, without loading a model.

    Raises:
        FileNotFoundError: if there is no ``config.yaml``.
        ValueError: if it is invalid.
    """
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{run / CONFIG}: no such file; {run} is not the folder of a run")
    model = model_of_config(run / CONFIG)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(HALOModule, "model")
    try:
        config = parser.parse_object({"model": model})
    except ArgumentError as error:
        raise ValueError(f"{run / CONFIG}: {cause(str(error))}") from error
    module: HALOModule = parser.instantiate_classes(config).model
    take_template(module, run)
    return module


def take_template(module: HALOModule, run: Path) -> None:
    """Gives the module's tokenizer the chat template that the run set for training, if any."""
    if (run / CHAT_TEMPLATE).is_file():
        use_template(module.tokenizer, (run / CHAT_TEMPLATE).read_text(encoding="utf-8"), str(run / CHAT_TEMPLATE))


def load_run(run: str | Path, ckpt_path: str | None = None, *, quantized: bool = True) -> HALOModule:
    """The module of a run with its trained policy, on the CPU.

    Args:
        run: the run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
        ckpt_path: the checkpoint: ``last`` (default), ``best`` (according to the run's ModelCheckpoint), or a path.
        quantized: whether to quantize the policy's base if the run did; otherwise its adapter is put on the original.

    Raises:
        FileNotFoundError: if the config or the checkpoint is missing.
        ValueError: if one of them is invalid, or the checkpoint does not fit the config's policy.
    """
    run = Path(run)
    module = module_of_run(run)
    path = find_checkpoint(run, ckpt_path)
    spec = module.models.spec
    assert spec is not None  # a config names no model in memory
    if not quantized:
        module.models.spec = replace(spec, quantize=None)
    module.scorer = module.models.policy()
    state = load_weights(module, path, run)
    dtype = trained_dtype(state)
    if dtype.itemsize < getattr(torch, spec.dtype).itemsize:
        module.policy.to(dtype)
    return module


def trained_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The widest dtype of a policy's trained weights, which a Trainer in half precision has rounded."""
    dtypes = {value.dtype for name, value in state.items() if name.startswith("scorer.") and value.is_floating_point()}
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


def load_weights(module: nn.Module, path: Path, run: Path, prefix: str = "") -> dict[str, Tensor]:
    """Loads a checkpoint's weights, one tensor at a time, into a module whose policy is loaded.

    Args:
        module: the module.
        path: the checkpoint.
        run: folder of its run, for messages.
        prefix: beginning of the names of the weights to load.

    Returns:
        The checkpoint's weights; those of a folder are on the meta device.

    Raises:
        CheckpointError: if the checkpoint cannot be used.
        ValueError: if the weights do not fit that policy.
    """
    whole: dict[str, Tensor] = read_checkpoint(path, mmap=True)["state_dict"]
    state = {name: value for name, value in whole.items() if name.startswith(prefix)}
    check_weights(module, state, run)
    load_sharded(path, {"state_dict": module.state_dict()}, only=("state_dict",))
    return state


def check_weights(module: nn.Module, state: Mapping[str, Any], run: Path) -> None:
    """Refuses a checkpoint's weights that do not fit the policy of a module.

    Raises:
        ValueError: if they do not; names the first differences.
    """
    kinds = {name: entry_kind(value) for name, value in module.state_dict().items()}
    if wrong := [name for name, value in state.items() if name in kinds and kinds[name] != entry_kind(value)]:
        raise ValueError(f"{run}: the checkpoint does not fit the policy in {CONFIG}: shape or type of {wrong[0]}")
    unexpected = state.keys() - kinds.keys()
    missing = {name for name, p in module.named_parameters() if p.requires_grad} - state.keys()
    if unexpected or missing:
        names = ", ".join(sorted(unexpected | missing)[:5])
        raise ValueError(f"{run}: the checkpoint does not fit the policy in {CONFIG} (first differences: {names})")
