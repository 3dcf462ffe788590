"""``halos plan``: what a run will take, from its config and the model's ``config.json``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

from halos_pl.cli.errors import RunError
from halos_pl.common.files import write

#: Cards for which the smallest layout is shown, unless others are named.
_CARDS = {"80 GB": 80e9, "141 GB": 141e9}


def plan(
    run: list[str],
    *,
    device: str | None = None,
    memory: float | None = None,
    devices: int | None = None,
    nodes: int | None = None,
    strategy: str | None = None,
    replicas: int | None = None,
    shape: str | None = None,
    length: int | None = None,
    format: Literal["text", "json"] = "text",
    json_file: str | None = None,
) -> None:
    """Show what a run will take: parameters, memory by part, tokens and FLOP of a step, the cards that it fits.

    Args:
        run: configs and options of halos fit: paper/llama_7b, --objective kto, --config FILE, --model.policy.lora.r 16.
        device: card that each device is, such as h100-80gb or h200-141gb.
        memory: memory of each device in GB (10^9 bytes), instead of a card.
        devices: number of devices per node; default: trainer.devices.
        nodes: number of nodes; default: trainer.num_nodes.
        strategy: auto and ddp put the whole model on each device, fsdp2 spreads it; default: trainer.strategy.
        replicas: number of groups of devices that each hold a whole model under fsdp2; default: trainer.strategy's.
        shape: YAML file with the model's config.json under config, for a model that is not at hand.
        length: tokens of each row, prompt and completion; default: counted in local data, otherwise data.max_length.
        format: text or json.
        json_file: file to write the plan to as JSON; default: none.
    """
    # Imported here, so that the help does not import torch.
    from halos_pl.cli.run_settings import cards_of, layout_of, parsed, rows_of_step, settings_of
    from halos_pl.plan.plan import make_plan
    from halos_pl.plan.report import lines

    for name, value in (("--devices", devices), ("--nodes", nodes), ("--replicas", replicas), ("--length", length)):
        if value is not None and value < 1:
            raise RunError(f"{name} is {value}; it must be at least 1")
    if memory is not None and not memory > 0:
        raise RunError(f"--memory is {memory:g}; it must be above 0")
    if device is not None and memory is not None:
        raise RunError(f"--device {device} and --memory {memory:g} both give the memory of a card; give only one")
    if json_file and Path(json_file).is_dir():
        raise RunError(f"--json_file {json_file} is a folder; name a file to write to")
    card = cards_of(device, memory)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    cli, notes = parsed(run)
    settings = settings_of(cli, shape)
    layout = layout_of(cli.placement, devices=devices, nodes=nodes, strategy=strategy, replicas=replicas)
    if layout.sharded and settings.unsharded:
        raise RunError(settings.unsharded)
    rows, why = rows_of_step(cli, settings, length)
    cards = dict([card]) if card else _CARDS
    result = make_plan(settings, rows, layout, card=card, cards=cards)
    notes += [why] if why else []
    content = json.dumps({**result.as_dict(), "notes": notes}, indent=2)
    print(content if format == "json" else "\n".join([*lines(result), *(f"note: {note}" for note in notes)]))
    if json_file:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        write(Path(json_file), content)
