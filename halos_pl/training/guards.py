"""Refuses a module that its Trainer cannot run: before a model is loaded where possible, otherwise right after."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from halos_pl.objective.centring import needs_centring, senseless_clamp
from halos_pl.policy.adapters import check_sharding
from halos_pl.policy.liger import check_liger
from halos_pl.policy.limits import warn_of_ignored_losses
from halos_pl.policy.quantized_weights import has_quantized_weights
from halos_pl.policy.routing import check_router
from halos_pl.training.checks import check_float16, check_precision, check_sharded, check_trainer
from halos_pl.training.optimizer_checks import check_optimizer
from halos_pl.training.strategy import ShardedStrategy


def check_setup(module: Any, trainer: Any, stage: str) -> None:
    """Refuses settings of a Trainer that the module cannot run with.

    Args:
        module: the LightningModule.
        trainer: Lightning's Trainer.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        ValueError: naming the setting.
    """
    check_trainer(trainer)
    check_policy_settings(module, trainer)
    if module.models.spec and module.models.spec.liger:
        check_liger(trainer.strategy.root_device)
    if stage == "fit":
        check_fit(module, trainer)


def check_policy_settings(module: Any, trainer: Any) -> None:
    """Refuses an objective, an adapter or a quantization that does not work with the Trainer's precision or strategy.

    Raises:
        ValueError: naming the setting.
    """
    check_sharded(trainer, module.objective.needs)
    spec = module.models.spec
    check_precision(trainer.precision, quantized=spec is not None and spec.quantize is not None)
    if spec is not None and isinstance(trainer.strategy, ShardedStrategy):
        check_sharding(spec, half=str(trainer.precision).startswith("bf16"))


def check_loaded(module: Any) -> None:
    """Refuses a loaded policy that the Trainer's precision or the objective does not work with.

    Raises:
        ValueError: naming the setting.
        ModelError: if the objective needs a mixture of experts.
    """
    check_precision(module.trainer.precision, quantized=has_quantized_weights(module.policy))
    routing = module.objective.needs.routing
    if routing:
        check_router(module.policy)
    if module.trainer.state.fn == TrainerFn.FITTING:
        warn_of_ignored_losses(module.policy, router_loss=routing)


def check_fit(module: Any, trainer: Any) -> None:
    """Refuses settings that a model cannot be trained with.

    Raises:
        ValueError: naming the setting.
    """
    check_policy_settings(module, trainer)
    check_float16(trainer, module.models.dtype)
    for why in filter(None, (needs_centring(module.objective), senseless_clamp(module.objective))):
        rank_zero_warn(f"halos: {why}")
    lora = module.models.spec.lora if module.models.spec is not None else None
    vectors = lora is None or bool(lora.modules_to_save)
    folders = isinstance(trainer.strategy, ShardedStrategy)
    check_optimizer(
        module.make_optimizer,
        trainer.strategy.root_device,
        vectors=vectors,
        sharded=folders and not lora,
        folders=folders,
        closure=getattr(trainer.precision_plugin, "scaler", None) is None,
    )
