"""By what and on what a run was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halos_pl.data.formats import files_of
from halos_pl.data.source import Source

LIBRARIES = ("halos_pl", "torch", "lightning", "transformers", "peft", "datasets", "scipy", "statsmodels")


def provenance() -> dict[str, Any]:
    """By what a run was made: the revision of the code, versions of libraries, the machine."""
    return {
        "revision": _revision(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
    }


def _git(*words: str, config: Mapping[str, str] | None = None) -> str | None:
    """What git says of the working folder; None where it fails. Nothing that the folder names is executed.

    The folder may be another's, and its ``.git/config`` can name programs: a file-system monitor, hooks, filters, what
    fetches the missing objects of a partial clone.
    """
    settings = {
        "core.fsmonitor": "false",
        "core.hooksPath": os.devnull,
        "protocol.allow": "never",
        "safe.bareRepository": "explicit",
        **(config or {}),
    }
    first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)  # those of the environment stay, such as a safe.directory
    env = {**os.environ, "GIT_CONFIG_COUNT": str(first + len(settings))}
    env |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    for i, (key, value) in enumerate(settings.items(), start=first):
        env |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}
    try:
        done = subprocess.run(
            ["git", "--no-pager", *words],
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


def _revision() -> str:
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return "not in a git checkout"
    # A filter is a command that git runs on a file before it compares it; one without a command does nothing.
    filters = _git("config", "--name-only", "--null", "--get-regexp", r"^filter\..*\.(clean|process|required)$")
    off = {key: "false" if key.endswith(".required") else "" for key in (filters or "").split("\0") if key}
    # New files of other kinds are data and notes; one of Python may be a plug-in.
    status = ("status", "--porcelain", "--ignore-submodules=all")
    said = [_git(*status, "-uno", config=off), _git(*status, "-uall", "--", "*.py", config=off)]
    return f"{commit}{' with changes' if any(said) else ', perhaps with changes' if None in said else ''}"


def paths_of(sources: Iterable[Any]) -> list[str]:
    """The paths of sources, which are texts or mappings."""
    return [source["path"] if isinstance(source, dict) else source for source in sources if source]


def digest_of(path: str) -> str:
    """The first half of the SHA-256 of a file, or of the names and SHA-256 of the files of a folder or pattern."""
    found = [Path(source.path) for source in files_of(Source(path))]
    files = sorted(f for p in found for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    if len(files) > 1:
        named = [[str(file), digest] for file, digest in zip(files, digests, strict=True)]
        digests = [hashlib.sha256(json.dumps(named).encode()).hexdigest()]
    return digests[0][:32] if digests else "not a file here"
