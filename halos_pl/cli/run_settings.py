"""The settings of a run that ``halos plan`` needs, from the options of ``halos fit``. No Trainer is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from halos_pl.batch import Needs
from halos_pl.cli.errors import RunError
from halos_pl.cli.lightning_cli import HalosCLI
from halos_pl.objective.build import PARTS
from halos_pl.plan.cards import memory_of
from halos_pl.plan.fake import meta_model
from halos_pl.plan.memory import Layout
from halos_pl.plan.plan import assumed_rows, rows_of
from halos_pl.plan.rows import Rows, from_data
from halos_pl.plan.run import Settings
from halos_pl.plan.shapes import read_shape, shape_of
from halos_pl.policy.adapters import check_sharding
from halos_pl.policy.liger import check_liger
from halos_pl.policy.quantization import check_groups
from halos_pl.policy.reference import OtherModel
from halos_pl.policy.spec import ModelError, ModelSpec
from halos_pl.training.checks import check_precision, check_sharded_needs, refused_strategy

_DEFAULT = "kto"
#: Maximum size of training data that are counted, and number of steps that are read.
_MOST_BYTES, _MOST_STEPS = 50e6, 200


class Placement(NamedTuple):
    """The Trainer's settings of hardware and precision."""

    accelerator: str
    devices: Any
    num_nodes: int
    strategy: Any
    precision: str


class PlanCLI(HalosCLI):
    """Parses the options of a fit and builds module and DataModule, on any machine.

    Attributes:
        placement: the Trainer's settings of hardware and precision, which this machine need not have.
    """

    placement: Placement

    def before_instantiate_classes(self) -> None:
        trainer = self.config.trainer
        self.placement = Placement(
            str(trainer.accelerator), trainer.devices, trainer.num_nodes, trainer.strategy, str(trainer.precision)
        )
        trainer.accelerator, trainer.devices, trainer.num_nodes, trainer.strategy = "cpu", 1, 1, "auto"
        trainer.precision, trainer.logger, trainer.callbacks = None, False, None
        if not any(self.config.model.get(part) for part in PARTS):
            raise NoObjectiveError("no objective")
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


class NoObjectiveError(RunError):
    """The config has no objective."""


def parsed(words: list[str]) -> tuple[PlanCLI, list[str]]:
    """The parsed options of a fit, and what was assumed."""
    try:
        return PlanCLI(words, run=False), []
    except NoObjectiveError:
        note = f"the config has no objective; planned for {_DEFAULT}, choose another with --objective"
        return PlanCLI([*words, f"--objective={_DEFAULT}"], run=False), [note]


def cards_of(device: str | None, memory: float | None) -> tuple[str, float] | None:
    """Name and bytes of the card that was asked for.

    Raises:
        PlanError: if there is no such card.
    """
    if device is not None:
        return device.lower(), memory_of(device)
    return None if memory is None else (f"{memory:g} GB", memory * 1e9)


def settings_of(cli: PlanCLI, shape: str | None) -> Settings:
    """The settings of a run.

    Args:
        cli: parsed options.
        shape: file with the shape of the policy; None to look it up.

    Raises:
        ModelError: if the model is neither local nor shipped nor reachable, or a fit refuses its settings.
        PlanError: if the shape cannot be used.
    """
    module = cli.model
    models, spec = module.models, module.models.spec
    assert isinstance(spec, ModelSpec)
    check_precision(cli.placement.precision, quantized=spec.quantize is not None)
    if spec.liger and cli.placement.accelerator in ("cpu", "mps"):  # otherwise a GPU is assumed
        check_liger(torch.device(cli.placement.accelerator))
    reference = models.reference_model
    other = reference.spec if isinstance(reference, OtherModel) else None
    policy = read_shape(shape) if shape else shape_of(spec)
    if spec.quantize is not None:
        check_groups(meta_model(policy.config), spec.quantize)
    return Settings(
        policy=policy,
        dtype=spec.dtype,
        precision=cli.placement.precision,
        lora=spec.lora,
        gradient_checkpointing=spec.gradient_checkpointing,
        reference_model=reference,
        other=shape_of(other) if other else None,
        other_dtype=other.dtype if other else spec.dtype,
        stored=models.stored,
        needs=module.objective.needs,
        shares_prefixes=models.prefix_sharing != "never" and spec.attn_implementation == "sdpa",
        micro_batch_rows=module.micro_batch_rows,
        batch_size=cli.datamodule.batch_size,
        make_optimizer=module.make_optimizer,
        master_weights=module.master_weights,
        quantize=spec.quantize,
        unsharded=_unsharded(spec, module.objective.needs, cli.placement.precision),
    )


def _unsharded(spec: ModelSpec, needs: Needs, precision: str) -> str:
    """Why ``fsdp2`` refuses an objective, an adapter or a quantization; empty if it does not."""
    try:
        check_sharded_needs(needs)
        check_sharding(spec, half=precision.startswith("bf16"))
    except ValueError as error:
        return str(error)
    return ""


def _number_of(devices: Any) -> int:
    """The number of devices that Lightning takes for ``trainer.devices``; 1 where it depends on the machine."""
    if isinstance(devices, str):
        parts = [part.strip() for part in devices.split(",") if part.strip()]
        if "," in devices:
            return len(parts)
        devices = int(devices) if devices.strip().lstrip("-").isdigit() else -1  # auto
    if isinstance(devices, int):
        return 1 if devices == -1 else devices
    return len(devices)


def layout_of(
    placement: Placement, *, devices: int | None, nodes: int | None, strategy: str | None, replicas: int | None
) -> Layout:
    """The devices that are planned for: those of the options, otherwise those of the Trainer.

    Raises:
        PlanError: if the replicas do not divide the devices.
        RunError: if the strategy is not supported.
    """
    if devices is None:
        devices = _number_of(placement.devices)
    nodes = nodes or placement.num_nodes
    for name, number, own in (("devices", devices, placement.devices), ("num_nodes", nodes, nodes)):
        if number < 1:
            raise RunError(f"trainer.{name} is {own}; it must be at least 1")
    cards = devices * nodes
    settings: Any = {}
    if strategy is None:
        own = placement.strategy
        strategy = own if isinstance(own, str) else str(own.get("class_path", "")).rpartition(".")[2]
        settings = {} if isinstance(own, str) else own.get("init_args") or {}
        strategy = {"ShardedStrategy": "fsdp2", "DDPStrategy": "ddp", "SingleDeviceStrategy": "auto"}.get(
            strategy, strategy
        )
    if why := refused_strategy(strategy):
        raise RunError(why)
    if strategy not in ("auto", "fsdp2") and not strategy.startswith("ddp"):
        raise RunError(f"trainer.strategy {strategy} is not known; use auto, ddp or fsdp2")
    return Layout(
        cards,
        sharded=strategy == "fsdp2",
        replicas=replicas or settings.get("replicas") or 1,
        cuda=placement.accelerator != "cpu",
        whole_reference=settings.get("reference") == "whole",
        reshard=settings.get("reshard_after_forward") is not False,
    )


def rows_of_step(cli: PlanCLI, settings: Settings, length: int | None) -> tuple[Rows, str]:
    """The rows of a step: those of small local training data, otherwise assumed ones.

    Args:
        cli: parsed options.
        settings: settings of the run.
        length: tokens of each row; None to count them.

    Returns:
        The rows, and a note on why they could not be counted.

    Raises:
        DataError: if the data are faulty.
    """
    data = cli.datamodule
    if length is not None:
        return assumed_rows(settings, length, "--length"), ""
    assumed = assumed_rows(settings, data.max_length, "data.max_length, the most")
    sources = [Path(source.path) for source in data.sources["train"]]
    if not sources or not all(path.is_file() for path in sources):
        return assumed, ""
    if (size := sum(path.stat().st_size for path in sources)) > _MOST_BYTES:
        return assumed, f"the training data have {size / 1e6:,.0f} MB and are not counted; give --length TOKENS"
    data.sources["validation"] = []
    data.connect(tokenizer=lambda: cli.model.tokenizer, needs=settings.needs)
    try:
        data.setup("fit")
        batches, steps = from_data(data, _MOST_STEPS)
    except ModelError as error:
        return assumed, f"the training data are not counted, as the model has no tokenizer here: {error}"
    return rows_of(settings, batches, steps), ""
