"""The arguments of transformers' Trainer, which TRL and LLaMA-Factory share, as settings of ``halos fit``."""

from __future__ import annotations

from typing import Any

from halos_pl.convert.draft import Draft
from halos_pl.convert.losses import part
from halos_pl.convert.run import Run

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant_with_warmup": "constant_with_warmup"}
_SCHEDULES["constant"] = "constant_with_warmup"  # without a warm-up
_ADAMW = {
    "adamw_torch": ("torch.optim.AdamW", {"fused": False}),
    "adamw_torch_fused": ("torch.optim.AdamW", {"fused": True}),
    "adamw_hf": ("torch.optim.AdamW", {"fused": False}),
    "adamw_bnb_8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "adamw_8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "paged_adamw_8bit": ("bitsandbytes.optim.PagedAdamW8bit", {}),
    "paged_adamw_32bit": ("bitsandbytes.optim.PagedAdamW32bit", {}),
}
_OTHERS = {"sgd": "torch.optim.SGD", "adagrad": "torch.optim.Adagrad", "rmsprop": "torch.optim.RMSprop"}


def fill_training(run: Run, draft: Draft, *, pairs: bool) -> None:
    """Writes length, steps, optimizer, logging and checkpoints.

    Args:
        run: settings of the run.
        draft: config to write into.
        pairs: whether an example of the run is a pair of rows.
    """
    draft.set("seed_everything", run.whole("seed"), "seed")
    if folder := run.text("output_dir"):
        draft.set("run_dir", folder, "output_dir")
    _fill_length(run, draft)
    draft.set("trainer.gradient_clip_val", run.number("max_grad_norm"), "max_grad_norm")
    _fill_logging(run, draft)
    if run.flag("use_cpu"):
        draft.set("trainer.accelerator", "cpu", "use_cpu")
    _fill_optimizer(run, draft)
    _fill_batch(run, draft, pairs=pairs)
    if run.flag("torch_compile"):
        draft.set("model.policy.compile", True, "torch_compile")


def fill_precision(run: Run, draft: Draft) -> None:
    """Writes the Trainer's precision: mixed, or float32."""
    half = "bf16-mixed" if run.flag("bf16") else "16-mixed" if run.flag("fp16") else "32-true"
    if run.flag("bf16") and run.flag("fp16"):
        raise run.error("fp16", "bf16 is true, too; set one of them to false")
    draft.set("trainer.precision", half, "bf16, fp16")


def _fill_length(run: Run, draft: Draft) -> None:
    steps, epochs = run.whole("max_steps"), run.number("num_train_epochs")
    if steps > 0:
        draft.set("trainer.max_steps", steps, "max_steps")
        draft.set("trainer.max_epochs", -1, "max_steps replaces num_train_epochs")
        return
    if epochs != int(epochs):
        raise run.error(
            "num_train_epochs", f"it is {epochs:g}; only whole epochs have an equal: give max_steps instead"
        )
    draft.set("trainer.max_epochs", int(epochs), "num_train_epochs")


def _fill_logging(run: Run, draft: Draft) -> None:
    every = run.number("logging_steps")
    if every >= 1:
        draft.set("trainer.log_every_n_steps", int(every), "logging_steps")
    else:
        run.note("logging_steps", "a share of the run has no equal; every step is logged")
    strategy, save = run.choice("save_strategy", ("no", "steps", "epoch", "best")), run.number("save_steps")
    if strategy == "steps" and save >= 1:
        draft.set("checkpoint.every_n_steps", int(save), "save_steps")
    else:
        run.note("save_strategy", "checkpoint.every_n_steps sets how often a checkpoint is written, which is 50 here")


def evaluates(run: Run, draft: Draft) -> bool:
    """Whether the run evaluates during training; writes how often."""
    strategy = run.choice("eval_strategy", ("no", "steps", "epoch"))
    if strategy == "no":
        return False
    examples = run.whole("per_device_eval_batch_size") * run.devices
    draft.set("data.eval_batch_size", examples, "per_device_eval_batch_size * devices")
    if strategy == "steps":
        every = run.number("eval_steps") if run.value("eval_steps") is not None else run.number("logging_steps")
        if every < 1:
            raise run.error("eval_steps", f"it is {every:g}, a share of the run; give a number of steps")
        draft.set("trainer.val_check_interval", int(every), "eval_steps")
        draft.set("trainer.check_val_every_n_epoch", None, "eval_strategy: steps counts over epochs")
    return True


def _fill_optimizer(run: Run, draft: Draft) -> None:
    name = run.choice("optim", (*_ADAMW, *_OTHERS))
    settings: dict[str, Any] = {"lr": run.number("learning_rate"), "weight_decay": run.number("weight_decay")}
    if name in _ADAMW:
        path, more = _ADAMW[name]
        betas = [run.number("adam_beta1"), run.number("adam_beta2")]
        settings |= {"betas": betas, "eps": run.number("adam_epsilon"), **more}
    else:
        path = _OTHERS[name]
    draft.set("model.optimizer", part(path, **settings), "optim, learning_rate, weight_decay, adam_*")
    if settings["weight_decay"]:
        run.note("weight_decay", "transformers leaves biases and norms out of it; here it applies to all weights")
    shape = run.choice("lr_scheduler_type", tuple(_SCHEDULES))
    draft.set("model.lr_schedule", _SCHEDULES[shape], "lr_scheduler_type")
    draft.set("model.warmup_ratio", 0.0 if shape == "constant" else _warmup(run), "warmup_ratio, warmup_steps")


def _warmup(run: Run) -> float:
    """The share of the steps of the warm-up. A number of steps replaces a share, as in transformers."""
    warmup, ratio, steps = run.number("warmup_steps"), run.number("warmup_ratio"), run.whole("max_steps")
    if warmup < 1:
        share = warmup or ratio
    elif steps > 0:
        share = warmup / steps
    else:
        raise run.error(
            "warmup_steps",
            f"it is {warmup:g}, but the config has no max_steps; add it, or give a share of the run, below 1",
        )
    if not 0 <= share <= 1:
        raise run.error("warmup_steps", f"the warm-up would take {share:g} of the run; it must be a share from 0 to 1")
    return share


def _fill_batch(run: Run, draft: Draft, *, pairs: bool) -> None:
    each, parts = run.whole("per_device_train_batch_size"), run.whole("gradient_accumulation_steps")
    for key, value in (("per_device_train_batch_size", each), ("gradient_accumulation_steps", parts)):
        if value < 1:
            raise run.error(key, f"it is {value}; it must be at least 1")
    unit = "pairs" if pairs else "rows"
    origin = f"per_device_train_batch_size * gradient_accumulation_steps * devices = {each} * {parts} * {run.devices}"
    draft.set("data.batch_size", each * parts * run.devices, f"{unit}: {origin}")
    draft.set("model.micro_batch_rows", each * (2 if pairs else 1), "per_device_train_batch_size, in rows")
    run.note("devices", f"the step is that of {run.devices} device(s); --devices tells how many there were")
    order = run.choice("train_sampling_strategy", ("random", "sequential", "group_by_length"))
    draft.set("data.shuffle", order != "sequential", "train_sampling_strategy")
    by_length = order == "group_by_length" or run.flag("group_by_length")
    draft.set("data.group_by_length", by_length, "train_sampling_strategy")
    draft.set("data.drop_last", run.flag("dataloader_drop_last"), "dataloader_drop_last")
    draft.set("data.num_workers", run.whole("dataloader_num_workers"), "dataloader_num_workers")
    if run.value("data_seed") is not None:
        draft.set("data.seed", run.whole("data_seed"), "data_seed")
