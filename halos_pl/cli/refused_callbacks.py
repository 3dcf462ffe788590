"""Lightning callbacks that cannot work here, each with the alternative."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from halos_pl.common.type_words import imported

_REFUSED: dict[type, str] = {
    # They change the rows of a step, or train before the run begins.
    BatchSizeFinder: "the loss depends on data.batch_size, the rows of an optimizer step; set it, and set"
    " model.micro_batch_rows to what fits in memory",
    GradientAccumulationScheduler: "a batch is one optimizer step here; raise data.batch_size, and set"
    " model.micro_batch_rows to what fits in memory",
    LearningRateFinder: "the learning rate is a setting of the optimizer; try some values of"
    " model.optimizer.init_args.lr, for example in a study",
    # They use the weights before these are loaded.
    StochasticWeightAveraging: "it copies the model before its weights are loaded; use WeightAveraging or"
    " EMAWeightAveraging, which average over steps",
    ModelPruning: "it chooses weights before they are loaded; prune the model that halos export writes",
    BaseFinetuning: "it freezes layers before they are loaded; model.policy.lora trains few weights",
    # It makes Lightning resume from a file other than --ckpt_path.
    OnExceptionCheckpoint: "a later fit would resume from its file unasked; set"
    " checkpoint.every_n_steps, and resume with --ckpt_path last",
}


def refused_callback(config: Any, dtype: str, precision: Any) -> str:
    """Why one of the callbacks cannot be used; empty if all of them can.

    Args:
        config: parsed value of ``trainer.callbacks``.
        dtype: dtype of the policy's weights.
        precision: precision of the Trainer.
    """
    callbacks = config if isinstance(config, list) else [config]
    for number, callback in enumerate(callbacks):
        path = callback.get("class_path") if isinstance(callback, Namespace | Mapping) else None
        kind = imported(path) if isinstance(path, str) else None
        if not inspect.isclass(kind):
            continue
        why = next((why for refused, why in _REFUSED.items() if issubclass(kind, refused)), "")
        half = "bfloat16" if precision == "bf16-true" else dtype
        if issubclass(kind, WeightAveraging) and half != "float32":
            why = (
                f"it averages in the precision of the weights, and {half} rounds small changes of the average away;"
                " set model.policy.dtype float32 and trainer.precision bf16-mixed"
            )
        if why:
            where = f"[{number}]" if isinstance(config, list) else ""
            return f"trainer.callbacks{where}: {kind.__name__} is not supported: {why}"
    return ""
