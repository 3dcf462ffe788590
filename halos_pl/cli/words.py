"""The words of a command line: other spellings of an option, and ``~`` within a word."""

from __future__ import annotations

import os
import sys


def spelled(words: list[str]) -> list[str]:
    """The words of a command, in which ``--checkpoint best``, ``last`` or a file is another spelling of --ckpt_path.

    For the Trainer's commands ``--checkpoint`` also names a YAML file or a mapping of the settings of that name.

    Raises:
        SystemExit: where both are given.
    """
    always, trainer = ("export", "evaluate"), ("fit", "test", "validate", "predict")
    found = list(words)
    for i, word in enumerate(words):
        name, mark, value = word.partition("=")
        value = value if mark else words[i + 1] if i + 1 < len(words) else ""
        named = value in ("best", "last") or value.endswith(".ckpt")
        if name == "--checkpoint" and (words[0] in always or (words[0] in trainer and named)):
            found[i] = f"--ckpt_path{mark}{value if mark else ''}"
    given = [word.partition("=")[0] for word in found].count("--ckpt_path")
    if found != words and given > 1:
        print("halos: --checkpoint and --ckpt_path are the same option; give one of them", file=sys.stderr)
        raise SystemExit(2)
    return found


def at_home(word: str) -> str:
    """``--run_dir=~/x`` as a shell would make it of ``--run_dir ~/x``; most leave a ``~`` within a word alone."""
    name, mark, value = word.partition("=")
    return f"{name}={os.path.expanduser(value)}" if mark and name.startswith("--") and value.startswith("~/") else word
