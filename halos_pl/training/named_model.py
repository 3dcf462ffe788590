"""One way to name a model for ``sample``, ``evaluate`` and ``export``: a run, a folder, an adapter or a hub name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos_pl.common.yaml_files import read_yaml
from halos_pl.data.prompts import TEXT_SETTINGS, text_settings
from halos_pl.data.template import template_of, use_template
from halos_pl.policy.loading import load_model, load_tokenizer, stored_dtype
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.source import ADAPTER_CONFIG
from halos_pl.policy.spec import ModelError, ModelSpec
from halos_pl.run_dir import CONFIG, LAST
from halos_pl.training.checkpoint_search import find_checkpoint
from halos_pl.training.trained import load_run, module_of_run


@dataclass(frozen=True)
class NamedModel:
    """A model that can be loaded.

    Attributes:
        name: its name as the user wrote it.
        spec: specification of the model; for a run, of its policy before training.
        run: the run's folder; None for other models.
        ckpt_path: the file of the run's checkpoint; None for other models.
        text: the run's settings for encoding text (``TEXT_SETTINGS``), or their defaults.
        chat_template: the text of a chat template to use instead of the model's.
        gives_scalars: whether it is the run of a reward model.
        precision: the Trainer's precision in the run's training, as in its config; None for other models.
    """

    name: str
    spec: ModelSpec
    run: Path | None
    ckpt_path: str | None
    text: dict[str, Any]
    chat_template: str | None = None
    gives_scalars: bool = False
    precision: Any = None

    def text_settings(self, **overrides: Any) -> dict[str, Any]:
        """The settings for encoding text: ``overrides`` that are not None, otherwise those of the run's training."""
        return self.text | {name: value for name, value in overrides.items() if value is not None}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with the chat template that a run was trained with."""
        tokenizer = module_of_run(self.run).tokenizer if self.run else load_tokenizer(self.spec)
        if self.chat_template is not None:
            use_template(tokenizer, self.chat_template, "--chat_template")
        return tokenizer

    def load(self, device: str | None = None, *, quantized: bool = True) -> nn.Module:
        """The model in eval mode.

        Args:
            device: the device; default: a GPU if there is one.
            quantized: whether to quantize the base of a run's policy as in training.

        Raises:
            ValueError: if the model or the run's checkpoint cannot be loaded.
        """
        model: Any = (
            load_run(self.run, self.ckpt_path, quantized=quantized).policy if self.run else load_model(self.spec)
        )
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()  # type: ignore[no-any-return]

    def load_scorer(self, *, quantized: bool = True) -> Scorer:
        """A run's policy with its scalar head, on the CPU; for the argument see :meth:`load`."""
        assert self.run is not None
        scorer = load_run(self.run, self.ckpt_path, quantized=quantized).scorer
        assert scorer is not None
        return scorer


def _refuse_other_run(run: Path, checkpoint: Path) -> None:
    """Refuses a checkpoint in another run's folder, whose weights would pass for those of this one.

    Raises:
        ModelError: naming that run.
    """
    at = checkpoint.resolve()
    owner = next((place for place in at.parents if (place / CONFIG).is_file() and (place / LAST).parent.is_dir()), None)
    if owner is not None and owner != run.resolve():
        raise ModelError(f"--ckpt_path {checkpoint} is a checkpoint of the run {owner}, not of {run}; name that run")


def named_model(
    name: str, ckpt_path: str | None = None, chat_template: str | None = None, *, reward_models: bool = False
) -> NamedModel:
    """The model called ``name``; reads no weights.

    Args:
        name: a run's folder, a Hugging Face folder, a folder with a peft adapter, a hub name, or ``package:NAME``.
        ckpt_path: a run's checkpoint: ``last`` (default), ``best``, or a file.
        chat_template: a chat template to use instead of the model's, see :func:`halos_pl.data.template.template_of`.
        reward_models: whether the run of a reward model is accepted, which gives scalars instead of text.

    Raises:
        CheckpointError: if the run does not record which checkpoint is best.
        DataError: if the chat template is invalid.
        FileNotFoundError: if a run lacks its config or a checkpoint.
        ModelError: if no model has that name, if it is a reward model and these are not accepted, or if ``ckpt_path``
            comes without a run or belongs to another run.
    """
    template = None if chat_template is None else template_of(chat_template, "--chat_template")
    folder = Path(name)
    is_model = any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG))
    # A run's folder that was moved or copied in part still counts as one.
    if not is_model and ((folder / CONFIG).is_file() or (folder / LAST).parent.is_dir()):
        module = module_of_run(folder)
        spec, gives_scalars = module.models.spec, module.objective.needs.scalar
        if gives_scalars and not reward_models:
            raise ModelError(
                f"{name} is the run of a reward model, which writes no text: measure it with halos test, or write it"
                f" with halos export {name} FOLDER"
            )
        assert spec is not None  # a config names no model in memory
        checkpoint = find_checkpoint(folder, ckpt_path)  # now, as a better one may be saved before it is loaded
        if ckpt_path not in (None, "last", "best"):
            _refuse_other_run(folder, checkpoint)
        config = read_yaml(folder / CONFIG)[0]
        text, precision = text_settings(config.get("data") or {}), (config.get("trainer") or {}).get("precision")
        return NamedModel(name, spec, folder, str(checkpoint), text, template, gives_scalars, precision)
    if ckpt_path is not None:
        raise ModelError(f"{name} is not the folder of a run, so it has no checkpoint {ckpt_path}")
    others = [file for kind in ("*.gguf", f"*/{ADAPTER_CONFIG}") for file in folder.glob(kind)]
    if folder.is_dir() and not is_model and not others:
        expected = f"{CONFIG}, config.json, {ADAPTER_CONFIG} or GGUF file"
        raise ModelError(f"{name} is not the folder of a run or a model: it contains no {expected}")
    spec = ModelSpec(path=name, attn_implementation=None)
    try:
        stored_dtype(spec)  # reads its configuration
    except ModelError as error:
        raise ModelError(str(error).removeprefix("model.policy.path: ")) from error
    return NamedModel(name, spec, None, None, dict(TEXT_SETTINGS), template)
