"""Words of a command line: alternative spellings of an option, and ``~`` inside a word."""

from __future__ import annotations

import os
import sys

from halos_pl.common.messages import plain
from halos_pl.common.stopping import is_first


def spelled(words: list[str]) -> list[str]:
    """The words of a command, with ``--ckpt_path`` for ``--checkpoint best``, ``last`` or a file.

    For the Trainer's commands, ``--checkpoint`` may also be a YAML file or a mapping of the settings of that name.

    Raises:
        SystemExit: if both options are given.
    """
    always, trainer = ("export", "evaluate", "collect"), ("fit", "test", "validate", "predict")
    respelled = list(words)
    for i, word in enumerate(words):
        name, mark, value = word.partition("=")
        value = value if mark else words[i + 1] if i + 1 < len(words) else ""
        named = value in ("best", "last") or value.endswith(".ckpt")
        if name == "--checkpoint" and (words[0] in always or (words[0] in trainer and named)):
            respelled[i] = f"--ckpt_path{mark}{value if mark else ''}"
    count = [word.partition("=")[0] for word in respelled].count("--ckpt_path")
    if respelled != words and count > 1:
        if is_first():
            print("halos: --checkpoint and --ckpt_path are the same option; give only one", file=sys.stderr)
        raise SystemExit(2)
    return respelled


def refuse_repeated_keys(words: list[str]) -> None:
    """Refuses a mapping in a word, such as ``--limit={mmlu: 5, mmlu: 6}``, that has a key twice.

    Raises:
        UsageError: naming the option and the key.
    """
    option = ""
    for word in words:
        name, mark, value = word.partition("=") if word.startswith("-") else (option, "=", word)
        option = name
        if not mark or not value.lstrip().startswith(("{", "[")):
            continue
        from halos_pl.common.yaml_files import repeated_key  # these take time that --help should not

        if key := repeated_key(value):
            from halos_pl.cli.errors import UsageError

            raise UsageError(f"halos {words[0]}: error: {plain(f'{name} has the key {key} twice; remove one')}")


def at_home(word: str) -> str:
    """``--run_dir=~/x`` with the home folder, which most shells expand only in ``--run_dir ~/x``."""
    name, mark, value = word.partition("=")
    return f"{name}={os.path.expanduser(value)}" if mark and name.startswith("--") and value.startswith("~/") else word


def split_words(words: list[str], own: set[str]) -> tuple[list[str], list[str]]:
    """The words of ``halos plan``'s own options, and those of the run.

    Args:
        words: words after the command.
        own: names of its own options.
    """
    words, options, run = list(words), [], []
    while words:
        word = words.pop(0)
        name, mark, _ = word.partition("=")
        if name.removeprefix("--") in own and word.startswith("--"):
            options += [word] if mark or not words else [word, words.pop(0)]
        elif word.startswith("-"):
            run.append(word)
            if not mark and words and not words[0].startswith("-"):
                run.append(words.pop(0))
        else:  # a config
            run.append(f"--config={word}")
    return options, run
