"""Refuses an objective's YAML file that ``halos fit`` would refuse for what it says beside the objective."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from halos_pl.cli.errors import UsageError, quiet_imports
from halos_pl.common.experiments import is_shipped, objectives
from halos_pl.common.yaml_files import read_yaml
from halos_pl.conformance.target import TargetError, one_line
from halos_pl.objective.build import OF_THE_OBJECTIVE


def refuse_as_fit(target: str) -> None:
    """Has the parser of ``halos fit`` read a YAML file, unless it says nothing but what shipped files do.

    Args:
        target: path of a file that describes an objective. Other targets are left to who loads them.

    Raises:
        TargetError: a fit takes no such key or value; names the file.
    """
    if not target.endswith((".yaml", ".yml")) or is_shipped(target):
        return
    usual = _beside_the_objective(read_yaml(next(iter(objectives().values())))[0])
    if _beside_the_objective(read_yaml(target)[0]).items() <= usual.items():
        return  # the parser imports Lightning, which takes longer than the check
    quiet_imports()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            from halos_pl.cli.lightning_cli import HalosCLI

            HalosCLI(["--objective", target, "--print_config"], run=False)
        except UsageError as error:
            reason = error.line.removeprefix("halos: error: ").replace("halos --help", "halos fit --help")
        except SystemExit:  # it has printed the config
            return
        except Exception as error:
            reason = one_line(error)
    raise TargetError(reason if target in reason else f"{target}: {reason}")


def _beside_the_objective(content: Mapping[str, Any]) -> dict[str, str]:
    """What a config says beside its objective, by section and key."""
    said: dict[str, str] = {}
    for section, settings in content.items():
        if not isinstance(settings, dict):
            said[str(section)] = repr(settings)
            continue
        said |= {
            f"{section}.{k}": repr(v) for k, v in settings.items() if section != "model" or k not in OF_THE_OBJECTIVE
        }
    return said
