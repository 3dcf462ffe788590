"""Progress counts optimizer steps of the whole run, without a terminal in plain lines; the end has its true reason."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from run_halos import binary_data, fit

from halos_pl.cli.main import main
from halos_pl.common.progress import counted, counting
from halos_pl.training.progress import Progress

PLUGIN = "plugins.own_log"


def shown(capfd: Any, model: Path, folder: Path, *options: str, rows: int = 24) -> str:
    """What a fit of 6 steps an epoch prints; it has no terminal."""
    words = fit(model, "kto", binary_data(folder / "data.jsonl", rows), folder / "run", *options)
    capfd.readouterr()
    main([*words, "--trainer.enable_progress_bar=true"])
    return str(capfd.readouterr().out)


def steps(text: str) -> list[tuple[int, int]]:
    return [(int(n), int(total)) for n, total in re.findall(r"^step (\d+)/(\d+),", text, re.MULTILINE)]


def ended(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return found


def test_lines_count_against_max_steps_and_go_on_when_resumed(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    """Of an epoch of 6 steps the run takes 3, then 5."""
    text = shown(capfd, tiny_folder, tmp_path, "--trainer.max_steps=3")
    assert steps(text) == [(1, 3), (2, 3), (3, 3)]
    assert "\r" not in text
    for line in text.splitlines():
        if line.startswith("step "):
            assert re.search(r"loss [\d.]+", line)
            assert re.search(r"tokens/s [\d,.e+]+", line)
            assert "nan" not in line
            assert line.endswith("left")
    text = shown(capfd, tiny_folder, tmp_path, "--trainer.max_steps=5", "--ckpt_path=last", "--trainer.max_epochs=9")
    assert steps(text) == [(4, 5), (5, 5)]
    assert ended(tmp_path)["ended"] == "max_steps=5 reached"


def test_lines_at_the_steps_that_are_asked_for(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    """Over epochs that are cut short, with validations between."""
    more = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=4", "--progress.every_n_steps=3")
    text = shown(capfd, tiny_folder, tmp_path, *more, f"--data.validation={tmp_path}/data.jsonl")
    assert steps(text) == [(1, 8), (3, 8), (6, 8), (8, 8)]
    assert re.findall(r"^validation after step (\d+): val/loss [\d.]+", text, re.MULTILINE) == ["4", "8"]
    assert ended(tmp_path)["ended"] == "max_epochs=2 reached"


def test_a_long_run_prints_some_fifty_lines() -> None:
    progress = Progress()
    progress._planned = 1000
    assert 50 <= sum(map(progress._due, range(1, 1001))) <= 52
    progress._first, progress.max_seconds = 20, 1e-9  # of steps that take long each one is said
    assert all(map(progress._due, range(21, 1001)))


@pytest.mark.parametrize("given", [{"every_n_steps": 0}, {"max_seconds": 0.0}, {"max_seconds": float("nan")}])
def test_numbers_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Progress(**given)


def test_a_bar_on_a_terminal_counts_steps_of_the_run(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 24), tmp_path / "run", "--trainer.max_steps=2")
    read, write = pty.openpty()
    termios.tcsetwinsize(write, (40, 160))
    parts: list[bytes] = []

    def drain() -> None:
        with suppress(OSError):  # when it is closed
            while part := os.read(read, 4096):
                parts.append(part)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(write, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        main([*words, "--trainer.enable_progress_bar=true"])
    reader.join(timeout=10)
    os.close(read)
    text = b"".join(parts).decode()
    assert "2/2 [" in text
    assert "/6" not in text
    assert not steps(text)


STOP = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=rewards/margins")
STOP += (
    "--data.balance_classes=true",
    "--trainer.callbacks.check_on_train_epoch_end=true",
    "--trainer.max_epochs=9",
    "--trainer.callbacks.mode=max",
)


@pytest.mark.parametrize(
    ("options", "reason", "taken"),
    [
        (("--trainer.max_steps=2",), r"^max_steps=2 reached$", 2),
        ((*STOP, "--trainer.callbacks.stopping_threshold=-1000"), r"EarlyStopping.*rewards/margins is -?\d", 2),
        pytest.param(
            (*STOP, "--trainer.callbacks.min_delta=1000", "--trainer.callbacks.patience=2"),
            r"EarlyStopping.*rewards/margins is -?\d.*best",
            6,
            marks=pytest.mark.slow,
        ),
        ((f"--trainer.callbacks+={PLUGIN}.StopAt", "--trainer.callbacks.step=1"), r"\bStopAt$", 1),
        (("--trainer.max_time={seconds: 0}",), "^max_time", 0),
        # The limit that is reached last of all is the reason, though a callback asked for it too.
        ((f"--trainer.callbacks+={PLUGIN}.StopAt", "--trainer.callbacks.step=2"), r"^max_epochs=1 reached$", 2),
    ],
)
def test_the_reason_of_an_end_is_the_true_one(
    tiny_folder: Path, tmp_path: Path, options: tuple[str, ...], reason: str, taken: int
) -> None:
    main(fit(tiny_folder, "kto", binary_data(tmp_path / "data.jsonl", 8), tmp_path / "run", *options))
    found = ended(tmp_path)
    assert re.search(reason, found["ended"], re.IGNORECASE), found["ended"]
    assert found["steps"] == taken


@pytest.mark.parametrize(("columns", "bar"), [(0, False), (80, True)])
def test_a_terminal_of_no_width_gets_lines(columns: int, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar of 0 columns would be an empty string."""
    read, write = pty.openpty()
    termios.tcsetwinsize(write, (24, columns))
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(write, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        enabled = Progress().is_enabled
        monkeypatch.undo()
    os.close(read)
    assert enabled is bar


def test_work_without_a_terminal_is_counted_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted("abcd", "judging", max_seconds=0)) == list("abcd")
    said = capsys.readouterr()
    assert not said.out
    assert re.findall(r"^judging: (\d)/4;", said.err, re.MULTILINE) == ["1", "2", "3"]
    list(counted("abcd", "judging"))
    assert capsys.readouterr().err == ""


def test_work_of_unknown_length_is_counted_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for max_seconds, lines in ((0.0, ["1", "2"]), (60.0, [])):
        with counting("planning", "steps", max_seconds) as done:
            done()
            done()
        out, err = capsys.readouterr()
        assert not out
        assert re.findall(r"^planning: (\d) steps;", err, re.MULTILINE) == lines
