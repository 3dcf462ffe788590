"""Loads a run from its folder: its module and its trained policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from halos_pl.common.foreign_code import model_of_config
from halos_pl.common.messages import cause
from halos_pl.data.template import CHAT_TEMPLATE, use_template
from halos_pl.run_dir import CONFIG
from halos_pl.training.checkpoint_contents import entry_kind
from halos_pl.training.checkpoint_search import load_trained
from halos_pl.training.module import HALOModule


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


def load_run(run: str | Path, ckpt_path: str | None = None) -> HALOModule:
    """The module of a run with its trained policy, on the CPU.

    Args:
        run: the run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
        ckpt_path: the checkpoint: ``last`` (default), ``best`` (according to the run's ModelCheckpoint), or a file.

    Raises:
        FileNotFoundError: if the config or the checkpoint is missing.
        ValueError: if one of them is invalid, or the checkpoint does not fit the config's policy.
    """
    run = Path(run)
    module = module_of_run(run)
    state = load_trained(run, ckpt_path)
    spec = module.models.spec
    assert spec is not None  # a config names no model in memory
    module.scorer = module.models.policy()
    put_weights(module, state, run)
    # A Trainer in half precision has rounded the trained weights.
    trained = {value.dtype for name, value in state.items() if name.startswith("scorer.") and value.is_floating_point()}
    widest = max(trained, key=lambda dtype: dtype.itemsize, default=torch.float32)
    if widest.itemsize < getattr(torch, spec.dtype).itemsize:
        module.policy.to(widest)
    return module


def put_weights(module: nn.Module, state: dict[str, Any], run: Path) -> None:
    """Loads a run's trained weights into a module whose policy is loaded.

    Raises:
        ValueError: if they do not fit that policy.
    """
    kinds = {name: entry_kind(value) for name, value in module.state_dict().items()}
    if wrong := [name for name, value in state.items() if name in kinds and kinds[name] != entry_kind(value)]:
        raise ValueError(f"{run}: the checkpoint does not fit the policy in {CONFIG}: shape or type of {wrong[0]}")
    missing, unexpected = module.load_state_dict(state, strict=False)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if unexpected or trained & set(missing):
        names = ", ".join(sorted([*unexpected, *(trained & set(missing))])[:5])
        raise ValueError(f"{run}: the checkpoint does not fit the policy in {CONFIG} (first differences: {names})")
