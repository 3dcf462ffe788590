"""Refuses, before training, settings under which the loss would differ from the config's."""

from __future__ import annotations

import re
from typing import Any, get_args

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from transformers import PreTrainedModel

from halos_pl.batch import Needs
from halos_pl.policy.architecture import base_model
from halos_pl.policy.reference import ReferenceModel
from halos_pl.policy.scorer import PrefixSharing
from halos_pl.policy.spec import ModelSpec
from halos_pl.training.optim import LRShape
from halos_pl.training.sample_completions import SAMPLES, SampleCompletions
from halos_pl.training.strategy import ShardedStrategy, check_replicas

#: Strategies that are refused: a pattern of their names and class names, and the reason with the way out.
_REFUSED_STRATEGIES = (
    (
        r"fsdp(_cpu_offload|Strategy)?|xla_?fsdp(Strategy)?",
        "FSDP1 wraps the whole module, so that the backward passes inside a step would run within its forward pass, and"
        " it cannot clip by the norm of all gradients. Use fsdp2, which shards policy and reference",
    ),
    (
        r"deepspeed(_?\w+)?",
        "DeepSpeed's engine takes over backward passes, clipping and accumulation, which a step does itself, and ZeRO-3"
        " frees weights that log-probs still need. Use fsdp2, which shards weights, gradients and optimizer state",
    ),
    (
        r"tensor_?parallel\w*|tp",
        "tensor parallelism would split the head, but log-probs are computed from its whole weight. Use fsdp2;"
        " replicas sets how many groups of devices each keep a sharded copy",
    ),
    (
        r"(context|sequence)_?parallel\w*|cp",
        "context parallelism would split rows over devices, but rewards and prefix sharing take whole rows. Use fsdp2,"
        " with model.micro_batch_rows and model.policy.gradient_checkpointing for long rows",
    ),
    (
        r"model_?parallel(Strategy)?",
        "it leaves the sharding to the module, and its tensor_parallel_size would split the head, but log-probs are"
        " computed from its whole weight. Use fsdp2, with replicas instead of data_parallel_size",
    ),
    (
        r"(ddp|xla)_(spawn|fork|notebook|debug)\w*|ddp_notebook\w*",
        "each rank runs the command itself. Use ddp",
    ),
)


def refused_strategy(name: str) -> str | None:
    """Why a strategy is refused and what to use instead, in one line; None if nothing is known against it.

    Args:
        name: registered name, such as ``deepspeed_stage_3``, or the name or path of a class.
    """
    word = name.rpartition(".")[2]
    for pattern, reason in _REFUSED_STRATEGIES:
        if re.fullmatch(pattern, word, re.IGNORECASE):
            return f"trainer.strategy {word} is not supported: {reason}"
    return None


def _check_strategy(trainer: Any) -> None:
    """Refuses a strategy under which a step would not compute the loss of the whole batch.

    Raises:
        ValueError: naming the strategy, the reason and the way out.
    """
    strategy, kind = trainer.strategy, type(trainer.strategy)
    if isinstance(strategy, ShardedStrategy):
        check_replicas(strategy.replicas, trainer.world_size)
    elif reason := next(filter(None, (refused_strategy(each.__name__) for each in kind.__mro__)), None):
        raise ValueError(reason)
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(f"trainer.strategy {kind.__name__} is not supported. Use a single device, ddp or fsdp2")


def check_float16(trainer: Any, dtype: str) -> None:
    """Refuses to train in float16 without a loss scaler: small gradients would be 0, large ones infinite.

    Args:
        trainer: Lightning's Trainer.
        dtype: dtype in which the weights are loaded.

    Raises:
        ValueError: naming the setting and what to choose instead.
    """
    setting = "trainer.precision is 16-true" if trainer.precision == "16-true" else ""
    if dtype == "float16" and getattr(trainer.precision_plugin, "scaler", None) is None:
        setting = setting or f"model.policy.dtype is float16 and trainer.precision {trainer.precision}"
    if setting:
        raise ValueError(
            f"{setting}: gradients below 6e-8 would be 0 and above 65504 infinite, since nothing scales the loss."
            " Choose bfloat16 (trainer.precision bf16-true or bf16-mixed), or float32 weights with 16-mixed on a GPU"
        )


def check_precision(precision: str, *, quantized: bool) -> None:
    """Refuses a precision that casts all weights of a model with quantized ones, which are codes and not numbers.

    Raises:
        ValueError: naming the setting and what to choose instead.
    """
    if quantized and precision.endswith("-true") and precision != "32-true":
        raise ValueError(
            f"trainer.precision is {precision}, which casts all weights, but the policy's are quantized. Choose"
            " trainer.precision 32-true, and model.policy.dtype bfloat16 to compute in half precision; the adapter"
            " stays in float32"
        )


def check_clipping(value: float | None, algorithm: str | None) -> None:
    """Refuses values that Lightning would silently treat as no clipping; null and 0 mean no clipping.

    Raises:
        ValueError: naming the setting.
    """
    if value is not None and not value >= 0:
        raise ValueError(
            f"trainer.gradient_clip_val is {value}; it must be at least 0, or null. 0 and null do not clip"
        )
    if algorithm not in (None, "norm", "value"):
        raise ValueError(f"trainer.gradient_clip_algorithm is {algorithm}; it must be norm or value")


def check_trainer(trainer: Any) -> None:
    """Refuses settings that would silently train something else.

    Raises:
        ValueError: naming the setting, the reason and what to do instead.
    """
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: it would average losses with"
            " different reference points and wrong weights. A batch is one optimizer step here: raise"
            " data.batch_size, and set model.micro_batch_rows to what fits in memory"
        )
    check_clipping(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
    _check_strategy(trainer)
    if sum(isinstance(callback, SampleCompletions) for callback in trainer.callbacks) > 1:
        raise ValueError(
            f"trainer.callbacks has SampleCompletions more than once, and all would write {SAMPLES}; keep one, with all"
            " prompts in one file"
        )


def check_sharded(trainer: Any, needs: Needs) -> None:
    """Refuses an objective that the Trainer's strategy cannot compute.

    Raises:
        ValueError: as in :func:`check_sharded_needs`.
    """
    if isinstance(trainer.strategy, ShardedStrategy):
        check_sharded_needs(needs)


def check_sharded_needs(needs: Needs) -> None:
    """Refuses an objective that fsdp2 cannot compute.

    Raises:
        ValueError: naming the part and what to do instead.
    """
    if needs.samples:
        raise ValueError(
            "model.reference_point samples from the policy, which fsdp2 does not support: ranks would generate answers"
            " of different lengths, and wait for each other forever. Choose a reference point that needs no samples,"
            " such as MismatchedKL, or trainer.strategy ddp"
        )


def check_arguments(
    policy: Any,
    reference_model: Any,
    micro_batch_rows: Any,
    prefix_sharing: Any,
    optimizer: Any,
    lr_schedule: Any,
    warmup_ratio: Any,
) -> None:
    """Refuses invalid arguments of the module.

    Raises:
        TypeError: if a model, a reference or an optimizer has the wrong type.
        ValueError: if a number is out of range or a name unknown, naming the argument.
    """
    if not isinstance(policy, ModelSpec) and not isinstance(base_model(policy), PreTrainedModel):
        raise TypeError(
            f"policy is a {type(policy).__name__}; it must be a ModelSpec, such as ModelSpec(path), or a causal"
            " language model of transformers"
        )
    if not isinstance(policy, ModelSpec) and base_model(policy).get_output_embeddings() is None:
        raise TypeError(
            f"policy is a {type(base_model(policy)).__name__}, which has no language-model head; load it with"
            " AutoModelForCausalLM"
        )
    if reference_model is not None and not isinstance(reference_model, ReferenceModel):
        raise TypeError(
            f"reference_model is a {type(reference_model).__name__}; it must be a ReferenceModel, such as FrozenCopy()"
            " or OtherModel(ModelSpec(path))"
        )
    if micro_batch_rows is not None and (not isinstance(micro_batch_rows, int) or micro_batch_rows < 1):
        raise ValueError(f"micro_batch_rows is {micro_batch_rows}; it must be a whole number from 1, or null")
    for name, value, kind in (("prefix_sharing", prefix_sharing, PrefixSharing), ("lr_schedule", lr_schedule, LRShape)):
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio is {warmup_ratio}; it is a share of the run, between 0 and 1")
    if optimizer is None:
        raise ValueError("model.optimizer is null; name one, such as torch.optim.AdamW, or leave it out")
    if not callable(optimizer):
        raise TypeError(
            f"optimizer is an instance of {type(optimizer).__name__}; it must be a callable that makes one, such as"
            " lambda parameters: torch.optim.AdamW(parameters, lr=1e-5)"
        )


def check_limits(trainer: Any, epoch: int, taken: int) -> None:
    """Refuses to resume a run that has already reached a limit.

    Args:
        trainer: Lightning's Trainer.
        epoch: number of epochs that the checkpoint has trained.
        taken: number of its optimizer steps.

    Raises:
        ValueError: naming the limit.
    """
    most, last = trainer.max_epochs, trainer.max_steps
    if most is not None and 0 <= most < epoch:
        raise ValueError(
            f"trainer.max_epochs is {most}, but {trainer.ckpt_path} has trained {epoch} epochs; raise it to resume"
        )
    if 0 <= last < taken:
        raise ValueError(
            f"trainer.max_steps is {last}, but {trainer.ckpt_path} has taken {taken} steps; raise it to resume"
        )
