"""The code, libraries and machine that a run was made with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import Distribution, distribution, version
from pathlib import Path
from typing import Any

LIBRARIES = ("halos_pl", "torch", "lightning", "transformers", "peft", "datasets", "scipy", "statsmodels")
HERE = Path()
NO_CHECKOUT = "not in a git checkout"


def provenance() -> dict[str, Any]:
    """The revisions of the working folder and of halos_pl, versions of libraries, and the machine."""
    return {
        "revision": _revision(HERE) or NO_CHECKOUT,
        "halos_pl": own_revision(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
    }


def own_revision() -> str:
    """The commit of halos_pl, from its checkout or from pip; otherwise its version.

    A package installed inside another project's checkout does not belong to it: git tracks none of its files.
    """
    package = Path(__file__).resolve().parent
    if _git("ls-files", "--error-unmatch", "--", "__init__.py", folder=package) is not None:
        commit = _revision(package, *(str(folder) for folder in (package, package.with_name("value_functions"))))
        if commit:
            return commit
    return _installed_from(distribution("halos_pl"))


def _installed_from(package: Distribution) -> str:
    """The version, and the source that pip recorded (PEP 610: direct_url.json)."""
    try:
        source = json.loads(package.read_text("direct_url.json") or "{}")
    except ValueError:
        source = {}
    commit = (source.get("vcs_info") or {}).get("commit_id")
    digest = ((source.get("archive_info") or {}).get("hashes") or {}).get("sha256")
    return package.version + (f", commit {commit}" if commit else f", archive sha256 {digest}" if digest else "")


def _git(*words: str, folder: Path = HERE, config: Mapping[str, str] | None = None) -> str | None:
    """The output of a git command in a folder, None if it fails; executes nothing that the folder names.

    The folder may be untrusted, and its ``.git/config`` can name programs: a file-system monitor, hooks, filters, and
    the transport of a partial clone.
    """
    settings = {
        "core.fsmonitor": "false",
        "core.hooksPath": os.devnull,
        "protocol.allow": "never",
        "safe.bareRepository": "explicit",
        **(config or {}),
    }
    first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)  # settings of the environment stay, such as safe.directory
    env = {**os.environ, "GIT_CONFIG_COUNT": str(first + len(settings))}
    if folder != HERE:  # these are about the working folder
        env = {k: v for k, v in env.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")}
    env |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    for i, (key, value) in enumerate(settings.items(), start=first):
        env |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}
    try:
        done = subprocess.run(
            ["git", "--no-pager", *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            env=env,
            encoding="utf-8",
            errors="replace",
        )
        return done.stdout.strip()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _revision(folder: Path, *paths: str) -> str | None:
    """The commit of a folder's checkout, and whether it has changes (only at ``paths``, if there are any)."""
    commit = _git("rev-parse", "HEAD", folder=folder)
    if not commit:
        return None
    # git runs filters on files before it compares them; without a command they do nothing.
    names = r"^filter\..*\.(clean|process|required)$"
    filters = _git("config", "--name-only", "--null", "--get-regexp", names, folder=folder)
    off = {key: "false" if key.endswith(".required") else "" for key in (filters or "").split("\0") if key}
    # Untracked Python files may be plug-ins; others are data and notes.
    status = ("status", "--porcelain", "--ignore-submodules=all")
    python = [f":(glob){path}/**/*.py" for path in paths] or ["*.py"]
    changes = [
        _git(*status, "-uno", "--", *paths, folder=folder, config=off),
        _git(*status, "-uall", "--", *python, folder=folder, config=off),
    ]
    return f"{commit}{' with changes' if any(changes) else ', perhaps with changes' if None in changes else ''}"
