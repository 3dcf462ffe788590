"""One writer at a time in a run's folder, whatever its cache; and folders that no run can be written to."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_halos import binary_data, fit, metrics, refused

import halos_pl.data.datamodule
from halos_pl.cli.main import main
from halos_pl.training.run_folder import move_aside
from halos_pl.training.run_lock import RunLock


@contextmanager
def held(folder: Path, command: str) -> Iterator[None]:
    """Another process, as of another machine with a cache of its own, that writes to a folder."""
    ready, taken = os.pipe()
    pid = os.fork()
    if not pid:
        os.environ["HALOS_CACHE"] = f"{folder}.cache"
        lock = RunLock(folder, command)
        lock.take()
        os.write(taken, b"x")
        os.read(os.pipe()[0], 1)  # for ever
    try:
        assert os.read(ready, 1) == b"x"
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("finished")
    words = fit(tiny_folder, "kto", binary_data(folder / "data.jsonl"), folder / "run", "--trainer.max_steps=1")
    main(words)
    return folder / "run", words


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


@pytest.mark.parametrize("command", ["fit", "predict", pytest.param("test", marks=pytest.mark.slow)])
def test_the_lock_is_that_which_others_ask_for(finished, tmp_path, monkeypatch, command):
    source, words = finished
    run_dir, taken = tmp_path / "x", []
    shutil.copytree(source, run_dir)
    take = RunLock.take
    monkeypatch.setattr(RunLock, "take", lambda lock: (taken.append(lock.command), take(lock)))
    data = [word.replace("--data.train", f"--data.{command}") for word in words if command != "fit"]
    main([command, *data[1:], f"--run_dir={run_dir}"] if data else [*words, f"--run_dir={run_dir}"])
    assert set(taken) == {command}


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
    access = os.access  # tests may be run by root, who may
    monkeypatch.setattr(os, "access", lambda path, *given, **more: path != tmp_path and access(path, *given, **more))
    assert f"{tmp_path} is not writable" in refused(capfd, [*finished[1], f"--run_dir={tmp_path}/x"])


@pytest.mark.usefixtures("unread")
def test_a_link_to_nowhere(finished, tmp_path, capfd):
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "y")
    assert str(tmp_path / "disk" / "y") in refused(capfd, [*finished[1], f"--run_dir={tmp_path}/x"])


def test_a_link_stays_a_link(finished, tmp_path):
    source, words = finished
    target = tmp_path / "disk" / "y"
    shutil.copytree(source, target)
    (tmp_path / "x").symlink_to(target)
    main([*words, f"--run_dir={tmp_path / 'x'}"])
    assert (tmp_path / "x").is_symlink()
    assert len(metrics(target)) == 1
    assert (tmp_path / "disk" / "y.1").is_dir()
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.usefixtures("unread")
def test_a_gpu_where_there_is_none(finished, tmp_path, capfd):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    line = refused(capfd, [*finished[1], f"--run_dir={tmp_path}/x", "--trainer.accelerator=gpu"])
    assert "trainer.accelerator" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["test", pytest.param("predict", marks=pytest.mark.slow)])
def test_the_config_of_a_run_that_was_moved_does_not_measure_another(finished, tmp_path, capfd, command) -> None:
    """A new fit moves an earlier run aside; that run's config goes on naming the folder of the new one."""
    run, _ = finished
    shutil.copytree(run, moved := tmp_path / "run.1")
    words = [command, f"--config={moved}/config.yaml", f"--data.{command}={run.parent}/data.jsonl"]
    said = refused(capfd, words)
    assert f"its run_dir is {run}" in said
    assert f"--run_dir {moved}" in said
    main([*words, f"--run_dir={moved}"])
    written = {"test": "test.json", "predict": "predictions.jsonl"}[command]
    assert (moved / written).is_file()
    assert not (run / written).exists()
