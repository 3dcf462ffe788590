"""The count of useful arithmetic against torch's own, and the warning where half precision is imitated."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import binary_data, fit
from torch.utils.flop_counter import FlopCounterMode

import halos_pl.training.callbacks
import halos_pl.training.throughput
from halos_pl.batch import TokenBatch
from halos_pl.cli.main import main
from halos_pl.labels import Labels
from halos_pl.policy.architecture import decoder_and_head
from halos_pl.policy.loading import LoRASpec, ModelSpec, load_model
from halos_pl.training.throughput import StepClock, cost, matmul_speed, slow_half, step_flops, step_tokens

PROMPT, COMPLETION = 7, 5


def rows(prompts: int, each: int) -> TokenBatch:
    n = prompts * each
    return TokenBatch(
        prompts=[torch.arange(3, 3 + PROMPT) for _ in range(prompts)],
        completions=[torch.arange(20, 20 + COMPLETION) for _ in range(n)],
        prompt=torch.arange(prompts).repeat_interleave(each),
        labels=Labels(desirable=torch.ones(n, dtype=torch.bool)),
    )


@pytest.mark.parametrize("lora", [None, LoRASpec(r=4)], ids=["full", "lora"])
def test_flop_of_the_matrices_are_those_that_torch_counts(tiny_folder: Path, lora: LoRASpec | None) -> None:
    model: Any = load_model(ModelSpec(str(tiny_folder), lora=lora))
    decoder, head = decoder_and_head(model)
    batch = rows(1, 1)
    ids = torch.cat([batch.prompts[0], batch.completions[0]])[None]

    def counted(gradient: bool) -> int:
        # Products in which both sides are activations, those of attention, are counted apart.
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
            hidden = decoder(input_ids=ids).last_hidden_state[0, -COMPLETION:]
            result = head(hidden).sum()
            if gradient:
                result.backward()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op is torch.ops.aten.mm)

    model.enable_input_require_grads()
    matrices = replace(cost(model), pair=0.0)
    assert step_flops(matrices, batch, reference=0.0) == pytest.approx(counted(True), rel=1e-6)
    both = step_flops(matrices, batch, reference=1.0)
    assert both == pytest.approx(counted(True) + counted(False), rel=1e-6)


def test_a_prompt_is_counted_once_however_many_rows_share_it(tiny_folder: Path) -> None:
    found = cost(load_model(ModelSpec(str(tiny_folder))))
    shared, apart = rows(2, 3), rows(6, 1)
    assert step_tokens(apart) - step_tokens(shared) == 4 * PROMPT
    # Four prompts less, in a pass that has a gradient (3) and in that of the reference (1).
    prompts = 4 * (found.token * PROMPT * 4 + found.pair * PROMPT**2 / 2 * 4)
    assert step_flops(found, apart) - step_flops(found, shared) == pytest.approx(prompts)


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without instructions for bfloat16."""

    def speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
        return 1e9 if dtype == torch.bfloat16 else 1e11

    monkeypatch.setattr(halos_pl.training.throughput, "matmul_speed", speed)
    monkeypatch.setattr(halos_pl.training.callbacks, "matmul_speed", speed)


@pytest.mark.usefixtures("imitated")
@pytest.mark.parametrize("option", ["--trainer.precision=bf16-mixed", "--model.policy.dtype=bfloat16"])
def test_half_precision_that_the_cpu_imitates_is_warned_of(option: str, tiny_folder: Path, tmp_path: Path) -> None:
    data = binary_data(tmp_path / "data.jsonl", 4)
    with pytest.warns(UserWarning, match=r"bfloat16 .*1\.0 GFLOP/s .*100 .*float32"):
        main(fit(tiny_folder, "kto", data, tmp_path / "run", option))


@pytest.mark.usefixtures("imitated")
def test_float32_is_not_warned_of(tiny_folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    main(fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 4), tmp_path / "run"))
    assert not [w for w in recwarn if "GFLOP/s" in str(w.message)]


def test_a_slow_product_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven products that take seconds each would hold up every fit."""
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr(halos_pl.training.throughput.time, "perf_counter", lambda: float(next(now)))
    assert matmul_speed(torch.device("cpu"), torch.float32, size=8) == pytest.approx(2 * 8**3 / 5)
    assert next(now) == 10
    assert slow_half(torch.float32, 1.0) is None


def test_a_share_is_at_most_one_however_slow_the_product_was(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is busy when the fit begins measures too low a rate."""
    monkeypatch.setattr(halos_pl.training.callbacks, "matmul_speed", lambda *_: 1.0)
    main(fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 8), tmp_path / "run"))
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        shares = [float(row["of_matmul"]) for row in csv.DictReader(file)]
    assert len(shares) == 2
    assert all(0 < share <= 1 for share in shares)


def test_a_step_on_a_gpu_is_timed_until_the_gpu_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events as those of a queue that is still busy: their times are known once the last one has been waited for."""
    queue: list[Event] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.done = False

        def record(self, stream: object) -> None:
            queue.append(self)

        def synchronize(self) -> None:
            for event in queue[: queue.index(self) + 1]:
                event.done = True

        def elapsed_time(self, end: Event) -> float:
            assert self.done
            assert end.done
            return 250.0 * (queue.index(end) - queue.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = StepClock(torch.device("cuda"))
    clock.start()
    assert not any(event.done for event in queue)
    assert clock.seconds() == 0.25


@pytest.mark.parametrize("waits", [False, True])
def test_only_logged_steps_wait_for_the_device(
    waits: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []

    class Clock(StepClock):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.waits = waits

        def seconds(self) -> float:
            read.append(1.0)
            return 0.5

    monkeypatch.setattr(Clock, "_now", lambda self: 0.0)
    monkeypatch.setattr(halos_pl.training.callbacks, "StepClock", Clock)
    data = binary_data(tmp_path / "data.jsonl", rows=24)
    main(fit(tiny_folder, "kto", data, tmp_path / "run", "--trainer.log_every_n_steps=3"))
    assert len(read) == (3 if waits else 6)  # the first step, and steps 3 and 6
