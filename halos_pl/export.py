"""From a run's folder to a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from halos_pl.cache import cache_root
from halos_pl.callbacks import CONFIG, load_trained
from halos_pl.foreign_code import model_of_config
from halos_pl.messages import cause
from halos_pl.module import HALOModule
from halos_pl.policy.loading import base_model, load_model

#: Files that say what the weights of a folder are.
WEIGHTS = ("adapter_*", "model*.safetensors*", "pytorch_model*")


def module_of_run(run: Path) -> HALOModule:
    """The module that a run's config describes, with no model loaded.

    Raises:
        FileNotFoundError: where there is no ``config.yaml``.
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
    return module


def load_run(run: str | Path) -> HALOModule:
    """The module of a run with its trained policy, on the CPU.

    Args:
        run: the run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.

    Raises:
        FileNotFoundError: where one of them is missing.
        ValueError: where the checkpoint is not of that config's policy.
    """
    run = Path(run)
    module = module_of_run(run)
    state = load_trained(run)
    module.policy = load_model(module.policy_spec)
    put_weights(module, state, run)
    return module


def put_weights(module: HALOModule, state: dict[str, Any], run: Path) -> None:
    """Gives a module, whose policy is loaded, the weights that a run has trained.

    Raises:
        ValueError: where they are not of that policy.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if unexpected or trained & set(missing):
        names = ", ".join(sorted([*unexpected, *(trained & set(missing))])[:5])
        raise ValueError(f"{run}: the checkpoint does not fit the policy in {CONFIG} (first differences: {names})")


def export(run: str, folder: str, *, adapter: bool = False, overwrite: bool = False) -> None:
    """Write a run's policy as a Hugging Face folder. The code that the run's config.yaml names is executed.

    Args:
        run: the run's folder.
        folder: where to write; ``AutoModelForCausalLM.from_pretrained`` and ``halos generate`` take it.
        adapter: of a LoRA policy, write the adapter alone instead of merging it into the model.
        overwrite: write into a folder that is not empty.
    """
    out = Path(folder)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder, or say --overwrite true")
    module = load_run(run)
    policy: Any = module.policy
    if adapter and module.policy_spec.lora is None:
        raise ValueError(f"--adapter: {run} trained the whole model, there is no LoRA adapter to write")
    if module.policy_spec.lora is not None and not adapter:
        policy = policy.merge_and_unload()
    if not adapter:  # an earlier adapter or model in the folder would be taken for a part of this one
        for stale in (file for pattern in WEIGHTS for file in out.glob(pattern)):
            stale.unlink()
    for name, value in base_model(module.policy).noise_of_config.items():  # type: ignore[arg-type]
        setattr(base_model(policy).config, name, value)
    policy.save_pretrained(out)
    if adapter:
        base = policy.peft_config["default"].base_model_name_or_path
        if Path(base).is_relative_to(cache_root()):
            print(f"halos: the adapter's base is the converted model in {base}; where that is not, it cannot be loaded")
    module.tokenizer.save_pretrained(out)
    print(f"halos: wrote {'the adapter' if adapter else 'the model'} of {run} to {out}")
