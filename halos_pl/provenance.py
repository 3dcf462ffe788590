"""By what and on what a run was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
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


def _revision() -> str:
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "HEAD")
    # New files of other kinds are data and notes; one of Python may be a plug-in.
    changes = git("status", "--porcelain", "-uno") or git("status", "--porcelain", "-uall", "--", "*.py")
    return f"{commit}{' with changes' if changes else ''}" if commit else "not in a git checkout"


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
