"""A callback that samples answers during a fit."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from halos_pl.policy.sampling import generate


class Samples(Callback):
    """Shows an answer after each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        ((sample,),) = generate(pl_module.policy, pl_module.tokenizer, ["question"], max_new_tokens=4, progress=False)
        print("answer:", repr(sample.text))
