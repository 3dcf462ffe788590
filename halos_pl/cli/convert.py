"""``halos convert``: turns the config of another library into one of ``halos fit``."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import halos_pl.convert
from halos_pl.cli.errors import RunError
from halos_pl.common.files import write
from halos_pl.common.own_plugins import import_all
from halos_pl.common.subclasses import subclasses
from halos_pl.convert.peer import Peer, peer_of
from halos_pl.convert.run import ConvertError


def peers() -> dict[str, Peer]:
    """The libraries whose configs can be converted, by their words."""
    import_all(halos_pl.convert)
    found = [each() for each in subclasses(Peer)]
    return {peer.word: peer for peer in found}


def convert(
    library: str,
    file: str,
    *,
    trainer: str | None = None,
    overrides: str = "",
    devices: int = 1,
    out: str | None = None,
) -> None:
    """Convert the config of another library into one for halos fit --config.

    Args:
        library: trl, llamafactory or halos (the HALOs code).
        file: its config: arguments in YAML or JSON, a recipe, or config.yaml.
        trainer: kto, dpo, cpo, orpo or reward, for a config of TRL that does not tell.
        overrides: settings of that library that replace those of the file, as KEY=VALUE with spaces between them.
        devices: number of devices of the run there, for the size of a step.
        out: file to write; default: the terminal.

    Raises:
        ConvertError: the config cannot be converted.
        FileExistsError: the file to write exists.
    """
    if devices < 1:
        raise ConvertError(f"--devices is {devices}; it must be at least 1")
    if out is not None and Path(out).exists():
        raise FileExistsError(f"{out} already exists; choose another name")
    found = peer_of(library, peers()).convert(Path(file), overrides=overrides, trainer=trainer, devices=devices)
    _check(found.text, file)
    if out is None:
        print(found.text, end="")
        return
    write(Path(out), found.text)
    for note in found.notes:
        print(f"halos: {note}", file=sys.stderr)
    print(f"halos: wrote {out}; next: halos fit --config {out}")


_SEED = "PL_GLOBAL_SEED"


def _check(text: str, file: str) -> None:
    """Refuses a config that ``halos fit`` would, before it is written.

    Raises:
        RunError: names the file and the fault.
    """
    from halos_pl.cli.run_settings import parsed

    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # no run is seeded here
    seed = os.environ.get(_SEED)  # which the parser sets to the config's, although nothing is trained
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(text, encoding="utf-8")
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                parsed([f"--config={config}"])
        except (ValueError, RuntimeError, SystemExit) as error:
            why = getattr(error, "line", str(error)).replace(f"{config}: ", "")
            raise RunError(f"{file}: its conversion is not a valid config: {why}") from error
        finally:
            os.environ.pop(_SEED, None)
            os.environ |= {} if seed is None else {_SEED: seed}
