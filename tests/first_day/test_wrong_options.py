"""A wrong input gets one line that names the option, its value and the remedy, before a model is loaded.

``README.md`` in this folder lists the kinds of inputs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from run_halos import ROOT, binary_data, config, fit, pair_data, write_jsonl

import halos_pl.training.models
from halos_pl.cli.commands import TOOLS
from halos_pl.cli.help_page import COMMANDS
from halos_pl.cli.main import main
from halos_pl.cli.words import at_home, refuse_repeated_keys
from halos_pl.common.wrong_value import misfit
from halos_pl.data import FeedbackDataModule
from halos_pl.objective.build import build_objective
from halos_pl.testing import tiny_tokenizer
from halos_pl.training.module import HALOModule
from halos_pl.training.run_folder import named_run_dir
from value_functions import Logistic

# Options as they stand in YAML, laid over a sound fit of KTO, and what the line names. What stands in a class that
# stands in a list is named by its place.
OPTIONS: dict[str, tuple[str, ...]] = {
    # -- plug-ins: another type, a typing error, nothing of that name --------------------------------------------------
    "model: {reflect_undesirable: mirror}": ("model.reflect_undesirable", "mirror", "true", "false"),
    "model: {value_function: {class_path: Logistic, init_args: {beta: -0.1}}}": ("model.value_function", "is -0.1"),
    "model: {value_function: {class_path: Logistic, init_args: {beta: abc}}}": ("init_args.beta is 'abc'", "a number"),
    "model: {value_function: {class_path: Logistic, init_args: {betta: 1}}}": ("betta", "did you mean beta?"),
    "model: {value_function: {class_path: Logistic, init_argz: {beta: 1}}}": ("init_argz", "init_args"),
    "model: {value_function: {init_args: {beta: x}}}": ("model.value_function.init_args.beta is 'x'",),
    "model: {value_function: mine.Nope}": ("model.value_function", "mine has no Nope", "Logistic"),
    "model: {value_function: mine.Softsing}": ("did you mean mine.Softsign?",),
    "model: {value_function: nope.Nope}": ("no module nope", "Logistic"),
    "model: {value_function: broken.Nope}": ("broken does not import", "SyntaxError"),
    "model: {value_function: Logistc}": ("model.value_function", "did you mean Logistic?"),
    "model: {value_function: 3}": ("model.value_function is 3", "Logistic"),
    "model: {value_function: Scaled}": ("model.value_function", "needs value_function, by"),
    "model: {value_function: value_functions.ValueFunction}": ("abstract", "forward"),
    "model: {value_function: Unfinished}": ("model.value_function", "abstract", "forward"),
    "model: {extra_terms: [EarlierTerm]}": ("model.extra_terms[0]", "abstract", "judge is now compute_loss"),
    "model: {value_function: torch.nn.Linear}": ("Linear does not extend ValueFunction",),
    "model: {value_function: {class_path: Scaled, init_args: {by: 2, value_function: Logistc}}}": (
        "model.value_function.init_args.value_function",
        "did you mean Logistic?",
    ),
    "model: {value_function: {class_path: Scaled, init_args: {by: 2, value_function: {class_path: Logistic, init_args:"
    " {beta: x}}}}}": ("model.value_function.init_args.value_function.init_args.beta is 'x'",),
    "model: {value_function: {class_path: Scaled, init_args: {by: 2, value_function: {class_path: Logistic, init_args:"
    " {beta: -1}}}}}": ("model.value_function.init_args.value_function: ", "beta is -1"),
    "model: {value_function: {class_path: Logistic, init_args: {beta: .inf}}}": ("init_args.beta is inf", "finite"),
    "model: {loss_offset: .nan}": ("model.loss_offset is nan", "finite"),
    "model: {extra_terms: [{class_path: NLL, init_args: {weight: .nan}}]}": ("extra_terms[0].init_args.weight is nan",),
    "model: {policy: {dtype: null}}": ("model.policy.dtype is null", "leave it out"),
    "model: {policy: {lora: {r: null}}}": ("model.policy.lora.r is null",),
    "model: {reward: LogRation}": ("model.reward", "did you mean LogRatio?"),
    "model: {reference_point: {class_path: RunningMean, init_args: {momentum: 2}}}": ("momentum", "decay"),
    "model: {reference_model: Nope}": ("model.reference_model", "FrozenCopy"),
    "model: {reference_model: OtherModel}": ("OtherModel", "needs model.path"),
    "model: {reference_model: {class_path: OtherModel, init_args: {model: {pth: x}}}}": ("model.pth", "model.path"),
    "model: {feedback: {class_path: Binary, init_args: {lambda_desirable: -1}}}": ("model.feedback", "is -1"),
    "model: {feedback: {class_path: Binary, init_args: {lambda_desirable: auto}}}": ("model.feedback", "rho"),
    "model: {feedback: {class_path: Binary, init_args: {lambda_desirable: aut, rho: 1}}}": ("lambda_desirable", "auto"),
    "model: {feedback: {class_path: Binary, init_args: {lambda_desirable: auto, rho: .nan}}}": ("rho", "nan"),
    "model: {feedback: {class_path: Binary, init_args: {denominator: row}}}": ("denominator is 'row'", "rows"),
    "model: {extra_terms: [Nope]}": ("model.extra_terms[0]", "NLL"),
    "model: {extra_terms: {class_path: NLL}}": ("model.extra_terms", "a list"),
    "model: {extra_terms: [{class_path: NLL, init_args: {weight: x}}]}": ("[0].init_args.weight is 'x'",),
    # -- the optimizer and the model -----------------------------------------------------------------------------------
    "model: {optimizer: {class_path: AdamW, init_args: {lr: fast}}}": ("model.optimizer.init_args.lr is 'fast'",),
    "model: {optimizer: {class_path: AdamW, init_args: {lr: -1}}}": ("model.optimizer", "-1"),
    "model: {optimizer: {class_path: AdamW, init_args: {betas: [0.9]}}}": ("betas is [0.9]", "a list of 2"),
    "model: {optimizer: {class_path: AdamW, init_args: {lr: .inf}}}": ("model.optimizer.init_args.lr is inf",),
    "model: {optimizer: {class_path: AdamW, init_args: {lr: .nan}}}": ("model.optimizer", "nan"),
    "model: {optimizer: {class_path: AdamW, init_args: {eps: .inf}}}": ("model.optimizer.init_args.eps is inf",),
    "model: {optimizer: {class_path: transformers.Adafactor, init_args: {lr: null}}}": ("Adafactor", "lr is null"),
    "model: {optimizer: {class_path: transformers.Adafactor, init_args: {lr: 0.1}}}": ("model.optimizer", "lr"),
    "model: {optimizer: {class_path: torch.optim.SparseAdam}}": ("SparseAdam", "dense gradients"),
    "model: {optimizer: torch.optim.Adafactor}\ntrainer: {strategy: fsdp2}": ("Adafactor", "AdamW", "ddp"),
    "model: {optimizer: {class_path: torch.optim.SGD, init_args: {fused: true}}}\ntrainer: {strategy: fsdp2}": (
        "SGD",
        "init_args.fused to false",
    ),
    "model: {optimizer: torchao.optim.AdamW8bit}\ntrainer: {strategy: fsdp2}": ("AdamW8bit", "AdamW, or", "ddp"),
    "model: {optimizer: torchao.optim.AdamW8bit, policy: {lora: {r: 4}}}\ntrainer: {strategy: fsdp2}": (
        "OptimState8bit",
        "choose AdamW",
    ),
    "model: {optimizer: {class_path: torch.optim.Muon}}": ("Muon", "model.policy.lora"),
    "model: {optimizer: Adamw}": ("model.optimizer", "did you mean AdamW?"),
    "model: {optimizer: torch.optim.Adamw}": ("did you mean torch.optim.AdamW?",),
    "model: {lr_schedule: cosin}": ("model.lr_schedule", "did you mean cosine?"),
    "model: {warmup_ratio: 2}": ("warmup_ratio is 2", "between 0 and 1"),
    "model: {micro_batch_rows: 0}": ("micro_batch_rows is 0",),
    "model: {prefix_sharing: alwayss}": ("model.prefix_sharing", "did you mean always?"),
    "model: {polcy: {path: x}}": ("model.polcy", "model.policy.path"),
    "model: {policy: {path: /no/such}}": ("model.policy.path", "/no/such"),
    "model: {policy: {path: rows.jsonl}}": ("model.policy.path", "rows.jsonl is a data file"),
    "model: {policy: {path: ''}}": ("model.policy.path is empty",),
    "model: {policy: {path: null}}": ("model.policy.path",),
    "model: {policy: {dtype: float61}}": ("model.policy.dtype", "did you mean float16?"),
    "model: {policy: {lora: {rank: 4}}}": ("model.policy.lora.rank", "has r, alpha"),
    "model: {policy: {lora: {r: 0}}}": ("model.policy.lora", "r 0"),
    "model: {policy: {lora: {target_modules: [q_proj, v_prj]}}}": ("target_modules", "'v_prj'", "v_proj"),
    "model: {policy: {lora: {target_modules: [layers]}}}": ("target_modules", "ModuleList", "q_proj"),
    "model: {policy: {lora: {r: x}}}": ("model.policy.lora.r is 'x'", "whole number"),
    "model: {policy: {lora: true}}": ("model.policy.lora is true", "target_modules"),
    # -- the Trainer ---------------------------------------------------------------------------------------------------
    "trainer: {precision: bf61}": ("trainer.precision", "did you mean bf16?", "bf16-mixed"),
    "trainer: {precision: 16-mixed}": ("trainer.precision is 16-mixed", "GPU", "bf16-mixed"),
    "trainer: {precision: 16, accelerator: auto}": ("trainer.precision is 16", "GPU", "bf16-mixed"),
    "trainer: {precision: 16-true}": ("trainer.precision is 16-true", "bf16-true"),
    "trainer: {accelerator: gpu}": ("trainer.accelerator is 'gpu'", "cpu"),
    "trainer: {accelerator: cuda, devices: 4}": ("trainer.accelerator is 'cuda'", "cpu"),
    "trainer: {accelerator: mps}": ("trainer.accelerator is 'mps'", "cpu"),
    "trainer: {accelerator: tpu}": ("trainer.accelerator is 'tpu'", "cpu"),
    "trainer: {accelerator: gpuu}": ("did you mean gpu?",),
    "trainer: {devices: cpu}": ("trainer.devices is 'cpu'",),
    "trainer: {devices: 0}": ("trainer.devices is 0",),
    "trainer: {num_nodes: 0}": ("trainer.num_nodes is 0",),
    "trainer: {num_nodes: 2}": ("trainer.num_nodes is 2", "MASTER_ADDR"),
    "trainer: {limit_train_batches: 0}": ("trainer.limit_train_batches is 0",),
    "trainer: {max_steps: 0}": ("trainer.max_steps is 0",),
    "trainer: {max_epochs: -1}": ("trainer.max_epochs",),
    "trainer: {strategy: ddpp}": ("trainer.strategy", "did you mean ddp?"),
    "trainer: {strategy: fsdp3}": ("trainer.strategy", "did you mean fsdp2?"),
    "trainer: {strategy: fsdp}": ("trainer.strategy fsdp", "fsdp2"),
    "trainer: {max_epochs: -5}": ("trainer.max_epochs is -5",),
    "trainer: {max_steps: many}": ("trainer.max_steps is 'many'", "a whole number"),
    "trainer: {max_time: {hour: 1}}": ("trainer.max_time is", "hours"),
    "trainer: {max_time: {hours: -1}}": ("trainer.max_time is", "negative"),
    "trainer: {max_time: soon}": ("trainer.max_time is 'soon'", "DD:HH:MM:SS"),
    "trainer: {gradient_clip_val: -1}": ("trainer.gradient_clip_val is -1",),
    "trainer: {gradient_clip_algorithm: nope}": ("gradient_clip_algorithm", "norm"),
    "trainer: {accumulate_grad_batches: 2}": ("trainer.accumulate_grad_batches is 2", "data.batch_size"),
    "trainer: {limit_train_batches: -1}": ("limit_train_batches", "-1"),
    "trainer: {val_check_interval: 1.5}": ("val_check_interval", "1.5"),
    "data: {validation: rows.jsonl}\ntrainer: {val_check_interval: 0}": ("trainer.val_check_interval is 0",),
    "data: {validation: rows.jsonl}\ntrainer: {val_check_interval: 100}": ("val_check_interval is 100", "3 steps"),
    "trainer: {strategy: ddp_spawn}": ("trainer.strategy ddp_spawn", "Use ddp"),
    "trainer: {callbacks: [LearningRateMonitor, BatchSizeFinder]}": ("trainer.callbacks[1]", "data.batch_size"),
    "trainer: {callbacks: LearningRateFinder}": ("trainer.callbacks: LearningRateFinder", "lr"),
    "trainer: {callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]}": (
        "trainer.callbacks[0]",
        "model.micro_batch_rows",
    ),
    "trainer: {callbacks: [{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}]}": (
        "trainer.callbacks[0]",
        "EMAWeightAveraging",
    ),
    "trainer: {callbacks: [BackboneFinetuning]}": ("trainer.callbacks[0]", "lora"),
    "trainer: {callbacks: [{class_path: ModelPruning, init_args: {pruning_fn: l1_unstructured}}]}": (
        "trainer.callbacks[0]",
        "halos export",
    ),
    "trainer: {callbacks: [{class_path: OnExceptionCheckpoint, init_args: {dirpath: x}}]}": (
        "trainer.callbacks[0]",
        "--ckpt_path last",
    ),
    "trainer: {callbacks: [{class_path: ThroughputMonitor, init_args: {batch_size_fn: lenn}}]}": (
        "trainer.callbacks[0].init_args.batch_size_fn is 'lenn'",
        "path of a function",
    ),
    "model: {policy: {dtype: bfloat16}}\ntrainer: {callbacks: [EMAWeightAveraging]}": (
        "EMAWeightAveraging",
        "model.policy.dtype float32",
    ),
    "trainer: {callbacks: [WeightAveraging], precision: bf16-true}": ("WeightAveraging", "bf16-mixed"),
    "trainer: {profiler: nope}": ("profiler", "simple"),
    "trainer: {callbacks: [EarlyStoping]}": ("trainer.callbacks[0]", "did you mean EarlyStopping?"),
    "trainer: {callbacks: [lightning.pytorch.callbacks.EarlyStoping]}": ("callbacks.EarlyStopping?",),
    "trainer: {callbacks: [EarlyStopping]}": ("trainer.callbacks[0]", "needs monitor"),
    "trainer: {callbacks: [5]}": ("trainer.callbacks[0] is 5",),
    "trainer: {callbacks: [{init_args: {monitor: loss}}]}": ("trainer.callbacks[0]", "class_path"),
    "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: loss, mode: mim}}]}": (
        "trainer.callbacks[0]",
        "mim",
    ),
    "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: loss, patience: x}}]}": (
        "trainer.callbacks[0].init_args.patience is 'x'",
    ),
    "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: loss}}]}": ("did you mean monitor?",),
    "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss}}]}": (
        "val_loss",
        "val/loss",
        "data.validation",
    ),
    "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: los}}]}": ("'los'", "loss"),
    "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: loss, save_top_k: -5}}]}": (
        "trainer.callbacks[0]",
        "save_top_k=-5",
    ),
    "trainer: {callbacks: [LearningRateMonitor], logger: false}": ("LearningRateMonitor", "trainer.logger"),
    "trainer: {logger: Nope}": ("trainer.logger", "CSVLogger"),
    "trainer: {logger: TensorBoardLoger}": ("did you mean TensorBoardLogger?",),
    "trainer: {logger: TensorBoardLogger}": ("TensorBoardLogger", "needs save_dir"),
    "trainer: {logger: [CometLogger]}": ("trainer.logger[0]", "comet"),
    # -- data, and the rest --------------------------------------------------------------------------------------------
    "data: {batch_size: 4.5}": ("data.batch_size is 4.5", "a whole number"),
    "data: {batch_size: 0}": ("data.batch_size is 0",),
    "data: {batchsize: 4}": ("data.batchsize", "data.batch_size"),
    "data: {max_length: 1}": ("data.max_length is 1",),
    "data: {num_workers: -1}": ("data.num_workers is -1",),
    "data: {on_bad_rows: skp}": ("data.on_bad_rows", "did you mean skip?"),
    "data: {keep_together: pair}": ("data.keep_together", "did you mean pairs?"),
    "data: {train: null}": ("data.train",),
    "data: {train: [5]}": ("data.train[0] is 5", "a text"),
    "data: {train: {path: 123}}": ("data.train", "123"),
    "data: {train: {pth: rows.jsonl}}": ("data.train", "pth", "path"),
    "data: {train: {path: rows.jsonl, schema: pairedd}}": ("schema", "paired"),
    "data: {train: nope.jsonl}": ("nope.jsonl",),
    "data: {train: empty}": ("empty",),
    "data: {train: bad.csv}": ("bad.csv:2", "'a', 'b'"),
    "data: {train: broken.jsonl}": ("broken.jsonl:1",),
    "data: {transforms: [Nope]}": ("data.transforms[0]", "FlipLabels"),
    "data: {transforms: [{class_path: FlipLabels, init_args: {share: x}}]}": ("[0].init_args.share is 'x'",),
    "data: {control_tokens: {good: x}}": ("data.control_tokens.good", "desirable"),
    "checkpoint: {keep: 0}": ("checkpoint.keep is 0",),
    "checkpoint: {every_n_steps: 0}": ("checkpoint.every_n_steps is 0",),
    "seed_everything: abc": ("seed_everything is 'abc'",),
    "seed_everything: -1": ("seed_everything is -1",),
    "run_dir: [a]": ("run_dir", "a text"),
    "run_dir: ''": ("run_dir",),
    "run_dir: ${HOME}/mine": ("run_dir", "${HOME}"),
    "run_dir: $RUNS/mine": ("run_dir", "$RUNS"),
    "trainer: {log_every_n_steps: 0}": ("trainer.log_every_n_steps is 0",),
    "trainer: {min_steps: 5, max_steps: 3}": ("trainer.min_steps is 5", "trainer.max_steps is 3"),
    "trainer: {min_epochs: 5, max_epochs: 3}": ("trainer.min_epochs is 5", "trainer.max_epochs is 3"),
    "model: {policy: {path: owner/there_is_none}}": ("owner/there_is_none", "local folder"),
    "run_dir: rows.jsonl": ("run_dir", "rows.jsonl"),
}
# The same on the command line.
WORDS: dict[str, tuple[str, ...]] = {
    "--model.value_function.beta=x": ("model.value_function.init_args.beta is 'x'",),
    "--model.value_function.init_args.beta=x": ("model.value_function.init_args.beta is 'x'",),
    "--model.value_function.gamma=1": ("gamma", "beta"),
    '--model.value_function={"class_path": "Logistic", "init_args": {"beta": "x"}}': ("init_args.beta is 'x'",),
    "--model.optimizer.lr=fast": ("model.optimizer.init_args.lr is 'fast'",),
    "--model.policy.lora={r: x}": ("model.policy.lora.r is 'x'",),
    "--trainer.callbacks+=EarlyStoping": ("trainer.callbacks", "did you mean EarlyStopping?"),
    "--trainer.callbacks+=EarlyStopping": ("trainer.callbacks", "needs monitor"),
    "--trainer.precison=bf16": ("--trainer.precison", "trainer.precision"),
    "--data.trian=x": ("--data.trian", "data.train"),
    "--data.batch_size": ("--data.batch_size",),
    "--model.value_function.help=Logistc": ("model.value_function.help", "did you mean Logistic?"),
    "--model.optimizer.help=torch.optim.Adamw": ("did you mean torch.optim.AdamW?",),
    "--trainer.callbacks.help=EarlyStoping": ("did you mean EarlyStopping?",),
    "--data.transforms.help=FlipLabel": ("did you mean FlipLabels?",),
    "--model.feedback.help=mine.Nope": ("mine has no Nope", "Binary"),
    "rows.jsonl": ("rows.jsonl is a data file", "--data.train"),
    "given.yaml": ("given.yaml is a config", "--config"),
    "kto": ("kto", "--objective NAME"),
    "--config=rows.jsonl": ("rows.jsonl:2", "--data.train"),
    "--data.train=given.yaml": ("given.yaml is a config", ".jsonl"),
    "--model.policy.path=given.yaml": ("model.policy.path", "given.yaml is a config"),
    "--config=nope.yaml": ("nope.yaml",),
    "--print_config=coments": ("coments", "it takes comments"),
    "--trainer.strategy=fsdp2 --trainer.strategy.replicas=x": ("trainer.strategy.init_args.replicas is 'x'", "whole"),
    "--trainer.strategy=fsdp2 --trainer.strategy.init_args.foo=0": ("init_args.foo is", "ShardedStrategy", "replicas"),
    '--trainer.strategy={"class_path":"ShardedStrategy","init_args":{"replica":2}}': (
        "init_args.replica is 2",
        "did you mean replicas?",
    ),
    "--trainer.strategy.replicas=2": ("--trainer.strategy ShardedStrategy --trainer.strategy.replicas 2", "'auto'"),
    "--trainer.strategy=fsdp2 --trainer.strategy.replicas=3": ("replicas is 3", "ranks, 1"),
    "--ckpt_path=last": ("last",),
    "--ckpt_path=nope.ckpt": ("nope.ckpt",),
}
# Kept in the default suite: one of each way through the code.
QUICK = (
    "model: {reflect_undesirable: mirror}",
    "model: {value_function: {class_path: Logistic, init_args: {beta: -0.1}}}",
    "model: {value_function: mine.Nope}",
    "model: {value_function: Scaled}",
    "model: {loss_offset: .nan}",
    "trainer: {max_time: {hour: 1}}",
    "model: {policy: {lora: {r: null}}}",
    "model: {optimizer: {class_path: AdamW, init_args: {lr: fast}}}",
    "model: {optimizer: {class_path: torch.optim.SparseAdam}}",
    "model: {optimizer: torch.optim.Adafactor}\ntrainer: {strategy: fsdp2}",
    "trainer: {precision: bf61}",
    "trainer: {accelerator: gpu}",
    "trainer: {accelerator: tpu}",
    "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss}}]}",
    "seed_everything: -1",
    "trainer: {callbacks: [LearningRateMonitor, BatchSizeFinder]}",
    "data: {validation: rows.jsonl}\ntrainer: {val_check_interval: 100}",
    "--model.value_function.beta=x",
    "--model.value_function.help=Logistc",
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with data, a plug-in and broken files; there a model is not loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def load_model(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(halos_pl.training.models, "load_model", load_model)
    binary_data(tmp_path / "rows.jsonl")
    (tmp_path / "mine.py").write_text(
        "from value_functions import ValueFunction\n"
        "class Softsign(ValueFunction):\n    def forward(self, u):\n        return u / (1 + u.abs())\n"
        "class Unfinished(ValueFunction):\n    pass\n"
        "from halos_pl import Objective\n"
        "class EarlierTerm(Objective):\n    def judge(self, rows, context):\n        return 0\n"
    )
    (tmp_path / "broken.py").write_text("def x(:\n")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "given.yaml").write_text("model: {reflect_undesirable: false}\n")
    (tmp_path / "study.yaml").write_text("arms: {}\n")
    return tmp_path


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says on stderr, but for what it has read of the data."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in (1, 2)
    read = ("train data", "validation data")
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(read)]
    assert len(lines) == 1, "\n".join(lines)
    return lines[0]


CASES = [*OPTIONS, *WORDS]


def key_paths(settings: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings in a file, those of groups included."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield f"{prefix}{key}"
            yield from key_paths(value, f"{prefix}{key}.")


@pytest.mark.parametrize("given", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_wrong_option_is_told_in_a_line(
    given: str, place: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = fit(tiny_folder, "kto", place / "rows.jsonl", place / "run")
    if given in OPTIONS:
        (place / "given.yaml").write_text(f"{given}\n", encoding="utf-8")
        # An option on the command line would override the file's.
        keys = list(key_paths(yaml.safe_load(given)))
        words = [word for word in words if word.partition("=")[0].removeprefix("--") not in keys]
        words.append("--config=given.yaml")
    else:
        words += given.split() if given.startswith("--trainer.strategy") else [given]
    if "torchao" in given:
        pytest.importorskip("torchao")
    line = refused(words, capfd)
    assert all(name in line for name in (OPTIONS | WORDS)[given]), line
    assert not list((place / "run").rglob("*"))


@pytest.mark.parametrize(
    "setting",
    ["trainer: {max_stepz: 3}", "trainer: {max_steps: x}", "model: {value_function: {init_args: {gama: 1}}}"],
)
def test_a_wrong_setting_of_a_config_is_told_with_its_line(
    setting: str, place: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    section, key = re.findall(r"\w+(?=: )", setting)[:2]
    (place / "own.yaml").write_text(f"# own\n{section}:\n\n  {setting.partition('{')[2].removesuffix('}')}\n")
    words = fit(tiny_folder, "kto", place / "rows.jsonl", place / "run")
    words = [word for word in words if not word.startswith(f"--{section}.{key}")]
    assert "own.yaml:4: " in refused([*words, "--config=own.yaml"], capfd)
    (place / "in").mkdir()
    shutil.move(place / "own.yaml", place / "in")
    assert " in/own.yaml:4: " in refused([*words, "--config=in/own.yaml"], capfd)
    # Two files, or the command line, may be at fault.
    (place / "own.yaml").write_text((place / "in/own.yaml").read_text())
    assert "own.yaml" not in refused([*words, "--config=own.yaml", "--config=in/own.yaml"], capfd)
    assert "own.yaml" not in refused([*words, "--config=own.yaml", f"--{section}.{key}=x"], capfd)


@pytest.mark.parametrize("word", ["--trainer.max_steps=x", "--seed_everything=-1", "--nope", "--checkpoint=last"])
def test_the_first_rank_of_a_machine_speaks_for_all(
    word: str, place: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the ranks have met; all end with the same status."""
    words = [*fit(tiny_folder, "kto", place / "rows.jsonl", place / "run"), "--ckpt_path=last", word]
    ends = []
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(SystemExit) as ended:
            main(words)
        ends.append((ended.value.code, len(capfd.readouterr().err.splitlines())))
    (status, lines), silent = ends
    assert status in (1, 2)
    assert lines == 1
    assert silent == (status, 0)


COMMANDS_WRONG: dict[str, tuple[str, ...]] = {
    "fitt": ("fitt", "did you mean fit?"),
    "nope": ("nope", "fit", "ablate"),
    "data": ("'data'", "data inspect"),
    "judge": ("'judge'", "judge agreement"),
    "judge --judge kto": ("'judge'", "judge agreement"),
    "judge agrement x.jsonl": ("'judge agrement'", "did you mean judge agreement?"),
    "fit --config empty": ("--config empty", "folder"),
    "check nope.yaml": ("nope.yaml",),
    "check rows.jsonl": ("rows.jsonl is a data file", "an objective's YAML file"),
    "check empty": ("empty is a folder", "an objective's YAML file"),
    "data inspect given.yaml": ("given.yaml is a config", ".jsonl"),
    "export given.yaml out": ("given.yaml is a config",),
    "sample rows.jsonl --prompts rows.jsonl": ("rows.jsonl is a data file",),
    "ablate rows.jsonl": ("rows.jsonl:2", "is a data file"),
    "ablate empty": ("empty is a folder",),
    "test rows.jsonl": ("rows.jsonl is a data file",),
    "cache rows.jsonl": ("rows.jsonl is a data file",),
    "data inspect study.yaml": ("study.yaml is a study", "halos ablate"),
    "evaluate study.yaml --prompts rows.jsonl": ("study.yaml is a study",),
    'check Logistic --init_args {"beta":"x"}': ("beta",),
    'check Logistic --init_args {"betta":1}': ("betta",),
    "export nope out": ("nope",),
    "export nope --folder out": ("--folder is no option", "halos export RUN FOLDER"),
    "export nope": ("folder", "halos export RUN FOLDER"),
    "export nope out --checkpoint best": ("nope is not the folder of a run", "checkpoint best"),
    "ablate nope.yaml": ("nope.yaml",),
    "data inspect nope.jsonl": ("nope.jsonl",),
    "sample nope --prompts rows.jsonl": ("nope",),
    "sample --prompts rows.jsonl": ("halos sample", "model"),
}


QUICK_COMMANDS = ("fitt", "nope", "check rows.jsonl")


@pytest.mark.parametrize(
    "command", [c if c in QUICK_COMMANDS else pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS_WRONG]
)
def test_a_wrong_command_is_told_in_a_line(command: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(command.split(), capfd)
    assert all(name in line for name in COMMANDS_WRONG[command]), line


@pytest.mark.parametrize("words", [["--limit={a: 2, b: 1, a: 3}"], ["--limit", '[{"b": {"a": 2, "a": 3}}]']])
def test_a_key_that_a_word_has_twice_is_named(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(["evaluate", "model", *words], capfd)
    assert "--limit" in line
    assert re.search(r"\ba twice", line), line


@pytest.mark.parametrize("words", [["--a={b: 1, c: {b: 2}}"], ["--a=[{b: 1}, {b: 2}]"], ["--text={b: [}"], ["{b", "x"]])
def test_words_without_such_a_key_pass(words: list[str]) -> None:
    refuse_repeated_keys(["evaluate", *words])


def test_the_home_folder_is_found_where_no_shell_looks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_run_dir("~/mine") == tmp_path / "mine"
    assert named_run_dir("a~/mine$") == Path("a~/mine$")
    assert at_home("--run_dir=~/mine") == f"--run_dir={tmp_path}/mine"
    assert [at_home(word) for word in ("~/mine", "--a=b~/c", "--a=~", "fit")] == ["~/mine", "--a=b~/c", "--a=~", "fit"]


def test_a_cause_that_rows_share_is_told_once(
    place: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A base model has no chat template, which every row of messages lacks; another fault is told beside it."""
    tiny_tokenizer(None).save_pretrained(tiny := place / "base")
    (tiny / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tiny / "chat_template.jinja").unlink(missing_ok=True)
    chat = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    rows: list[Any] = [chat | {"label": True} for _ in range(40)]
    rows[20] = {"prompt": 5, "completion": "a", "label": True}
    data = write_jsonl(place / "chat.jsonl", rows)
    with pytest.raises(SystemExit):
        main(fit(tiny, "kto", data, place / "run"))
    lines = [line for line in capfd.readouterr().err.splitlines() if "chat.jsonl" in line]
    assert len(lines) == 2
    assert "chat.jsonl:1, " in lines[0]
    assert "36 more rows" in lines[0]  # of 39
    assert "chat.jsonl:21" in lines[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trainer.val_check_interval=5"], ["val_check_interval"]),
        (["--trainer.check_val_every_n_epoch=2"], ["check_val_every_n_epoch"]),
        (["--trainer.limit_val_batches=3"], ["limit_val_batches"]),
    ],
)
def test_settings_of_a_validation_without_data_are_said(
    options: list[str], named: list[str], place: Path, tiny_folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        main(fit(tiny_folder, "kto", place / "rows.jsonl", place / "run", *options))
    [said] = [str(w.message) for w in recwarn if "no effect" in str(w.message)]
    assert all(name in said for name in [*named, "data.validation"])


def test_the_alternative_counts_that_a_value_is_most_like() -> None:
    """Without any command: a mapping in a list is neither told to be a number nor a text."""
    hint = list[dict[str, int]] | dict[str, float] | int | str | None
    assert str(misfit("a", hint, [{"x": 1}, {"y": "no"}])) == "a[1].y is 'no'; it takes a whole number"
    assert str(misfit("a", hint, {"z": "no"})) == "a.z is 'no'; it takes a number"
    assert misfit("a", hint, [{"x": 1}]) is None
    assert "a whole number or null" in str(misfit("a", int | None, "no"))


def test_what_python_is_given_is_answered_in_a_line(tiny_folder: Path) -> None:
    """A model for its settings, rows or a data set for a source: what is taken, and none of the rows."""
    datasets = pytest.importorskip("datasets")
    with pytest.raises(TypeError, match="ModelSpec") as error:
        HALOModule(policy=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    for part, what in ((Logistic, "the class Logistic"), ("Logistic", "a str")):
        with pytest.raises(TypeError, match=f"value_function is {what}"):
            build_objective(value_function=part)  # type: ignore[arg-type]
    rows = [{"prompt": "Say 0.", "completion": "0", "label": True}]
    splits = datasets.DatasetDict(a=datasets.Dataset.from_list(rows))
    wrong_sources: list[tuple[Any, str]] = [(rows[0], "list of rows"), (5, "is 5"), (splits, "data['a']")]
    for given, named in wrong_sources:
        with pytest.raises(ValueError, match=r"data\.train") as wrong:
            FeedbackDataModule(train=given)
        assert named in str(wrong.value)
        assert "Say 0." not in str(wrong.value)
        assert "\n" not in str(wrong.value)
    assert FeedbackDataModule(train=tiny_folder / "rows.jsonl").sources["train"][0].path.endswith("rows.jsonl")


def test_the_help_names_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert {*TOOLS, *LightningCLI.subcommands(), "check"} == set(COMMANDS)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, what in COMMANDS.items():
        assert f"  {name} " in "".join(line for line in lines if line.endswith(what))
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("group", ["judge", "data"])
def test_the_help_of_several_commands_names_each(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([group, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    below = [name for name in COMMANDS if name.startswith(f"{group} ")]
    assert [line.split("  ")[1] for line in lines if line.startswith("  ")] == below


def test_the_help_of_a_fit_begins_with_the_plug_ins(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    said = capsys.readouterr().out
    order = ["model.value_function", "model.reference_point", "model.reward", "model.feedback", "model.policy.path"]
    places = [said.index(f"\n  --{name} ") for name in [*order, "data.train", "trainer.accelerator"]]
    assert places == sorted(places)
    assert len(said[: places[0]].splitlines()) < 40
    assert "--trainer.max_steps" not in said[: places[-1]]


def test_comments_of_a_config_need_a_library_that_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """And with it they explain the settings."""
    words = ["fit", config("base"), config("objectives/kto"), "--print_config=comments"]
    try:
        import ruamel.yaml  # noqa: F401
    except ImportError:
        assert "ruamel.yaml" in refused(words, capfd)
        return
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capfd.readouterr().out
    assert ended.value.code == 0
    assert re.search(r"# .*examples per optimizer step.*\n(\s*#.*\n)*\s*batch_size: 32", said)


def test_pairs_for_a_loss_of_pairs(place: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "rows.jsonl:1" in refused(fit(tiny_folder, "dpo", place / "rows.jsonl", place / "run"), capfd)
    pair_data(place / "pairs.jsonl")
    no_objective = ["fit", config("base"), f"--model.policy.path={tiny_folder}", f"--data.train={place}/pairs.jsonl"]
    assert "no objective" in refused([*no_objective, f"--run_dir={place}/run"], capfd)
    assert (ROOT / "experiments").is_dir()
