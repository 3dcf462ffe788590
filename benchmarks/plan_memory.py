"""Compares the memory that ``halos plan`` predicts with the peak of real runs on a CPU.

Each case is a run of ``halos fit`` in a process of its own: a random Llama of 29 million parameters, two steps. The
process first does the same with a tiny model, so that all libraries are loaded, and notes its resident memory when it
is about to load the model; the difference to the kernel's peak during training is the memory that depends on the model.
Pages of the model's file that no tensor uses do not count: weights that were quantized are read from them, and the
kernel may drop them. ``halos fit`` makes glibc keep freed memory, some of which lies in fragments; the plan does not
predict those, so it is compared with a run in which glibc returns freed memory, whose resident memory is what is in
use. The other run is shown beside it. ``fsdp2`` and ``ddp`` are steps on two ranks. The bfloat16 cases need a CPU with
instructions for it.

    python benchmarks/plan_memory.py                    # all cases
    python benchmarks/plan_memory.py kto dpo_lora       # some of them
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import logging
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 16384,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
#: Runs of several ranks, by strategy.
RANKS = ("fsdp2", "ddp")
#: Changes to the shape for the model of the rehearsal.
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
ROWS_OF_A_RANK = 6
_MMAP_THRESHOLD = -3  # from malloc.h
_TORCHAO = ["--model.policy.lora.r=16", "--model.policy.quantize.method=torchao"]
#: Options of each case, beside the common ones.
CASES: dict[str, list[str]] = {
    "kto": ["--objective=kto"],
    "kto_micro_2": ["--objective=kto", "--model.micro_batch_rows=2"],
    "kto_checkpointing": ["--objective=kto", "--model.policy.gradient_checkpointing=true"],
    "kto_bf16_true": ["--objective=kto", "--trainer.precision=bf16-true"],
    "kto_bf16_true_micro_2": ["--objective=kto", "--trainer.precision=bf16-true", "--model.micro_batch_rows=2"],
    "kto_bf16_mixed": ["--objective=kto", "--trainer.precision=bf16-mixed"],
    "kto_padded": ["--objective=kto", "--model.prefix_sharing=never"],
    "kto_rmsprop": ["--objective=kto", "--model.optimizer=torch.optim.RMSprop", "--model.optimizer.init_args.lr=1e-6"],
    "dpo": ["--objective=dpo"],
    "dpo_micro_2": ["--objective=dpo", "--model.micro_batch_rows=2"],
    "dpo_checkpointing_micro_2": [
        "--objective=dpo",
        "--model.micro_batch_rows=2",
        "--model.policy.gradient_checkpointing=true",
    ],
    "kto_lora": ["--objective=kto", "--model.policy.lora.r=16"],
    "dpo_lora": ["--objective=dpo", "--model.policy.lora.r=16"],
    "dpo_lora_checkpointing": [
        "--objective=dpo",
        "--model.policy.lora.r=16",
        "--model.policy.gradient_checkpointing=true",
    ],
    "kto_torchao_8": ["--objective=kto", *_TORCHAO, "--model.policy.quantize.bits=8"],
    "kto_torchao_4": ["--objective=kto", *_TORCHAO],
    "kto_torchao_4_checkpointing": ["--objective=kto", *_TORCHAO, "--model.policy.gradient_checkpointing=true"],
    "sft_no_reference": ["--objective=sft"],
}


def common(model: Path, folder: Path) -> list[str]:
    """Options of all cases.

    Args:
        model: folder of the model.
        folder: folder of the rows.
    """
    return [
        f"--model.policy.path={model}",
        f"--data.train={folder / 'rows.jsonl'}",
        "--data.batch_size=8",
        "--data.max_length=256",
        "--trainer.accelerator=cpu",
    ]


def prepare(folder: Path, layers: int = SHAPE["num_hidden_layers"]) -> None:
    """Writes a random model and a tiny one with their tokenizer, and pairs of long rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from halos_pl.testing import tiny_tokenizer

    for where, changes in ((folder, {"num_hidden_layers": layers}), (folder / "tiny", TINY)):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).save_pretrained(where)
        tiny_tokenizer().save_pretrained(where)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(16):
            row = {"prompt": f"Say {i:02}. " + "why " * 60, "chosen": "yes " * 60, "rejected": "not " * 60}
            file.write(json.dumps(row) + "\n")


def _resident(name: str) -> int:
    """The kernel's account of this process's memory in bytes: ``VmRSS`` now, ``VmHWM`` at the peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def _unused_bytes(model: Any, folder: Path) -> int:
    """Resident bytes of the model's mapped files beyond those of its parameters."""
    plain = [p for p in model.parameters() if not type(p).__module__.startswith("torchao")]
    addresses = [(p.data_ptr(), p.numel() * p.element_size()) for p in plain]
    unused, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in mapping.groups())
            inside = line.endswith(".safetensors") and str(folder) in line
        elif inside and line.startswith("Rss:"):
            unused += int(line.split()[1]) * 1024 - sum(size for at, size in addresses if start <= at < end)
    return max(0, unused)


def measure(rehearsal: list[str], words: list[str], folder: Path, keep: bool) -> int:
    """Runs a fit in this process: the peak of its resident memory in training, above that before the model is loaded.

    Args:
        rehearsal: words of the command for the tiny model.
        words: words of the command.
        folder: folder of the model.
        keep: whether glibc keeps freed memory, as ``halos fit`` makes it do; otherwise it returns freed blocks of 64 kB
            and more at once, so that resident memory is memory in use.
    """
    from halos_pl.cli.main import main
    from halos_pl.training import models as models_module
    from halos_pl.training import module as training_module

    models: Any = models_module
    module: Any = training_module
    start: list[int] = []
    unused: list[int] = []
    peak: list[int] = []
    load_model, trained_class = models.load_model, module.HALOModule
    on_train_start, on_train_end = trained_class.on_train_start, trained_class.on_train_end

    def noted(spec: Any, *arguments: Any, **options: Any) -> Any:
        if not start:
            gc.collect()
            start.append(_resident("VmRSS"))
        return load_model(spec, *arguments, **options)

    def started(trained: Any) -> None:
        unused.append(_unused_bytes(trained.policy, folder))
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
        on_train_start(trained)

    def ended(trained: Any) -> None:
        peak.append(_resident("VmHWM"))
        on_train_end(trained)

    if not keep:
        module.keep_freed_memory = lambda device: None
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
    main(rehearsal)
    models.load_model = noted
    trained_class.on_train_start, trained_class.on_train_end = started, ended
    main(words)
    return peak[0] - start[0] - unused[0]


def predict(words: list[str]) -> Any:
    """The plan of the same run."""
    from halos_pl.cli.run_settings import layout_of, parsed, settings_of
    from halos_pl.plan.memory import Planner
    from halos_pl.plan.plan import rows_of
    from halos_pl.plan.rows import from_data

    cli, _ = parsed(words)
    settings = settings_of(cli, None)
    cli.datamodule.connect(tokenizer=lambda: cli.model.tokenizer, needs=settings.needs)
    cli.datamodule.setup("fit")
    rows = rows_of(settings, *from_data(cli.datamodule, 100))
    return Planner(settings).memory(
        layout_of(cli.placement, devices=None, nodes=None, strategy=None, replicas=None),
        rows,
        gradient_checkpointing=settings.gradient_checkpointing,
        micro_batch_rows=settings.micro_batch_rows,
    )


def _child(task: Callable[..., Any], arguments: tuple[Any, ...], results: Any) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        logging.disable()
        try:
            results.put((True, task(*arguments)))
        except BaseException as error:  # also SystemExit of a command
            results.put((False, f"{error!r} {errors.getvalue()[-2000:]}"))


def apart(task: Callable[..., Any], *arguments: Any, start: str = "spawn") -> Any:
    """The result of a task in a process of its own.

    Args:
        task: function of this module.
        arguments: its arguments.
        start: ``fork`` if the process need not import anything; ``spawn`` if memory that this process has freed must
            not count.
    """
    context: Any = multiprocessing.get_context(start)
    results: Any = context.SimpleQueue()
    process = context.Process(target=_child, args=(task, arguments, results))
    process.start()
    done, result = results.get()
    process.join()
    if not done:
        raise RuntimeError(result)
    return result


def compare(name: str, folder: Path, *, kept: bool = True) -> tuple[Any, int, int | None]:
    """The plan of a case, and its measured bytes: in use, and with the freed memory that is kept unless not wanted."""

    def run(model: Path) -> list[str]:
        return [
            *("fit", *common(model, folder), *CASES[name], f"--run_dir={folder / 'runs' / name / model.name}"),
            *("--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            "--checkpoint.every_n_steps=1000",
        ]

    plan = apart(predict, [*common(folder, folder), *CASES[name]], start="fork")
    measured = [
        apart(measure, run(folder / "tiny"), run(folder), folder, keep)
        for keep in ((False, True) if kept else (False,))
    ]
    return plan, measured[0], measured[1] if kept else None


def compare_ranks(kind: str, ranks: int = 2) -> tuple[Any, float]:
    """The plan of a KTO step on several ranks, and the largest of their measured bytes in use (``sharding.py``).

    Args:
        kind: ``ddp`` or ``fsdp2``.
        ranks: number of processes.
    """
    import sharding

    with tempfile.TemporaryDirectory() as folder:
        sharding.make_models(folder, 512, 6)
        measured = sharding.in_ranks(sharding.measure_memory, ranks, kind, folder, ROWS_OF_A_RANK)
        memory = sharding.planned(folder, kind, ranks, ROWS_OF_A_RANK)
    return memory, max(step for _, _, step in measured) * 2**20


def main() -> None:
    """Prints a row per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join([*CASES, *RANKS])}")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="depth of the model")
    parser.add_argument("--only_used", action="store_true", help="skip the run that keeps freed memory")
    chosen = parser.parse_args()
    every = [*CASES, *RANKS]
    if unknown := set(chosen.cases) - {*every}:
        parser.error(f"no case is named {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    print("| case | predicted, MB | in use, MB | ratio | with kept memory, MB | predicted parts, MB |")
    print("|---|---|---|---|---|---|")

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), chosen.layers)
        for name in chosen.cases or every:
            kept: int | None = None
            if name in RANKS:
                plan, used = compare_ranks(name)
            else:
                plan, used, kept = compare(name, Path(folder), kept=not chosen.only_used)
            total = plan.total
            parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in plan.parts.items())
            print(
                f"| {name} | {total / 1e6:.0f} | {used / 1e6:.0f} | {total / used:.2f}"
                f" | {f'{kept / 1e6:.0f}' if kept else ''} | {parts} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
