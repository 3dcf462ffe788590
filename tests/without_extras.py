"""Loaded first into the process that runs of ``halos`` are forked from: it has no package but the declared ones.

What a user has who says ``pip install halos_pl``, without an extra. pytest itself stays: it may be the parent's script.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

#: Hypothesis is declared too, but no command may need it to start.
MISSING = {
    "hypothesis",
    "trl",
    "xdist",
    "ruff",
    "mypy",
    "submitit",
    "tensorboard",
    "tensorboardX",
    "wandb",
    "liger_kernel",
    "lm_eval",
    "alpaca_eval",
    "openai",
    "starlette",
    "uvicorn",
    "playwright",
}


class _Without:
    """A finder of modules that does not find those."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        missing = fullname.partition(".")[0] in MISSING
        return None if missing else self._finder.find_spec(fullname, path, target)


sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
