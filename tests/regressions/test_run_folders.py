"""One writer at a time in a run's folder, whatever its cache; and folders that no run can be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_halos import binary_data, fit, metrics

import halos_pl.data.datamodule
from halos_pl.callbacks import move_aside
from halos_pl.cli import main
from halos_pl.run_lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from halos_pl.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), sys.argv[2])
lock.take()
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held(folder: Path, command: str) -> Iterator[subprocess.Popen[str]]:
    """Another process, as of another machine with a cache of its own, that writes to a folder."""
    env = {**os.environ, "HALOS_CACHE": f"{folder}.cache"}
    words = [sys.executable, "-c", HOLDER, str(folder), command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("finished")
    words = fit(tiny_folder, "kto", binary_data(folder / "data.jsonl"), folder / "run", "--trainer.max_steps=1")
    main(words)
    return folder / "run", words


def refused(capfd, words: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    said: str = capfd.readouterr().err
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("halos: ") and "Error" in line]
    return line


@pytest.fixture
def unread(monkeypatch):
    """Fails where data are read: what is wrong with a folder is said before."""

    def read(*_):
        raise AssertionError("data were read")

    monkeypatch.setattr(halos_pl.data.datamodule.FeedbackDataModule, "setup", read)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("command", "options"), [("fit", []), ("fit", ["--ckpt_path=last"]), ("predict", [])])
def test_a_folder_that_is_written_to_is_refused(finished, tmp_path, capfd, command, options):
    source, words = finished
    run_dir = tmp_path / "x"
    shutil.copytree(source, run_dir)
    with held(run_dir, command):
        before = contents(run_dir)
        line = refused(capfd, [*words, f"--run_dir={run_dir}", *options])
        assert f"halos {command}" in line
        assert str(run_dir) in line
        assert contents(run_dir) == before
    assert not (tmp_path / "x.1").exists()


def test_the_lock_ends_with_its_process_and_goes_with_its_folder(tmp_path):
    folder = tmp_path / "x"
    with held(folder, "fit"):
        with pytest.raises(FileExistsError):
            RunLock(folder, "fit").take()
        (folder / "metrics.csv").write_text("")
        aside = move_aside(folder)
        assert aside == tmp_path / "x.1"
        with pytest.raises(FileExistsError):
            RunLock(aside, "fit").take()
        lock = RunLock(folder, "fit")  # another folder by now
        lock.take()
        lock.release()
        assert not list(folder.iterdir())
    lock = RunLock(aside, "fit")  # killed
    lock.take()
    pid = os.fork()  # as a data loader's process, which outlives a killed run for some seconds
    if not pid:
        os.read(os.pipe()[0], 1)
    lock.release()
    with held(aside, "fit"):
        pass
    os.kill(pid, 9)
    os.waitpid(pid, 0)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("name", [".", ".."])
def test_the_working_folder_is_not_moved_aside(finished, tmp_path, capfd, monkeypatch, name):
    source, words = finished
    run_dir = tmp_path / "x"
    shutil.copytree(source, run_dir)
    (run_dir / "y").mkdir()
    monkeypatch.chdir(run_dir if name == "." else run_dir / "y")
    before = contents(tmp_path)
    assert f"--run_dir {name}" in refused(capfd, [*words, f"--run_dir={name}"])
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("unread")
def test_a_file_is_no_folder(finished, tmp_path, capfd):
    (tmp_path / "x").write_text("mine")
    for run_dir in (tmp_path / "x", tmp_path / "x" / "y"):
        line = refused(capfd, [*finished[1], f"--run_dir={run_dir}"])
        assert f"{tmp_path / 'x'} is a file" in line
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.usefixtures("unread")
def test_a_folder_that_may_not_be_written_to(finished, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root
    assert f"{tmp_path} may not be written to" in refused(capfd, [*finished[1], f"--run_dir={tmp_path}/x"])


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(finished, tmp_path, there):
    source, words = finished
    (tmp_path / "disk").mkdir()
    target = tmp_path / "disk" / "y"
    if there:
        shutil.copytree(source, target)
    (tmp_path / "x").symlink_to(target)
    main([*words, f"--run_dir={tmp_path / 'x'}"])
    assert (tmp_path / "x").is_symlink()
    assert len(metrics(target)) == 1
    assert (tmp_path / "disk" / "y.1").is_dir() is there
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.usefixtures("unread")
def test_a_gpu_where_there_is_none(finished, tmp_path, capfd):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    line = refused(capfd, [*finished[1], f"--run_dir={tmp_path}/x", "--trainer.accelerator=gpu"])
    assert "accelerator" in line
    assert not (tmp_path / "x").exists()
