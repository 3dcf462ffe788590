"""The console script ``halos``."""

from __future__ import annotations

import os
import sys

from halos_pl.stopping import listening


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; ``args`` are its words, left out those of this process."""
    # Plug-ins of the user's own are named by dotted path, from the folder where the command is run.
    sys.path.insert(0, os.getcwd())
    words = sys.argv[1:] if args is None else args
    with listening(words):
        # Imported by command: a check takes less time than it takes to load Lightning and transformers.
        if words[:1] == ["check"]:
            from halos_pl import check_command

            check_command.run(words[1:])
        else:
            from halos_pl import lightning_cli

            lightning_cli.run(args)
