"""Measures how long commands take to start: seconds from call to exit, and the heavy libraries that they import.

    python benchmarks/startup.py --repeats 5

Each command runs once before it is timed: the first start after a boot also reads the libraries from disk, and the
first ``fit --help`` caches the text that later calls print.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from halos_pl.common.experiments import EXPERIMENTS
from halos_pl.study.state import STUDY

#: Each command with its target in seconds on an idle core.
COMMANDS = {
    "--version": 1.5,
    "--help": 1.5,
    "cache info": 1.5,
    "objectives": 1.5,
    "ablate status FOLDER": 1.5,
    "check --help": None,
    "fit --help": 4.0,
}
LIBRARIES = ("torch", "lightning", "transformers", "scipy", "matplotlib", "datasets", "statsmodels", "hypothesis")


def run(words: list[str]) -> float:
    """Run time of a command, in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "halos_pl", *words], capture_output=True, check=True)
    return time.perf_counter() - start


def imports(words: list[str]) -> list[str]:
    """The heavy libraries that a command imports."""
    code = (
        "import contextlib, os, sys\n"
        "from halos_pl.cli.main import main\n"
        "with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null),"
        " contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        f"print(*(name for name in {LIBRARIES} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return done.stdout.split()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("| halos ... | seconds, median | range | target | imports |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(EXPERIMENTS / "ablations" / "beta.yaml", Path(folder) / STUDY)
        for command, limit in COMMANDS.items():
            words = [folder if word == "FOLDER" else word for word in command.split()]
            loaded = imports(words)  # also warms the disk caches
            times = [run(words) for _ in range(repeats)]
            spread = f"{min(times):.2f} to {max(times):.2f}"
            most = f"{limit:g}" if limit else ""
            print(
                f"| {command} | {statistics.median(times):.2f} | {spread} | {most} | {', '.join(loaded)} |", flush=True
            )


if __name__ == "__main__":
    main()
