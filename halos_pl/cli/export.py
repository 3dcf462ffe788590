"""``halos export``: writes the policy of a run, or another model, as a Hugging Face folder."""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import get_peft_model_state_dict
from torch import nn

from halos_pl.cache import cache_root
from halos_pl.cli.model_card import CARD, check_repository, push, write_card
from halos_pl.common.files import remove, share
from halos_pl.data.turns import stop_ids
from halos_pl.policy import adapters
from halos_pl.policy.adapter_sum import combine
from halos_pl.policy.architecture import (
    add_eos_ids,
    base_model,
    is_adapter_weight,
    keeps_quantised,
    set_noise,
    vocabulary_size,
)
from halos_pl.policy.intact import is_finite
from halos_pl.policy.loading import load_model, stored_dtype, stored_noise
from halos_pl.policy.reward_model import padding_token
from halos_pl.policy.scalar_head import check_classifier, save_reward_adapter, sequence_classifier
from halos_pl.policy.scorer import Scorer
from halos_pl.policy.self_test import self_test_batch
from halos_pl.policy.source import ADAPTER_CONFIG, source_of
from halos_pl.policy.spec import ModelError, ModelSpec
from halos_pl.training.checkpoint_reading import step_of
from halos_pl.training.named_model import NamedModel, named_model
from halos_pl.training.offloaded import NonFiniteError, offloaded_policy

#: Files of a model's weights, and of its tokenizer.
WEIGHTS = ("adapter_*", "model*.safetensors*", "pytorch_model*", "generation_config.json")
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab.*",
    "merges.txt",
)
_PART = ".halos-export"


def export(
    run: str,
    folder: str,
    *,
    adapter: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
    ckpt_path: str | None = None,
    max_shard_size: str = "5GB",
    push_to_hub: str | None = None,
) -> None:
    """Write a run's policy as a Hugging Face folder with a model card. Executes the code that its config.yaml names.

    A reward model is written as a sequence classifier with one label. Any other model is written unchanged, with an
    adapter merged into its base. An adapter that was trained on a base quantized by model.policy.quantize is merged
    into the original base, which is not quantized.

    Args:
        run: folder of the run; or a Hugging Face folder, a folder with a peft adapter, a hub name, or package:NAME.
        folder: folder to write, which ``AutoModelForCausalLM.from_pretrained`` and ``halos sample`` can load; for a
            reward model ``AutoModelForSequenceClassification.from_pretrained``.
        adapter: whether to write only the adapter of a LoRA policy instead of merging it into the model. If the run
            started from an adapter, both become one adapter of the base model.
        dtype: dtype of the weights; default: that of training (model.policy.dtype, or that of a half-precision
            Trainer).
        overwrite: whether to write into a folder that is not empty.
        ckpt_path: checkpoint other than the last: best (as monitored by the run's ModelCheckpoint), or a path. Also
            spelled --checkpoint.
        max_shard_size: largest size of a file of weights, such as 500MB; a larger model is split into several files.
        push_to_hub: repository of the hub, such as NAME/MODEL, to upload the folder to; a new one is private.
    """
    if push_to_hub is not None:
        check_repository(push_to_hub)
    checkpoint = _write_model(run, folder, adapter, dtype, overwrite, ckpt_path, max_shard_size)
    step = step_of(Path(checkpoint)) if checkpoint else None
    defaults = {name: parameter.default for name, parameter in inspect.signature(export).parameters.items()}
    words = ["halos", "export", run, folder]
    options = {"adapter": adapter, "dtype": dtype, "ckpt_path": ckpt_path, "max_shard_size": max_shard_size}
    for name, value in options.items():
        if value != defaults[name]:
            words += [f"--{name}", str(value).lower() if value is True else str(value)]
    write_card(run, Path(folder), words, step)
    if push_to_hub is not None:
        push(Path(folder), push_to_hub)


def _write_model(
    run: str,
    folder: str,
    adapter: bool,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    overwrite: bool,
    ckpt_path: str | None,
    max_shard_size: str,
) -> str | None:
    """Writes the weights and the tokenizer, and returns the run's checkpoint; for the arguments see :func:`export`."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ValueError(f"--max_shard_size {max_shard_size} is not a size, such as 5GB or 500MB") from error
    out = Path(folder)
    if out.exists() and any(path.name != _PART for path in out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder, or use --overwrite true")
    if adapter and (out / "config.json").exists():
        raise FileExistsError(f"{out} contains a model, to which loaders would add the adapter; choose another folder")
    named = named_model(run, ckpt_path, reward_models=True)
    if adapter and named.spec.lora is None:
        why = "trained the whole model, so there is no LoRA adapter" if named.run else "is not a run"
        raise ValueError(f"--adapter: {run} {why}")
    if out.exists() and Path(run).is_dir() and out.samefile(run):
        raise FileExistsError(f"{out} is the folder to export; choose another one")
    if named.run is None and dtype is None:
        dtype = stored_dtype(named.spec)  # type: ignore[assignment]
    offloaded = _offloaded(named)
    scorer = named.load_scorer(quantized=adapter) if named.gives_scalars else None
    policy: Any = offloaded or (named.load("cpu", quantized=adapter) if scorer is None else scorer.model.eval())
    if keeps_quantised(base_model(policy)) and not adapter:
        raise ValueError(
            f"{run}: the weights in {named.spec.path} are quantized, so merging the adapter into them would round it;"
            " export it with --adapter true"
        )
    tokenizer = named.tokenizer()
    if scorer is not None:
        _set_padding(policy, tokenizer, run, adapter=adapter)
    if dtype == "float32" and not adapter:  # before merging, so that the sum is not rounded
        policy.float()
    if adapter:
        policy = _adapter_alone(policy, named.spec)
    elif named.spec.lora is not None:
        policy = policy.merge_and_unload()
    weights = {name: p for name, p in policy.named_parameters() if not adapter or is_adapter_weight(name)}
    if dtype is not None and adapter:  # its base may be quantized
        for parameter in weights.values():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    elif dtype is not None:
        policy.to(getattr(torch, dtype))
    if offloaded is None:  # otherwise, each weight is checked when it is read
        _check_finite(weights, run)
    if not adapter:
        set_noise(policy, stored_noise(named.spec))
    if scorer is not None:
        _write_reward_model(scorer, policy, tokenizer, out, run, adapter=adapter, max_shard_size=max_shard_size)
        return named.ckpt_path
    stops = add_eos_ids(policy, stop_ids(tokenizer))
    if adapter and stops:
        print(f"halos: the adapter's base does not stop at the ids {stops}; pass them as eos_token_id to generate")
    with _written(out, (*TOKENIZER, *(("adapter_*",) if adapter else WEIGHTS))) as part:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            policy.save_pretrained(part, **({} if adapter else {"max_shard_size": max_shard_size}))
        tokenizer.save_pretrained(part)
    written, stored = _dtype_of(policy), stored_dtype(named.spec)
    base = f" (its base is in {stored}; choose with --dtype)" if dtype is None and stored != written else ""
    what = "the adapter" if adapter else "the model"
    print(f"halos: wrote {what} of {run} to {out}{'' if adapter else f', in {written}{base}'}")
    return named.ckpt_path


def _set_padding(policy: Any, tokenizer: Any, run: str, *, adapter: bool) -> None:
    """Gives the tokenizer a padding token that ends no row, since sequence classifiers skip padding at the end.

    Raises:
        ValueError: if the vocabulary has to grow, but only an adapter is written.
    """
    if (token := padding_token(tokenizer)) is not None:
        tokenizer.pad_token = token
        return
    if adapter:
        raise ValueError(
            f"--adapter: the tokenizer of {run} has no padding token that ends no row, so the vocabulary has to grow;"
            " export the merged model, without --adapter"
        )
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if len(tokenizer) > vocabulary_size(policy):
        policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def _write_reward_model(
    scorer: Scorer, policy: Any, tokenizer: Any, out: Path, run: str, *, adapter: bool, max_shard_size: str
) -> None:
    """Writes a reward model as a sequence classifier with one label, or its adapter alone.

    Args:
        scorer: the run's policy with its head.
        policy: the model to write: merged, or with its adapter if that is written alone.
        tokenizer: its tokenizer, with a padding token that ends no row.
        out: folder to write.
        run: name of the run.
        adapter: whether to write the adapter alone.
        max_shard_size: largest size of a file of weights.

    Raises:
        ModelError: if transformers' classifier does not give the scalars of training.
        NonFiniteError: if a weight of the head is not finite.
    """
    assert scorer.scalar_head is not None
    _check_finite({"scalar_head.weight": scorer.scalar_head.weight}, run)
    scorer.model = policy
    check_classifier(scorer, self_test_batch(policy))
    with _written(out, (*TOKENIZER, *(("adapter_*",) if adapter else WEIGHTS))) as part:
        if adapter:
            save_reward_adapter(policy, scorer.scalar_head.weight, part)
        else:
            classifier = sequence_classifier(policy, scorer.scalar_head.weight, tokenizer.pad_token_id)
            classifier.save_pretrained(part, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(part)
    print(
        f"halos: wrote {'the adapter of ' if adapter else ''}the reward model of {run} to {out}"
        f"{'' if adapter else f', in {_dtype_of(policy)}'}; rows are padded with {tokenizer.pad_token!r}"
    )


def _offloaded(named: NamedModel) -> Any:
    """The policy with its weights left in a folder checkpoint, if it is in one and needs no merging."""
    if (
        named.gives_scalars
        or named.run is None
        or named.ckpt_path is None
        or not (checkpoint := Path(named.ckpt_path)).is_dir()
    ):
        return None
    return offloaded_policy(named.run, checkpoint)


def _adapter_alone(policy: Any, spec: ModelSpec) -> Any:
    """A peft model whose adapter, applied to the base that it names, gives the policy.

    Raises:
        ValueError: if no single adapter does.
    """
    root, chain = adapters.chain(spec)
    if chain:
        latest = (policy.peft_config["default"], get_peft_model_state_dict(policy, save_embedding_layers=False))
        try:
            earlier = [(each.config, adapters.weights_of(each)) for each in chain]
            policy = combine(load_model(replace(root, lora=None)), [*earlier, latest], policy)
        except ModelError as error:
            raise ValueError(
                f"--adapter: the run started from the adapter {spec.path}, and the two cannot be written as one adapter"
                f" of {root.path} ({error}); export the merged model, without --adapter"
            ) from error
    base = source_of(root, weights=False)
    config = policy.peft_config["default"]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.revision = root.revision
    if Path(base).is_relative_to(cache_root()):
        print(
            f"halos: the adapter's base is {base}, converted from {root.path}. That folder is in this machine's cache,"
            " which may drop it: copy it and name the copy in adapter_config.json, or export without --adapter"
        )
    return policy


def _dtype_of(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _check_finite(weights: Mapping[str, nn.Parameter], run: str) -> None:
    for name, value in weights.items():
        if not is_finite(value):
            raise NonFiniteError(run, name, value)


@contextmanager
def _written(out: Path, stale: Sequence[str]) -> Iterator[Path]:
    """A folder to write into, whose files move to ``out`` only when all of them have been written.

    Files in ``out`` that match ``stale`` are then removed, since loaders would mix them with the new ones.

    Raises:
        OSError: if a file cannot be written, as on a full disk; ``out`` is then unchanged.
    """
    new = not out.exists()
    part = out / _PART
    try:
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process
        part.mkdir(parents=True)
        try:
            yield part
        except NonFiniteError:
            raise
        except Exception as error:  # safetensors and tokenizers raise their own errors on a full disk
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{out} could not be written ({reason}); the folder is unchanged") from error
        (part / CARD).unlink(missing_ok=True)  # peft's empty template
        share(part)
        for file in {file for pattern in stale for file in out.glob(pattern)}:
            remove(file)
        # The file that makes loaders accept the folder as a model comes last.
        for file in sorted(part.iterdir(), key=lambda file: file.name in ("config.json", ADAPTER_CONFIG)):
            if (out / file.name).is_dir():
                remove(out / file.name)
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if new:
            with suppress(OSError):  # not empty
                out.rmdir()
