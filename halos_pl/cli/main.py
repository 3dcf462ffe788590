"""The console script ``halos``."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from halos_pl.cli.help_page import help_page, unknown_command
from halos_pl.common.import_path import put_last
from halos_pl.common.messages import plain
from halos_pl.common.stopping import listening


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; ``args`` are its words, by default those of this process.

    Raises:
        SystemExit: with the status of the command.
    """
    if args is None and os.name == "posix" and not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8":
        _restart_in_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal has no character for is shown by its number
            stream.reconfigure(errors="backslashreplace")
    words = [at_home(word) for word in spelled(sys.argv[1:] if args is None else args)]
    if args is None:
        sys.argv[1:] = words
    else:
        args = words
    try:
        folder = os.getcwd()
    except FileNotFoundError as error:
        print("halos: the working folder does not exist any more; cd into one that does", file=sys.stderr)
        raise SystemExit(1) from error
    put_last(folder)
    with listening(words):
        if words == ["--version"]:
            from importlib.metadata import version

            print(f"halos_pl {version('halos_pl')}")
        elif not words or words[0] in ("--help", "-h", "help"):
            print(help_page(), file=sys.stdout if words else sys.stderr)
            raise SystemExit(0 if words else 2)
        elif said := unknown_command(words[0]):
            print(f"halos: {plain(said)}", file=sys.stderr)
            raise SystemExit(2)
        # Imported by command: a check takes less time than it takes to load Lightning and transformers.
        elif words[:1] == ["check"]:
            from halos_pl.cli import check

            check.run(words[1:])
        else:
            from halos_pl.cli import lightning_cli

            lightning_cli.run(args)


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


def _restart_in_utf8() -> NoReturn:
    """The same command in Python's UTF-8 mode, in the same process: every file is UTF-8, whatever the locale.

    An encoding at each ``open`` of ours would not cover those of other libraries, nor file names. The terminal keeps
    its own encoding.
    """
    if sys.stdout is not None:  # None where it is closed
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"
    os.environ["PYTHONUTF8"] = "1"  # for the processes of this one
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
