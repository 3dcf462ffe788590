"""Optimizers: float32 master weights, the schedule, and the state that a resumed run takes from its checkpoint.

A weight of 8 or 11 bits of precision does not move if a step is smaller than half the gap to the next number; with
AdamW at a learning rate of 5e-6 nearly every step is. So the optimizer steps on float32 copies of such weights
(Micikevicius et al. 2018, "Mixed precision training", section 3.1), and the model gets the rounded values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from halos_pl.training.lost_updates import HALF, LostUpdates

#: Settings that choose an optimizer's implementation, not its result.
_IMPLEMENTATION = {"fused", "foreach", "capturable", "differentiable"}
#: Parts of names of settings that may change from or to 0 without changing which state the optimizer has.
_STATELESS = ("lr", "decay", "eps", "beta")
#: Shapes of the learning rate after warm-up, by their names in transformers.
LRShape = Literal["constant_with_warmup", "linear", "cosine"]


class Change(NamedTuple):
    """A setting of a resumed run that differs from the checkpoint's."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.before)} -> {shown(self.now)}"


def shown(value: Any) -> str:
    """A setting's value in a line of text."""
    if isinstance(value, float):  # 1.0 is a whole epoch for some settings, 1 a single step
        return f"{value:.1f}" if value.is_integer() and abs(value) < 1e6 else f"{value:g}"
    return "null" if value is None else str(value)


class MasterWeights:
    """Float32 copies of half-precision parameters: the optimizer steps on them, the model gets them rounded.

    They are part of the optimizer's state dict, so a run resumes exactly. They cost 4 bytes per parameter, and the
    optimizer's state and gradients are float32 as well: with AdamW 18 bytes per trained parameter instead of 8.

    Args:
        parameters: the trained parameters; float32 ones are used without a copy.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        #: The parameters to make the optimizer from.
        self.parameters: list[nn.Parameter] = []
        self._passes = 0  # over the batch, within the optimizer's step
        for parameter in parameters:
            master = parameter
            if parameter.dtype in HALF:
                master = nn.Parameter(parameter.detach().float())
                self.pairs.append((parameter, master))
            self.parameters.append(master)

    def attach(self, optimizer: Optimizer) -> None:
        """Makes ``optimizer`` round its weights into the model after each step, and save and load them."""
        optimizer.register_step_pre_hook(lambda *_: self._reset_passes())
        optimizer.register_step_post_hook(lambda *_: self._round())
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _reset_passes(self) -> None:
        self._passes = 0

    def begin_pass(self) -> None:
        """Must be called before each pass over the batch: LBFGS moves its weights between the passes of a step."""
        if self._passes:
            self._round()
        self._passes += 1

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Moves the gradients of the model's weights to the float32 copies, adding to theirs."""
        for parameter, master in self.pairs:
            if parameter.grad is not None:
                # Sums over micro-batches are float32, too.
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def _round(self) -> None:
        for parameter, master in self.pairs:
            parameter.copy_(master)

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "master_weights": [master.detach() for _, master in self.pairs]} if self.pairs else state

    @torch.no_grad()
    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        saved = state.get("master_weights")
        if not self.pairs:  # even if the checkpoint has copies, this run resumes from the rounded weights
            return
        if saved is None:  # the checkpoint has no copies; they start at the weights just loaded
            saved = [parameter.detach() for parameter, _ in self.pairs]
        for (_, master), value in zip(self.pairs, saved, strict=True):
            master.copy_(value)


def make_optimizer(make: Callable[[list[Any]], Optimizer], parameters: list[Any]) -> Any:
    """The optimizer that ``model.optimizer`` makes from the parameters.

    Raises:
        ValueError: if it rejects its settings.
    """
    try:
        return make(parameters)
    except (RuntimeError, TypeError, ValueError) as error:  # as with lr: null, or with fused: true on some devices
        raise ValueError(f"model.optimizer: {error}; check its init_args") from error


class Schedule(LambdaLR):
    """A schedule from ``transformers.get_scheduler`` that a resumed run may change.

    It takes only the number of steps from a checkpoint; peak and shape are those of this run.

    Args:
        optimizer: the optimizer whose learning rate it sets.
        name: name of the shape after warm-up.
        warmup_steps: number of optimizer steps during which the learning rate rises from 0.
        steps: number of optimizer steps of the run.
    """

    def __init__(self, optimizer: Optimizer, name: str, *, warmup_steps: int, steps: int) -> None:
        self.shape = {"lr_schedule": name, "warmup_steps": warmup_steps, "steps": steps}
        unit = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        shape: Any = get_scheduler(name, unit, warmup_steps, steps)
        super().__init__(optimizer, shape.lr_lambdas[0])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        pairs = zip(self.base_lrs, self.lr_lambdas, strict=True)
        self._last_lr = [base * shape(self.last_epoch) for base, shape in pairs]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        before = [float(lr) for lr in state_dict["_last_lr"]]
        now = [float(lr) for lr in self._last_lr]
        if before != now:
            shapes = state_dict.get("shape", {}), self.shape
            changed = [str(Change(k, shapes[0][k], v)) for k, v in self.shape.items() if shapes[0].get(k, v) != v]
            why = f" ({'; '.join(changed)}; warm-up and decay are shares of the whole run)" if changed else ""
            rank_zero_info(
                f"halos: the learning rate resumes at {now[0]:g} at optimizer step {self.last_epoch}, and was"
                f" {before[0]:g} in the checkpoint's run{why}"
            )


def _plain(value: Any) -> Any:
    """A hyper-parameter in comparable types that ``torch.load(weights_only=True)`` accepts."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _may_change(key: str, before: Any, now: Any) -> bool:
    if key in _IMPLEMENTATION:
        return True
    numbers = [value if isinstance(value, list) else [value] for value in (_plain(before), _plain(now))]
    if len(numbers[0]) != len(numbers[1]):
        return False
    stateless = any(word in key for word in _STATELESS)
    for one, other in zip(*numbers, strict=True):
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (one, other)):
            return False
        if (one == 0) != (other == 0) and not stateless:  # momentum needs sums that a run without it did not keep
            return False
    return True


def guard(optimizer: Optimizer, changed: Callable[[list[Change]], None]) -> None:
    """Makes a new ``optimizer`` keep its settings when it loads a state, and refuse a state that it cannot use.

    torch would take the settings from the checkpoint and ignore this run's. A state that cannot be used then raises a
    ValueError. Must be called before a schedule changes the learning rate.

    Args:
        optimizer: any optimizer. Some add state to their groups later, so only the present entries count as settings.
        changed: called with the settings that differ when a state is loaded.
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    settings = [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def save(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "class": name, "settings": settings}

    def load(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        before = state.get("class", name)
        if before != name:
            raise ValueError(
                f"model.optimizer is {name}, which cannot use the state of {before} in the checkpoint; resume with the"
                " latter, or start a new run"
            )
        before, now = (
            [len(group["params"]) for group in part] for part in (state["param_groups"], optimizer.param_groups)
        )
        if before != now:
            raise ValueError(
                f"model.optimizer has groups of {now} parameters, but the checkpoint has {before}; start a new run"
            )
        changes: dict[str, Change] = {}
        groups = []
        older = [_without_state(group) for group in state["param_groups"]]
        for mine, was, saved, group in zip(
            settings, state.get("settings", older), state["param_groups"], optimizer.param_groups, strict=True
        ):
            differing = [k for k in mine if k in was and was[k] != mine[k]]
            for key in differing:
                changes.setdefault(key, Change(f"model.optimizer.{key}", was[key], mine[key]))
            taken = {*differing, *({"initial_lr"} if "lr" in differing else ())}
            groups.append({**saved, **{key: group[key] for key in taken if key in group}})
        if refused := [change for key, change in changes.items() if not _may_change(key, *change[1:])]:
            raise ValueError(
                f"the checkpoint's {type(optimizer).__name__} cannot resume with {'; '.join(map(str, refused))}, which"
                " needs a different state. Resume with the checkpoint's value, or start a new run"
            )
        changed(list(changes.values()))
        return {**state, "param_groups": groups}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def run_load_hooks(optimizer: Any) -> None:
    """Makes an optimizer that replaces torch's ``load_state_dict`` run the hooks for it; those of bitsandbytes do not.

    A replacement that calls torch's method runs them twice, which changes nothing.
    """
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        return
    load = optimizer.load_state_dict

    def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(optimizer, state_dict) or state_dict
        load(state_dict, *args, **kwargs)

    optimizer.load_state_dict = load_state_dict


def _without_state(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of torch's optimizers in a group of an older checkpoint, which mixes settings and state."""
    lr = group.get("initial_lr", group["lr"])
    numbers = ("weight_decay", "betas", "eps", "momentum", "dampening", "alpha")
    switches = ("nesterov", "centered", "amsgrad", "maximize", "decoupled_weight_decay")
    return {"lr": _plain(lr)} | {key: _plain(group[key]) for key in (*numbers, *switches) if key in group}


def configured_optimizer(module: Any) -> tuple[MasterWeights, dict[str, Any]]:
    """The master weights of a run, and its optimizer and schedule in Lightning's form.

    Args:
        module: the LightningModule.

    Raises:
        ValueError: if the optimizer rejects its settings, or nothing limits the number of steps.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    masters = MasterWeights(trained if module.master_weights else [])
    stepped = masters.parameters or trained
    # Fused optimizers take no group with sharded and other parameters; those of the objective and of the scalar head
    # are never sharded.
    heads = module.scorer.scalar_head.parameters() if module.scorer.scalar_head is not None else ()
    whole = {id(p) for p in (*module.objective.parameters(), *heads)}
    groups: list[list[Any]] = [[], []]
    for parameter, its_copy in zip(trained, stepped, strict=True):
        groups[id(parameter) not in whole].append(its_copy)
    parts = [{"params": group} for group in groups if group]
    optimizer = make_optimizer(module.make_optimizer, parts if len(parts) > 1 else stepped)
    guard(optimizer, module.record.add)
    masters.attach(optimizer)
    run_load_hooks(optimizer)
    LostUpdates(optimizer, "Set model.master_weights to true")
    # Otherwise Lightning assumes that a fused optimizer unscales its gradients itself, and refuses to clip them.
    optimizer._step_supports_amp_scaling = False
    steps = module.trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ValueError(
            f"model.lr_schedule {module.lr_schedule} and model.warmup_ratio are shares of a run's length, but nothing"
            " limits its steps; set trainer.max_steps or trainer.max_epochs (trainer.max_time may still end it sooner)"
        )
    warmup = round(module.warmup_ratio * steps)
    schedule = Schedule(optimizer, module.lr_schedule, warmup_steps=warmup, steps=int(steps))
    return masters, {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
