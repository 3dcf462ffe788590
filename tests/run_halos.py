"""Runs of ``halos`` for the tests: in this process, or in processes of their own that may be killed."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = sorted(path.stem for path in (ROOT / "experiments" / "objectives").glob("*.yaml"))
# Wall-clock is no property of a run's results.
UNEQUAL = ("rows/s", "tokens/s", "TFLOP/s", "of_matmul")

# A process that has imported everything and computed nothing; each run is forked from it in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_COMMANDS = ("lightning_cli", "ablate", "check", "export", "inspect")
_CONTEXT.set_forkserver_preload(["without_extras", *(f"halos_pl.cli.{name}" for name in _COMMANDS)])


def line_of(path: Path, text: str) -> int:
    """The number of the first line of a file that contains a text."""
    return next(i for i, line in enumerate(path.read_text().splitlines(), start=1) if text in line)


def _start() -> None:
    """Starts that process where it is not there yet; it finds ``without_extras`` on its path."""
    here = str(Path(__file__).parent)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))):
        ensure_running()


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    """Write each row as a line of JSON; the path, as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(name: str) -> str:
    """The option that names a file below ``experiments/``."""
    return f"--config={ROOT}/experiments/{name}.yaml"


def fit(model: Path, objective: str, data: Path | str, run: Path, *options: str) -> list[str]:
    """The words of a quiet fit on the CPU; ``options`` come last and win."""
    return [
        "fit",
        config("base"),
        config(f"objectives/{objective}"),
        f"--model.policy.path={model}",
        f"--data.train={data}",
        f"--run_dir={run}",
        "--data.batch_size=4",
        "--model.optimizer.init_args.lr=1e-3",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *options,
    ]


def binary_data(path: Path, rows: int = 12, *, seed: int = 0) -> Path:
    """Rows of binary feedback with prompts and completions of several lengths, both labels."""
    draw = random.Random(seed)
    lines = [
        {
            "prompt": f"question {i}" + " why" * draw.randrange(4),
            "completion": f"answer {draw.randrange(1000)}" + " so" * draw.randrange(6),
            "label": i % 3 != 0,
        }
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pair_data(path: Path, pairs: int = 6, *, gold: bool = False, seed: int = 0) -> Path:
    """Pairs of several lengths, with gold answers or without."""
    draw = random.Random(seed)

    def completion() -> str:
        return f"answer {draw.randrange(1000)}" + " so" * draw.randrange(6)

    lines = [
        {"prompt": f"question {i}" + " why" * draw.randrange(4), "chosen": completion(), "rejected": completion()}
        for i in range(pairs)
    ]
    lines = [line | {"reference": f"rather {completion()}"} for line in lines] if gold else lines
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_data(folder: Path, *, seed: int = 3) -> dict[str, list[str]]:
    """Files of data for each kind of example that a loss takes.

    12 prompts with one to three rows each, of both labels or of one, and two pairs for each prompt. ``scored`` and
    ``scored_pairs`` are the same with scores, some of them tied, and not always higher for what is preferred.
    ``triples`` are the pairs with gold answers.
    """
    draw = random.Random(seed)

    def completion() -> str:
        words = ["yes", "no", "so", "wait", "bread", "I cannot", "42", "an hour", "duck"]
        return " ".join(draw.choice(words) for _ in range(draw.randrange(1, 6)))

    prompts = [f"question {i}" + " why" * draw.randrange(4) for i in range(12)]
    pairs = [{"prompt": p, "chosen": completion(), "rejected": completion()} for p in prompts * 2]
    labels = [(True, False, False), (True, True, False), (False, True), (True, True)]
    rows = [
        {"prompt": p, "completion": completion(), "label": label}
        for i, p in enumerate(prompts)
        for label in labels[i % 4]
    ]
    quarters = random.Random(seed + 1)
    scored = [row | {"score": quarters.randrange(-6, 7) / 4} for row in rows]
    sides = [{f"{side}_score": quarters.randrange(-12, 13) / 4 for side in ("chosen", "rejected")} for _ in pairs]
    scored_pairs = [pair | side for pair, side in zip(pairs, sides, strict=True)]
    triples = [pair | {"reference": f"rather {completion()}"} for pair in pairs]
    files = {}
    written = {"pairs": pairs, "rows": rows, "scored": scored, "scored_pairs": scored_pairs, "triples": triples}
    for name, lines in written.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    both = [str(files["pairs"]), str(files["rows"])]
    own = {name: [str(files[name])] for name in ("scored", "scored_pairs", "triples")}
    return {"pairs": both[:1], "rows": both, "groups": both[1:]} | own


#: Examples of a step over each kind of those files.
EXAMPLES = {"pairs": 4, "rows": 6, "groups": 4, "scored": 4, "scored_pairs": 4, "triples": 4}


def metrics(run: Path) -> list[dict[str, str]]:
    """The lines of ``metrics.csv``: what was logged, as written, but for what depends on the clock."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v and k not in UNEQUAL} for row in csv.DictReader(file)]


def _no_picture(*_: Any, **__: Any) -> Path:
    """Instead of a run's plots."""
    return Path("none.png")


def _matmul_speed(*_: Any, **__: Any) -> float:
    """Instead of a measurement of the machine."""
    return 1e11


@cache
def _provenance_of(folder: str) -> dict[str, Any]:
    from halos_pl.provenance import provenance

    return provenance()


#: Parts of a fit that take most of a short one's time, and what the tests do instead. Each part has its own tests:
#: the plots in test_cli, the measurement in test_throughput, the revisions in test_foreign_folder. Only a machine that
#: loses its power needs the last one, which makes the disk write a checkpoint at once.
SHORTCUTS: dict[str, Any] = {
    "halos_pl.training.callbacks.plot_training": _no_picture,
    "halos_pl.training.callbacks.plot_value_function": _no_picture,
    "halos_pl.training.callbacks.matmul_speed": _matmul_speed,
    "halos_pl.training.throughput.matmul_speed": _matmul_speed,
    "halos_pl.training.callbacks.provenance": lambda: _provenance_of(os.getcwd()),
    "halos_pl.training.checkpoint_files.sync": lambda _: None,
}


def _target(words: list[str], out: str, folder: str, env: dict[str, str]) -> None:
    import torch

    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["halos"]
    os.environ.update(env)
    os.chdir(folder)
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the tests run in the background or under nohup
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    # Else the data loader's workers would be started by a server of their own, which outlives a kill.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    from halos_pl.cli.main import main

    for name, instead in SHORTCUTS.items():
        patch(name, instead).start()
    main(words)


class Ended(str):
    """The output of a process; ``status`` is its exit status, negative for a signal."""

    status: int

    @classmethod
    def of(cls, output: str, status: int) -> Ended:
        """A process that has ended."""
        ended = cls(output)
        ended.status = status
        return ended


def in_processes(
    function: Callable[..., None], arguments: Sequence[tuple[Any, ...]], timeout: float, output: Path | None = None
) -> list[int]:
    """Calls ``function`` with each of ``arguments`` in processes that run at the same time; their exit statuses.

    Args:
        function: function of a module.
        arguments: the arguments of each call.
        timeout: seconds after which the test fails and processes that still run are killed.
        output: file to show then.
    """
    _start()
    processes: list[Any] = [_CONTEXT.Process(target=function, args=each) for each in arguments]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
            shown = output.read_text() if output else ""
            assert process.exitcode is not None, f"still running after {timeout} s:\n{shown}"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def run_all(
    runs: Sequence[list[str]], folder: Path, env: Sequence[Mapping[str, str]] = (), timeout: float = 120
) -> list[Ended]:
    """Runs each of ``runs`` at the same time in a process of its own, in ``folder``."""
    first = len(list(folder.glob("out.*")))
    outs = [folder / f"out.{first + number}" for number in range(len(runs))]
    arguments = []
    for number, (words, out) in enumerate(zip(runs, outs, strict=True)):
        out.touch()
        settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(env[number] if env else {})}
        arguments.append((words, str(out), str(folder), settings))
    statuses = in_processes(_target, arguments, timeout, outs[0])
    return [Ended.of(out.read_text(), status) for out, status in zip(outs, statuses, strict=True)]


def in_ranks(function: Callable[..., None], ranks: int, *arguments: Any, timeout: float = 900) -> None:
    """Calls ``function(rank, *arguments)`` in processes that run at the same time."""
    in_processes(function, [(rank, *arguments) for rank in range(ranks)], timeout)


def free_port() -> int:
    """A port of this machine that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(words: list[str], folder: Path) -> Ended:
    """One run in a process of its own."""
    return run_all([words], folder)[0]


def run_ranks(
    words: list[str], folder: Path, ranks: int = 2, strategy: str = "ddp", env: Mapping[str, str] | None = None
) -> list[Ended]:
    """One run over ``ranks`` processes, as a launcher would start them."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    of_ranks = [{**where, "LOCAL_RANK": str(rank), **(env or {})} for rank in range(ranks)]
    words = [*words, f"--trainer.devices={ranks}", f"--trainer.strategy={strategy}"]
    return run_all([words] * ranks, folder, of_ranks)


def quiet_trainer(**options: Any) -> Any:
    """A Trainer on the CPU that keeps and shows nothing unless ``options`` say otherwise."""
    from lightning import Trainer

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", **quiet, **options})


def one_in(number: int, cases: Iterable[Any], *, slow: Container[Any] = ()) -> list[Any]:
    """One in ``number`` of the cases; the others, and those in ``slow``, belong to the slow suite."""
    return [
        pytest.param(case, marks=pytest.mark.slow if i % number or case in slow else []) for i, case in enumerate(cases)
    ]


def one_for_each_need(names: Iterable[str]) -> list[Any]:
    """The first objective of those that need the same data and models; the others belong to the slow suite."""
    listed = json.loads((ROOT / "experiments/objectives.json").read_text(encoding="utf-8"))
    needs = {row["name"]: tuple(row["needs"]) for row in listed}
    first = {needs[name]: name for name in reversed([*names])}
    return [pytest.param(name, marks=[] if name in first.values() else pytest.mark.slow) for name in names]


def run_here(capfd: Any, words: list[str]) -> Ended:
    """One run in this process, and what it says on stderr."""
    from halos_pl.cli.main import main

    capfd.readouterr()
    status: Any = 0
    try:
        main(words)
    except SystemExit as ended:
        status = ended.code
    return Ended.of(capfd.readouterr().err, status)


def halos_check(capfd: Any, *words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``halos check WORDS``."""
    from halos_pl.cli.main import main

    capfd.readouterr()
    code = 0
    try:
        main(["check", *map(str, words)])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


def refused(capfd: Any, words: list[str], status: int = 1) -> str:
    """What a command in this process says, from its last line for the user on; it ends with ``status``."""
    said = run_here(capfd, words)
    assert said.status == status, said
    assert "Traceback" not in said
    return said[said.rindex("\nhalos: ") if "\nhalos: " in said else 0 :].strip()


def one_error(words: list[str], capfd: Any) -> str:
    """The only error line of a command in this process, which ends with status 1."""
    ended = run_here(capfd, words)
    assert ended.status == 1
    lines = [line for line in ended.splitlines() if "Error" in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("halos: ")
    return lines[0]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing fails in the middle, as on a full disk.

    Only around what is tested: a log that pytest itself writes to may be larger.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


KILLED = -signal.SIGKILL


def close(a: float, b: float, rel: float = 1e-6, abs_: float = 1e-6) -> bool:
    """Equal up to float32's rounding of a sum."""
    return math.isclose(a, b, rel_tol=rel, abs_tol=abs_)


def small_options(policy: Path, data: Path, **more: Any) -> dict[str, Any]:
    """The options of a study whose runs take two steps of four rows; dotted options are given with ``**``."""
    return {
        "model.policy.path": str(policy),
        "data.train": str(data),
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        **more,
    }
