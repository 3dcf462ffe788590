"""The share of a step's time that is useful arithmetic: the least FLOP that it needs, and the machine's speed.

Lightning's ``ThroughputMonitor`` has none of this. It divides a count that the module supplies by the time, and its
``measure_flops`` counts what a model executes, padding and recomputation included. It takes the machine's peak from a
table of data sheets without CPUs, and assumes steps of equal size.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halos_pl.batch import TokenBatch
from halos_pl.policy.architecture import attention_width, decoder_and_head, linear_layers
from halos_pl.policy.quantized_weights import matrix_size


@dataclass(frozen=True)
class Cost:
    """FLOP of a dense language model; a multiplication and an addition count as two.

    Attributes:
        token: FLOP per token in the layers: 2 for each weight of their matrices.
        trained: the part of ``token`` in trained weights.
        head: FLOP per token in the head.
        head_trained: the part of ``head`` in trained weights.
        pair: FLOP per pair of tokens that attend to each other, in all layers: 4 * layers * heads * width of a head.
    """

    token: float
    trained: float
    head: float
    head_trained: float
    pair: float


def cost(model: nn.Module, *, logps: bool = True) -> Cost:
    """The cost of ``model``, a causal language model or a peft model around one.

    Args:
        model: the model.
        logps: whether log-probs are computed; otherwise the head costs nothing.

    Raises:
        TypeError: for a mixture of experts, where a token passes through only some of the weights.
    """
    _, head = decoder_and_head(model)
    layers = linear_layers(model)
    return Cost(
        token=2.0 * sum(map(matrix_size, layers)),
        trained=2.0 * sum(matrix_size(layer) for layer in layers if layer.weight.requires_grad),
        head=2.0 * head.weight.numel() * logps,
        head_trained=2.0 * head.weight.numel() * head.weight.requires_grad * logps,
        pair=4.0 * attention_width(model),
    )


def step_tokens(batch: TokenBatch) -> int:
    """Number of tokens that a step has to process: each distinct prompt once, and every completion."""
    prompts = [len(batch.prompts[i]) for i in set(batch.host.prompt)]
    return sum(prompts) + sum(map(len, batch.completions))


def step_flops(model: Cost, batch: TokenBatch, *, reference: float = 1.0) -> float:
    """The least FLOP that an optimizer step needs, not counting the optimizer itself.

    A pass computes each distinct prompt token and each completion token once, and only completion tokens in the head.
    All rows need a forward pass; all but mismatched rows also a backward pass, which costs as much again for the
    activations and as much again for trained weights; the reference needs a forward pass.

    Args:
        model: cost of the policy; the reference is assumed to be of the same size.
        batch: n rows.
        reference: share of the rows whose reference log-probs are computed: 0 without one, or if all are stored.
    """
    prompt, mismatched = batch.host.prompt, batch.host.mismatched

    def tokens(rows: list[int], without: set[int]) -> tuple[float, float, float]:
        """Tokens, tokens in the head, and pairs that attend to each other; ``without`` are prompts computed before."""
        needed = {prompt[i] for i in rows}
        before = [len(batch.prompts[p]) for p in needed - without]
        each = [(len(batch.prompts[prompt[i]]), len(batch.completions[i])) for i in rows]
        completions = sum(c for _, c in each)
        seen = sum(p * p / 2 for p in before) + sum(p * c + c * c / 2 for p, c in each)
        return sum(before) + completions, completions, seen

    def forward(counts: tuple[float, float, float]) -> float:
        return model.token * counts[0] + model.head * counts[1] + model.pair * counts[2]

    train = [i for i in range(len(batch)) if not mismatched[i]]
    counts = tokens(train, set())
    gradient = 2 * forward(counts) + model.pair * counts[2]
    gradient += model.trained * counts[0] + model.head_trained * counts[1]
    of_mismatched = forward(tokens([i for i in range(len(batch)) if mismatched[i]], {prompt[i] for i in train}))
    return gradient + of_mismatched + reference * forward(tokens(list(range(len(batch))), set()))


class StepClock:
    """Measures the time of a step, with its optimizer step, on the device that computes it.

    A GPU is still busy when the call of the optimizer returns. Two events in its queue give the time between them;
    reading them waits until it has finished, so only some steps are read.

    Args:
        device: device that computes the steps.

    Attributes:
        waits: whether :meth:`seconds` waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.waits = device, device.type == "cuda"
        self._began: Any = self._now()

    def _now(self) -> Any:
        if not self.waits:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self) -> None:
        """Marks the beginning of a step."""
        self._began = self._now()

    def seconds(self) -> float:
        """The time since :meth:`start`, once everything queued so far has been computed."""
        end = self._now()
        if not self.waits:
            return float(end - self._began)
        end.synchronize()
        return float(self._began.elapsed_time(end)) / 1000


def matmul_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a product of two square matrices: the median of a few, or the first one if it takes a second."""
    products = 1
    if device.type == "cuda":
        size *= 4  # a small product would not fill it
        products = 20  # one product would be short compared with its launch and synchronization
    a = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(products):
            product = a @ a
        product.sum().item()  # waits for the device
        return (time.perf_counter() - start) / products

    times = [seconds()]
    while times[0] < 1 and (len(times) < 4 or (len(times) < 7 and sum(times) < 0.1)):
        times.append(seconds())
    return 2 * size**3 / statistics.median(times[2:] or times)


def slow_half(dtype: torch.dtype, speed: float) -> str | None:
    """Why this CPU should not compute in ``dtype``, whose matrix products run at ``speed``; None if it may.

    A CPU without instructions for bfloat16 or float16 emulates them, fifty times slower than float32.
    """
    single = matmul_speed(torch.device("cpu"), torch.float32) if dtype != torch.float32 else 0.0
    if speed > single / 2:
        return None
    return (
        f"matrix products in {str(dtype).removeprefix('torch.')} run at {speed / 1e9:.1f} GFLOP/s on this CPU and at"
        f" {single / 1e9:.0f} in float32: a fit will be faster with --trainer.precision 32-true and"
        f" --model.policy.dtype float32"
    )
