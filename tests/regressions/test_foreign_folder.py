"""A folder of another's is data: nothing in it is executed because a command is started there, unless it is named.

Git's own notes on folders of others: CVE-2022-24765 (safe.directory), safe.bareRepository. Found here: ``git status``
in the working folder ran its core.fsmonitor, and a peft.py in it ran at ``halos cache info``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest
from run_halos import ROOT, config, refused, run_all

import halos_pl.provenance
from halos_pl.common.import_path import folder_last
from halos_pl.provenance import provenance


def _git(*words: str, cwd: Path) -> str:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always")
    done = subprocess.run(["git", *names, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one commit, and a program that leaves a mark."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "checkout"
    folder.mkdir()
    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/mark\n", encoding="utf-8")
    program.chmod(0o755)
    _git("init", "-q", cwd=folder)
    (folder / ".gitattributes").write_text("*.txt filter=evil\n", encoding="utf-8")
    (folder / "notes.txt").write_text("x\n", encoding="utf-8")
    (folder / "mine.py").write_text("x = 1\n", encoding="utf-8")
    _git("add", ".", cwd=folder)
    _git("commit", "-qm", "one", cwd=folder)
    return folder


def _plant(kind: str, folder: Path) -> None:
    program = folder.parent / "program.sh"
    settings = {
        "fsmonitor": {"core.fsmonitor": f"{program} fsmonitor"},
        "clean": {"filter.evil.clean": f"{program} clean", "filter.evil.required": "true"},
        "process": {"filter.evil.process": f"{program} process", "filter.evil.required": "true"},
        "hooks": {"core.hooksPath": str(folder.parent / "hooks")},
        "promisor": {
            "core.repositoryFormatVersion": "1",
            "extensions.partialClone": "origin",
            "remote.origin.promisor": "true",
            "remote.origin.url": str(folder.parent / "nowhere"),
            "remote.origin.uploadpack": f"{program} upload-pack",
        },
        "include": {"include.path": "../planted"},
        "pager": {"core.pager": f"{program} pager", "diff.external": f"{program} diff", "pager.status": "true"},
        "submodule": {"status.submoduleSummary": "true"},
    }[kind]
    if kind == "hooks":
        (folder.parent / "hooks").mkdir()
        for hooks in (folder.parent / "hooks", folder / ".git" / "hooks"):
            shutil.copy(program, hooks / "post-index-change")
    if kind == "include":
        text = f'[core]\n\tfsmonitor = {program} included\n[filter "evil"]\n\tclean = {program} included\n'
        (folder / "planted").write_text(text, encoding="utf-8")
    if kind == "submodule":
        _git("clone", "-q", str(folder), str(folder.parent / "other"), cwd=folder)
        _git("submodule", "add", "-q", str(folder.parent / "other"), "sub", cwd=folder)
        _git("commit", "-qam", "two", cwd=folder)
        _git("config", "core.fsmonitor", f"{program} submodule", cwd=folder / "sub")
    for key, value in settings.items():
        _git("config", key, value, cwd=folder)
    if kind == "promisor":
        tree = _git("rev-parse", "HEAD^{tree}", cwd=folder)
        (folder / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    os.utime(folder / "notes.txt", (1, 1))  # so that git looks at what it holds
    os.utime(folder / "mine.py", (1, 1))


@pytest.mark.parametrize(
    "kind", ["fsmonitor", "clean", "process", "hooks", "promisor", "include", "pager", "submodule"]
)
def test_git_executes_nothing_that_a_folder_names(checkout: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision is said all the same."""
    _plant(kind, checkout)
    monkeypatch.chdir(checkout)
    revision = provenance()["revision"]
    assert not (checkout.parent / "mark").exists(), (checkout.parent / "mark").read_text(encoding="utf-8")
    assert revision.startswith(_git("rev-parse", "HEAD", cwd=checkout))


@pytest.mark.parametrize("kind", ["fsmonitor", "clean", "process", "promisor", "include"])
def test_plain_git_would(checkout: Path, kind: str) -> None:
    """Else the test before shows nothing."""
    _plant(kind, checkout)
    _git("status", "--porcelain", cwd=checkout)
    assert (checkout.parent / "mark").exists()


def test_a_bare_repository_in_a_folder_is_not_asked(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds HEAD, objects/ and refs/ is one to git, with a config of its own."""
    bare = checkout.parent / "bare"
    shutil.copytree(checkout / ".git", bare)
    _git("config", "core.fsmonitor", f"{checkout.parent}/program.sh bare", cwd=bare)
    monkeypatch.chdir(bare)
    assert provenance()["revision"] == "not in a git checkout"
    assert not (checkout.parent / "mark").exists()


def test_changes_are_still_seen(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without."""
    monkeypatch.chdir(checkout)
    commit = _git("rev-parse", "HEAD", cwd=checkout)
    assert provenance()["revision"] == commit
    (checkout / "new.py").write_text("y = 2\n", encoding="utf-8")
    assert provenance()["revision"] == f"{commit} with changes"


@pytest.fixture
def copied(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout as a place from which halos_pl is run, in another working folder that is a checkout as well."""
    package = checkout / "halos_pl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "provenance.py").touch()
    monkeypatch.setattr(halos_pl.provenance, "__file__", str(package / "provenance.py"))
    other = checkout.parent / "other"
    other.mkdir()
    _git("init", "-q", cwd=other)
    _git("commit", "-q", "--allow-empty", "-m", "another project", cwd=other)
    monkeypatch.chdir(other)
    return checkout


def _committed(copied: Path) -> str:
    _git("add", ".", cwd=copied)
    _git("commit", "-qm", "halos_pl", cwd=copied)
    return _git("rev-parse", "HEAD", cwd=copied)


def test_halos_pl_says_its_own_revision_wherever_it_is_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the working folder, which is said beside it; only changes of its own code count."""
    commit = _committed(copied)
    by = provenance()
    assert by["halos_pl"] == commit
    assert by["revision"] == _git("rev-parse", "HEAD", cwd=Path.cwd()) != commit
    monkeypatch.setenv("GIT_DIR", str(Path.cwd() / ".git"))  # as in a hook
    assert provenance()["halos_pl"] == commit
    monkeypatch.delenv("GIT_DIR")
    (copied / "notes.py").touch()
    assert provenance()["halos_pl"] == commit
    (copied / "halos_pl" / "new.py").touch()
    assert provenance()["halos_pl"] == f"{commit} with changes"
    (copied / "halos_pl" / "new.py").unlink()
    (copied / "halos_pl" / "provenance.py").write_text("x = 1\n")
    assert provenance()["halos_pl"] == f"{commit} with changes"


def test_an_environment_below_a_project_is_no_part_of_it(copied: Path) -> None:
    """As .venv in a checkout: git does not track what is installed there."""
    (copied / ".gitignore").write_text("halos_pl\n")
    _committed(copied)
    assert provenance()["halos_pl"].startswith(version("halos_pl"))
    assert _git("rev-parse", "HEAD", cwd=copied) not in provenance()["halos_pl"]


@pytest.mark.parametrize(
    ("noted", "ends"),
    [
        ('{"url": "https://x", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}', "1.2, commit abc123"),
        ('{"url": "file:///a.whl", "archive_info": {"hashes": {"sha256": "def456"}}}', "1.2, archive sha256 def456"),
        ('{"url": "file:///src", "dir_info": {}}', "1.2"),
        ("{broken", "1.2"),
        (None, "1.2"),
    ],
)
def test_an_installed_package_says_its_version_and_source(tmp_path: Path, noted: str | None, ends: str) -> None:
    """PEP 610's direct_url.json, as pip writes it."""
    folder = tmp_path / "halos_pl-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: halos_pl\nVersion: 1.2\n")
    if noted is not None:
        (folder / "direct_url.json").write_text(noted)
    assert halos_pl.provenance._installed_from(Distribution.at(folder)) == ends


@pytest.mark.parametrize("kind", ["fsmonitor", "clean", "process", "include"])
def test_git_executes_nothing_of_the_folder_that_halos_pl_lies_in(copied: Path, kind: str) -> None:
    commit = _committed(copied)
    _plant(kind, copied)
    os.utime(copied / "halos_pl" / "provenance.py", (1, 1))
    assert provenance()["halos_pl"].startswith(commit)
    assert not (copied.parent / "mark").exists()


SHADOWS = ("torch", "yaml", "peft", "rich", "jsonargparse", "lightning", "argparse", "submitit", "value_functions")


def _shadowed(folder: Path) -> None:
    for name in SHADOWS:
        text = f"open({str(folder / 'mark')!r}, 'a').write({name!r})\n"
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    code = "from value_functions import Logistic\nclass Softer(Logistic):\n    pass\n"
    (folder / "of_this_folder.py").write_text(code, encoding="utf-8")


def test_files_of_the_working_folder_hide_no_library(tmp_path: Path) -> None:
    """``python -m`` puts that folder first; the command puts it last, and still finds a plug-in in it."""
    _shadowed(tmp_path)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["", str(ROOT)])}  # an empty entry is that folder too
    words = ["check", "of_this_folder.Softer"]
    done = subprocess.run([sys.executable, "-m", "halos_pl", *words], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"verdict: halo" in done.stdout
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_study_imports_nothing_of_the_working_folder_before_its_libraries(tmp_path: Path) -> None:
    """Its runs are ``python -m halos_pl``, which looks for halos_pl and what it imports first in that folder."""
    _shadowed(tmp_path)
    for name in ("shlex", "subprocess", "halos_pl"):
        text = f"open({str(tmp_path / 'mark')!r}, 'a').write({name!r})\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **folder_last()}
    words = [sys.executable, "-m", "halos_pl", "check", "of_this_folder.Softer"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_what_lies_beside_a_named_file_hides_no_library(tmp_path: Path) -> None:
    """``halos check mine.py:Softer`` executes mine.py, and no yaml.py beside it."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    _shadowed(folder)
    good, bad = run_all([["check", f"{folder}/of_this_folder.py:Softer"], ["check", f"{folder}/nope.py:X"]], tmp_path)
    assert (good.status, bad.status) == (0, 2), good
    assert not (folder / "mark").exists()


def test_a_name_that_an_installed_module_hides_is_said(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """``rich.Mine`` is looked up in the installed rich, and the error says so."""
    _shadowed(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["fit", config("base"), config("objectives/kto"), f"--model.policy.path={tiny_folder}"]
    said = refused(capfd, [*words, "--model.value_function=rich.Mine"], status=2)
    assert "rich/__init__.py" in said
    assert "rich.py" in said
