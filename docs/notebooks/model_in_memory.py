# %% [markdown]
# # Train a model in memory
#
# A model and a tokenizer that you have already loaded, and rows that never were in a file. The cells run as they are in
# Jupyter, VS Code or Colab; with the tiny random model below they take seconds on a CPU.

# %%
import tempfile
from pathlib import Path

import torch
from lightning import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl import FeedbackDataModule, HALOModule, load_objective, testing

folder = testing.tiny_model(Path(tempfile.mkdtemp()))  # use your own: "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)

# %% [markdown]
# Rows may be a list of dicts, a `datasets.Dataset` or a pandas frame, in any of the
# [formats that files have](../howto/data.md). A row with a `label` is binary feedback; `chosen` and `rejected` are a
# pair.

# %%
rows = [
    {"prompt": "What is the capital of France?", "completion": "Paris.", "label": True},
    {"prompt": "What is the capital of France?", "completion": "I like trains.", "label": False},
    {"prompt": "What is 2 + 2?", "completion": "4", "label": True},
    {"prompt": "What is 2 + 2?", "completion": "Maybe 5?", "label": False},
]
data = FeedbackDataModule(train=rows, batch_size=4)

# %% [markdown]
# `HALOModule` takes the model itself, and the four parts of a loss or an objective that is already put together.

# %%
module = HALOModule(
    policy=model,
    extra_terms=[load_objective("kto")],
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
)
module.tokenizer = tokenizer  # not needed where the model's folder holds one
before = model.get_input_embeddings().weight.detach().clone()
trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, datamodule=data)

# %% [markdown]
# The model that you passed in has been trained in place.

# %%
assert module.policy is model
assert not torch.equal(model.get_input_embeddings().weight, before)
model.save_pretrained(folder / "aligned")
tokenizer.save_pretrained(folder / "aligned")
print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items() if "rewards/" in name})
