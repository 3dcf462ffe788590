"""A command ends without a message once nobody reads its output."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from halos_pl.cli.broken_pipe import STATUS, ending_quietly
from halos_pl.cli.errors import reported

COMMANDS = {
    "the help": ["--help"],
    "a table in plain text": ["objectives"],
    "a table of rich": ["cache", "info"],
    "a command that is refused": ["no_such_command"],
}


def test_a_command_whose_reader_has_gone_ends_without_a_message() -> None:
    running = {}
    for unbuffered in ("", "1"):  # the write fails at exit, and at once
        for name, words in COMMANDS.items():
            reader, writer = os.pipe()
            os.close(reader)
            refused = name == "a command that is refused"
            running[name, unbuffered] = subprocess.Popen(
                [sys.executable, "-m", "halos_pl", *words],
                stdout=subprocess.PIPE if refused else writer,
                stderr=writer if refused else subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            )
            os.close(writer)
    for (name, unbuffered), process in running.items():
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out or "", err or "") == (STATUS, "", ""), (name, unbuffered)


def test_a_pipe_that_breaks_elsewhere_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, ending_quietly(), reported():
        raise BrokenPipeError(32, "Broken pipe")
    assert ended.value.code == 1
    assert "BrokenPipeError" in capfd.readouterr().err
