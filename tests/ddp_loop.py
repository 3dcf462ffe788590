"""One rank of a plain loop over two: prints how far its gradients are from those of one process.

Arguments: folder of the model, file of data, rank, port, objective, micro_batch_rows or 0.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from halos_pl import FeedbackDataModule, FrozenCopy, ModelSpec, Scorer, StepEngine, load_model, load_objective
from halos_pl.policy.loading import load_tokenizer

folder, file, rank, port, name, micro = sys.argv[1:]
torch.set_num_threads(1)
spec, objective = ModelSpec(folder), load_objective(name)
policy = Scorer(load_model(spec).train())
reference = FrozenCopy()
reference.bind(policy, spec)
data = FeedbackDataModule(train=file, batch_size=5)
data.connect(tokenizer=load_tokenizer(spec), needs=objective.needs)
data.setup("fit")
batch = next(iter(data.train_dataloader()))


def gradients(of: Any, rows: Any, **options: Any) -> list[torch.Tensor]:
    policy.zero_grad()
    StepEngine(objective, of, reference, int(micro) or None).step(rows, **options)
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


with torch.no_grad():  # away from the reference
    for p in policy.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
alone = gradients(policy, batch)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
dist.init_process_group("gloo", timeout=timedelta(seconds=40))
exchanges = 0


def counted(state, bucket):
    global exchanges
    exchanges += bucket.is_last()
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda done: done.value()[0])


ddp = DistributedDataParallel(policy)
ddp.register_comm_hook(None, counted)
mine = next(iter(data.train_dataloader()))  # this rank's share, three units or two
assert len(mine) < len(batch)
together = gradients(ddp, mine, defer_sync=ddp.no_sync)
off = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in zip(alone, together, strict=True))
Path(f"rank.{rank}").write_text(f"{off} {exchanges} {len(mine)}", encoding="utf-8")
