"""The console script ``halos``: imports and runs the command that is named."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from halos_pl.cli.broken_pipe import ending_quietly
from halos_pl.cli.help_page import TRAINER_COMMANDS, group_page, help_page, unknown_command
from halos_pl.cli.words import at_home, refuse_repeated_keys, spelled
from halos_pl.common import spent
from halos_pl.common.import_path import put_last
from halos_pl.common.messages import plain
from halos_pl.common.stopping import is_first, listening


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        args: words of the command line; default: those of this process.

    Raises:
        SystemExit: with the status of the command.
    """
    spent.begin()
    if args is None and os.name == "posix" and not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8":
        _restart_in_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal lacks are shown as numbers
            stream.reconfigure(errors="backslashreplace")
    words = [at_home(word) for word in spelled(sys.argv[1:] if args is None else args)]
    if args is None:
        sys.argv[1:] = words
    try:
        folder = os.getcwd()
    except FileNotFoundError as error:
        print("halos: the working folder no longer exists; cd into another one", file=sys.stderr)
        raise SystemExit(1) from error
    put_last(folder)
    with ending_quietly(), listening(words):
        _dispatch(words)


def _dispatch(words: list[str]) -> None:
    """Imports the command and runs it.

    Raises:
        SystemExit: with the status of the command.
    """
    if words == ["--version"]:
        from halos_pl import __version__

        print(f"halos_pl {__version__}")
    elif not words or words[0] in ("--help", "-h", "help"):
        print(help_page(), file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    elif page := group_page(words):
        print(page)
        raise SystemExit(0)
    elif wrong := unknown_command(words):
        if is_first():
            print(f"halos: {plain(wrong)}", file=sys.stderr)
        raise SystemExit(2)
    elif words[0] == "check":
        from halos_pl.cli import check

        check.run(words[1:])
    else:
        from halos_pl.cli.commands import run_plan, run_tool, tool_of
        from halos_pl.cli.errors import reported

        with reported():
            refuse_repeated_keys(words)
            if words[0] == "plan" and not {"--help", "-h"} & {*words}:
                run_plan(words[1:])
            elif tool := tool_of(words):
                run_tool(tool, words[len(tool.split()) :])
            elif words[0] in TRAINER_COMMANDS and words[1:] in (["--help"], ["-h"]):
                from halos_pl.cli.cached_help import show_help

                show_help(words, _lightning)
            else:
                _lightning(words)


def _lightning(words: list[str]) -> None:
    from halos_pl.cli.lightning_cli import HalosCLI

    HalosCLI(words)


def _restart_in_utf8() -> NoReturn:
    """Restarts the command in Python's UTF-8 mode, in the same process: every file is UTF-8 in any locale.

    Passing an encoding to each ``open`` would not cover other libraries or file names. The terminal keeps its encoding.
    """
    if sys.stdout is not None:  # None if closed
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:backslashreplace"
    os.environ["PYTHONUTF8"] = "1"  # for child processes
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
