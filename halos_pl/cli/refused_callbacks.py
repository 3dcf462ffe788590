"""Lightning's callbacks that cannot do here what they promise, each with what to do instead."""

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

from halos_pl.common.wrong_value import imported

_REFUSED: dict[type, str] = {
    # They change what a step is, or train before the run begins.
    BatchSizeFinder: "data.batch_size is the rows of an optimizer step, which the loss depends on, and"
    " model.micro_batch_rows what fits in memory; set both",
    GradientAccumulationScheduler: "a batch is one optimizer step here; raise data.batch_size, and set"
    " model.micro_batch_rows to what fits in memory",
    LearningRateFinder: "the learning rate is a setting of the optimizer; try some values of"
    " model.optimizer.init_args.lr, as an ablation say",
    # They look at the weights before there are any.
    StochasticWeightAveraging: "it copies the model before its weights are loaded; use WeightAveraging or"
    " EMAWeightAveraging, which average over steps",
    ModelPruning: "it chooses weights before they are loaded; prune the model that halos export writes",
    BaseFinetuning: "it freezes layers before they are loaded; model.policy.lora trains few weights",
    # It makes Lightning resume from a file that --ckpt_path does not name.
    OnExceptionCheckpoint: "a later fit would resume from its file without being told to; set"
    " checkpoint.every_n_steps, and resume with --ckpt_path last",
}


def refused_callback(given: Any, dtype: str, precision: Any) -> str:
    """Why one of the callbacks cannot be used; empty where all of them can.

    Args:
        given: ``trainer.callbacks``, as parsed.
        dtype: of the policy's weights.
        precision: of the Trainer.
    """
    callbacks = given if isinstance(given, list) else [given]
    for number, callback in enumerate(callbacks):
        path = callback.get("class_path") if isinstance(callback, Namespace | Mapping) else None
        kind = imported(path) if isinstance(path, str) else None
        if not inspect.isclass(kind):
            continue
        why = next((why for refused, why in _REFUSED.items() if issubclass(kind, refused)), "")
        half = "bfloat16" if precision == "bf16-true" else dtype
        if issubclass(kind, WeightAveraging) and half != "float32":
            why = (
                f"it averages in the weights' own precision, and {half} would round the average's small changes away;"
                " set model.policy.dtype float32 and trainer.precision bf16-mixed"
            )
        if why:
            where = f"[{number}]" if isinstance(given, list) else ""
            return f"trainer.callbacks{where}: {kind.__name__} is not supported: {why}"
    return ""
