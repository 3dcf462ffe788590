"""Base models that a process has loaded for those that are forked from it."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halos_pl.policy.architecture import quantisation
from halos_pl.policy.source import source_of
from halos_pl.policy.spec import ModelSpec

#: Settings that decide which numbers are loaded, and into which layers.
_FIELDS = ("path", "gguf_file", "revision", "dtype", "attn_implementation")
#: Share of the machine's memory that the models may take.
_SHARE = 0.25


@dataclass(frozen=True)
class _Kept:
    """A model, the states of its files when it was loaded, and what loading it printed."""

    model: Any
    files: dict[str, tuple[int, ...]]
    said: str


_kept: dict[str, _Kept | None] = {}  # None: taken, or not to be shared
_missing: Callable[[str], object] | None = None


def report_missing(report: Callable[[str], object]) -> None:
    """Calls ``report`` with a line on each model that this process loads itself, for :func:`keep` before the fork."""
    global _missing
    _missing = report


def take(spec: ModelSpec) -> Any:
    """The model of ``spec`` as loaded before the fork, once; None if there is none, or if its files have changed."""
    if _missing is None or not _shareable(spec):
        return None
    key = json.dumps([getattr(spec, name) for name in _FIELDS])
    if key not in _kept:
        _missing(f"{key}\n")
    kept, _kept[key] = _kept.get(key), None
    if kept is None or kept.files != _files(spec):
        return None
    sys.stderr.write(kept.said)
    return kept.model


def keep(key: str, load: Callable[[ModelSpec], Any], said: Callable[[], str]) -> None:
    """Loads a model for the processes that are forked from this one, if that cannot change what they compute.

    Args:
        key: a line that :func:`report_missing` reported.
        load: loads a model.
        said: what this process has printed since the last call.
    """
    if key in _kept:
        return
    _kept[key] = None
    spec = ModelSpec(**dict(zip(_FIELDS, json.loads(key), strict=True)))
    if not (files := _files(spec)):
        return
    before = _random_states()
    said()
    model = load(spec)
    models = [model, *(kept.model for kept in _kept.values() if kept is not None)]
    size = sum(p.nbytes for each in models for p in each.parameters())
    fits = size <= _SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # If loading draws random numbers, a process that skips it draws others later.
    if fits and quantisation(model) is None and _random_states() == before and _files(spec) == files:
        _kept[key] = _Kept(model, files, said())


def _shareable(spec: ModelSpec) -> bool:
    default = torch.get_default_device().type, torch.get_default_dtype(), torch.is_inference_mode_enabled()
    return spec.quantize is None and not spec.trust_remote_code and default == ("cpu", torch.float32, False)


def _files(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The states of a model's files; none for a model on the hub, whose cache may get another revision."""
    folder = Path(source_of(spec))
    states = {str(path): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()} if folder.is_dir() else {}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in states.items()}


def _random_states() -> tuple[Any, ...]:
    return bytes(torch.get_rng_state().tolist()), random.getstate(), repr(np.random.get_state())
