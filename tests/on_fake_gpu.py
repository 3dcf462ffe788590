"""Computes log-probs and gradients on a device whose tensors have shapes but no values.

Whatever waits for a GPU needs a value: ``item``, ``tolist``, a condition, ``nonzero``, a boolean index. Here it raises
an error. Copies between the host and the device are counted. The backend stays registered for the rest of the process,
so a test runs this file as a program of its own.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parent))

from shared_rows import example, model

from halos_pl.batch import HostView, TokenBatch
from halos_pl.policy import head, prefix_sharing, shared_attention
from halos_pl.policy.scorer import Scorer


class Backend(_DummyBackendModule):
    """A backend with automatic mixed precision."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("fake", Backend())
DEVICE = torch.device("fake:0")


class Counted(TorchDispatchMode):
    """Counts operations, and copies between the host and the device.

    Attributes:
        operations: How often each operation ran.
        copies: How often a tensor was copied ``to`` the device and ``from`` it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.operations[str(func)] += 1
        if isinstance(out, Tensor):
            tensors = [each for each in args if isinstance(each, Tensor) and each.dim()]
            for source in {each.device for each in tensors} - {out.device}:
                self.copies["to" if source.type == "cpu" else "from"] += 1
        return out


def moved(tested: nn.Module) -> None:
    """Replaces all weights and buffers by ones on the device."""
    for module in tested.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                    tensors[name] = nn.Parameter(empty) if tensors is module._parameters else empty  # type: ignore[assignment]


def without_values(batch: TokenBatch, view: HostView, mode: FakeTensorMode) -> TokenBatch:
    """The batch on the device, with its view of the host, as a data loader hands it over."""

    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor).to(DEVICE)

    there = TokenBatch(
        prompts=[fake(ids) for ids in batch.prompts],
        completions=[fake(ids) for ids in batch.completions],
        prompt=fake(batch.prompt),
        labels=replace(batch.labels, **{f.name: fake(getattr(batch.labels, f.name)) for f in fields(batch.labels)}),
        loss=[None if mask is None else fake(mask) for mask in batch.loss or [None] * len(batch)],
    )
    there.labels._keep(batch.labels.host)
    vars(there)["_host"] = (there._versions, view.prompt, view.loss)
    return there


def main() -> None:
    """Runs a pass forward and backward, and prints what it took as JSON."""
    tested = model("mistral, window", torch.bfloat16)
    scorer = Scorer(tested, prefix_sharing="always")
    scorer._test = lambda: None  # type: ignore[method-assign]  # compares values, once
    head.LOGITS = 500  # several parts
    head._is_mixed = lambda tensor: tensor.dtype == torch.bfloat16
    prefix_sharing.choose = lambda query, value, dropout: shared_attention.varlen
    batch = example(0)
    batch.loss = [None, None, torch.arange(9) % 2 == 0, *[None] * 4]
    view = batch.host
    with FakeTensorMode() as mode:
        moved(tested)
        there = without_values(batch, view, mode)
        with Counted() as counted:
            logps = scorer(there)
            assert logps.device == DEVICE
            logps.sum().backward()
    assert all(p.grad is not None and p.grad.device == DEVICE for p in tested.parameters())
    kernels = {
        name: counted.operations[f"{name}.default"]
        for name in ("torch_attn._varlen_attn", "torch_attn._varlen_attn_backward")
    }
    products = counted.operations["aten.addmm.dtype_out"]
    print(json.dumps({"copies": counted.copies, "kernels": kernels, "products added in float32": products}))


if __name__ == "__main__":
    main()
