# %% [markdown]
# # Train a model in memory
#
# This notebook aligns a model and tokenizer that you have already loaded, on rows that were never in a file. The cells
# run unchanged in Jupyter, VS Code or Colab. With the tiny random model below, they take seconds on a CPU.

# %%
import tempfile
from pathlib import Path

import torch
from lightning import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl import FeedbackDataModule, HALOModule, load_objective, testing

# Your own model, such as "HuggingFaceTB/SmolLM2-135M-Instruct", in place of:
folder = testing.tiny_model(Path(tempfile.mkdtemp()))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)

# %% [markdown]
# Rows may be a list of dicts, a `datasets.Dataset`, an Arrow table or a pandas frame, in any of the
# [schemas of files](../howto/data.md#schemas). A row with a `label` is binary feedback; `chosen` and `rejected` make a
# pair.

# %%
france, sum_ = "What is the capital of France?", "What is 2 + 2?"
rows = [
    {"prompt": france, "completion": "Paris.", "label": True},
    {"prompt": france, "completion": "I like trains.", "label": False},
    {"prompt": sum_, "completion": "4", "label": True},
    {"prompt": sum_, "completion": "Maybe 5?", "label": False},
]
data = FeedbackDataModule(train=rows, batch_size=4)

# %% [markdown]
# `HALOModule` takes the model itself, and either the four parts of a loss (`reward=`, `reference_point=`,
# `value_function=`, `feedback=`) or a complete objective in `extra_terms`.

# %%
module = HALOModule(
    policy=model,
    extra_terms=[load_objective("kto")],
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
)
module.tokenizer = tokenizer  # only needed if the model's folder has no tokenizer
before = model.get_input_embeddings().weight.detach().clone()
trainer = Trainer(
    max_epochs=3,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, datamodule=data)
for name in ("rewards/chosen", "rewards/rejected"):
    print(f"{name}: {trainer.callback_metrics[name]:.3f}")

# %% [markdown]
# The model that you passed in has been trained in place.

# %%
assert module.policy is model
assert not torch.equal(model.get_input_embeddings().weight, before)
model.save_pretrained(folder / "aligned")
tokenizer.save_pretrained(folder / "aligned")
