"""A file is there when all of it has been written, also where a command is stopped or the disk is full."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import halos_pl.sampling.local
import halos_pl.training.named_model
from halos_pl.cli.main import main
from halos_pl.common.files import whole
from halos_pl.common.stopping import Stopped


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)))
    return path


def words(model: Path, prompts: Path, *options: str) -> list[str]:
    return ["sample", str(model), f"--prompts={prompts}", "--max_new_tokens=2", "--batch_size=1", *options]


def status_of(given: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(given)
    code: int = ended.value.code  # type: ignore[assignment]
    return code


@pytest.mark.parametrize(
    ("end", "status"),
    [(Stopped(signal.SIGTERM), 143), (Stopped(signal.SIGHUP), 129), (OSError(28, "No space left on device"), 1)],
)
def test_a_stopped_command_leaves_its_part_under_another_name_and_resumes(
    tiny_folder, prompts, tmp_path, monkeypatch, capfd, end, status
):
    out, real, calls = tmp_path / "answers.jsonl", halos_pl.sampling.local.draw, []
    out.write_text("of before\n")

    def draw(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            if isinstance(end, Stopped):
                os.kill(os.getpid(), end.signum)
            raise end
        return real(*arguments)

    monkeypatch.setattr(halos_pl.sampling.local, "draw", draw)
    command = words(tiny_folder, prompts, f"--out={out}", "--overwrite=true")
    assert status_of(command) == status
    part = tmp_path / "answers.jsonl.halos.part"
    assert out.read_text() == "of before\n"
    assert len(part.read_text().splitlines()) == 8
    said = capfd.readouterr().err
    assert str(part) in said
    assert "Traceback" not in said
    main(command)
    assert len(calls) == 9 + 4  # the four that were left
    assert [json.loads(line)["prompt"] for line in out.open()] == [f"question {i}" for i in range(12)]
    assert not part.exists()


@pytest.mark.parametrize("out", ["answers.jsonl", "answers.part", "answers"])
def test_a_file_beside_the_answers_stays(tiny_folder, prompts, tmp_path, out):
    """Their part has a name of its own."""
    mine = tmp_path / ("answers.part" if out != "answers.part" else "answers.jsonl")
    mine.write_text("mine")
    main(words(tiny_folder, prompts, f"--out={tmp_path / out}"))
    assert mine.read_text() == "mine"
    assert len((tmp_path / out).read_text().splitlines()) == 12


@pytest.mark.parametrize("place", [".", "none/answers.jsonl", "prompts.jsonl/answers.jsonl"])
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tiny_folder, prompts, tmp_path, monkeypatch, capfd, place
):
    monkeypatch.setattr(halos_pl.training.named_model, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert status_of(words(tiny_folder, prompts, f"--out={tmp_path / place}")) == 1
    assert str(tmp_path / place) in capfd.readouterr().err


def test_answers_may_go_to_a_pipe(tiny_folder, prompts, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    main(words(tiny_folder, prompts, f"--out={pipe}"))
    assert os.read(reader, 1 << 16).count(b"\n") == 12
    os.close(reader)
    assert pipe.is_fifo()


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file.txt")
    with whole(tmp_path / "link") as file:
        file.write("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file.txt").read_text() == "x"


def test_what_fails_leaves_the_older_file_alone(tmp_path):
    (tmp_path / "f.json").write_text("old")

    def fill() -> None:
        with whole(tmp_path / "f.json") as file:
            file.write("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"f\.json"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
    assert (tmp_path / "f.json").read_text() == "old"
