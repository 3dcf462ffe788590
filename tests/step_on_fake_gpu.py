"""Computes whole training steps on a device whose tensors have shapes but no values (see ``on_fake_gpu.py``).

Reading a value raises an error, except for ``tolist``, which is counted and gives ones. So does a tensor on the device
that is made of plain numbers, for a GPU would wait for them. Copies are counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from on_fake_gpu import DEVICE, Counted, moved
from shared_rows import V, model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from halos_pl.batch import TokenBatch
from halos_pl.labels import Labels
from halos_pl.objective.build import load_objective
from halos_pl.policy import head, prefix_sharing, shared_attention
from halos_pl.policy.scorer import Scorer
from halos_pl.training.callbacks import RunReport
from halos_pl.training.engine import StepEngine
from halos_pl.training.gradients import GradientWatch, clip_gradients
from halos_pl.training.step_log import StepFigures, outcomes_of

OBJECTIVES = Path(__file__).resolve().parents[1] / "experiments" / "objectives"


class Reads:
    """Counts the calls of ``tolist`` for tensors on the device.

    Attributes:
        count: Their number.
    """

    def __init__(self) -> None:
        self.count, self._tolist = 0, FakeTensor.tolist

    def __enter__(self) -> Reads:
        def tolist(tensor: Tensor) -> Any:
            if tensor.device.type != DEVICE.type:
                return self._tolist(tensor)
            self.count += 1
            numbers: Any = 1.0
            for size in reversed(tensor.shape):
                numbers = [numbers] * size
            return numbers

        FakeTensor.tolist = tolist  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        FakeTensor.tolist = self._tolist  # type: ignore[method-assign]


class Reference:
    """A frozen model as the source of log pi_ref."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @torch.no_grad()
    def logps(self, batch: TokenBatch) -> Tensor:
        return self._scorer(batch)  # type: ignore[no-any-return]


def scorer() -> Scorer:
    made = Scorer(model("mistral, window", torch.bfloat16), prefix_sharing="always")
    made._test = lambda: None  # type: ignore[method-assign]  # compares values, once
    return made


def rows(kind: str) -> TokenBatch:
    """Eight rows of three prompts: pairs, or rows with as many mismatched ones; some tokens carry no loss."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, V, (n,), generator=draw) for n in (7, 1, 4, 3, 1, 9, 2, 5, 4, 6, 8)]
    place = torch.arange(8)
    labels = (
        Labels(desirable=place < 4, mismatched=place >= 4)
        if kind == "kto"
        else Labels(desirable=place % 2 == 0, pair=place + 1 - 2 * (place % 2))
    )
    return TokenBatch(
        prompts=ids[:3],
        completions=ids[3:],
        prompt=torch.tensor([0, 0, 1, 1, 2, 2, 0, 0]),
        labels=labels,
        row_ids=[f"row {i}" for i in range(8)],
        loss=[None, None, torch.arange(9) % 2 == 0, *[None] * 5],
    )


def module_of(objective: Any, parameters: list[Tensor]) -> Any:
    """As much of a LightningModule as a step's figures and clipping use."""
    logged: dict[str, Tensor] = {}
    plugin = SimpleNamespace(main_params=lambda optimizer: parameters)
    return SimpleNamespace(
        objective=objective,
        device=DEVICE,
        global_rank=0,
        global_step=0,
        training=True,
        row_ids=[],
        figures={},
        logged=logged,
        log=lambda name, value, **_: logged.update({name: value}),
        log_dict=lambda values, **_: logged.update(values),
        trainer=SimpleNamespace(precision_plugin=plugin),
    )


def measured(kind: str, micro_batch_rows: int | None) -> dict[str, Any]:
    """What a step waits for and copies, from the batch on the host until the optimizer may step."""
    objective = load_objective(OBJECTIVES / f"{kind}.yaml")
    policy, frozen, batch = scorer(), scorer(), rows(kind)
    report = RunReport()
    with (
        patch.object(prefix_sharing, "choose", lambda query, value, dropout: shared_attention.varlen),
        patch.object(head, "_is_mixed", lambda tensor: tensor.dtype == torch.bfloat16),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        moved(policy.model)
        moved(frozen.model)
        parameters: list[Any] = list(policy.model.parameters())
        module = module_of(objective, parameters)
        engine = StepEngine(objective, policy, Reference(frozen), micro_batch_rows)
        optimizer = SimpleNamespace(param_groups=[{"lr": 1.0, "params": parameters}])
        with Counted() as moving:
            there = batch.to(DEVICE)
        part = there.select(torch.tensor([1, 3]).to(DEVICE), [1, 3])
        assert part.prompt.device == DEVICE
        assert part.on_host.completions[1] is batch.completions[3]  # the reference store reads it
        with Counted() as counted, Reads() as reads:
            parts = engine.step(there)
            step = StepFigures(module, parts)
            outcomes = outcomes_of(parts)
            before = reads.count
            clip_gradients(module, GradientWatch(), step, optimizer, 1.0, "norm")
            trainer: Any = SimpleNamespace(world_size=1, _logger_connector=SimpleNamespace(should_update_logs=True))
            report.on_train_batch_end(trainer, module, outcomes, there, 0)
    assert all(p.grad is not None for p in parameters)
    assert all(value.device.type == "cpu" for value in module.logged.values())
    return {
        "reads before clipping": before,
        "reads": reads.count,
        "copies of the batch": moving.copies,
        "copies of the step": counted.copies,
        "parts": len(parts),
    }


def main() -> None:
    """Prints the counts of all steps as JSON."""
    steps = [("kto", None), ("kto", 2), ("dpo", None), ("aot", None), ("aot", 2)]
    print(json.dumps({f"{kind} {size}": measured(kind, size) for kind, size in steps}))


if __name__ == "__main__":
    sys.exit(main())
