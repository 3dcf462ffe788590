"""Bare names of classes that jsonargparse does not know, or refuses as ambiguous.

bitsandbytes calls its optimizers as torch does, and peft imports it wherever it is installed. Lightning has names for
its strategies, such as ``ddp``, which jsonargparse takes for texts: ``--trainer.strategy fsdp2
--trainer.strategy.replicas 2`` would be an error.
"""

from __future__ import annotations

import inspect
from typing import Any

from jsonargparse import _typehints
from lightning.pytorch.strategies import Strategy, StrategyRegistry

_resolve = _typehints.resolve_class_path_by_name


def strategy_class(name: Any) -> Any:
    """The class that Lightning makes for the name of a strategy with default settings; None for any other value."""
    entry = StrategyRegistry[name] if isinstance(name, str) and name in StrategyRegistry else None
    if entry is None:
        return None
    defaults = inspect.signature(entry["strategy"]).parameters
    plain = all(key in defaults and defaults[key].default == value for key, value in entry["init_params"].items())
    return entry["strategy"] if plain else None


def resolve(cls: Any, name: str) -> str:
    """The path of the class with a bare name; torch's if several extend a class of torch.

    Raises:
        ValueError: if the name remains ambiguous.
    """
    if cls is Strategy and (strategy := strategy_class(name)) is not None:
        return f"{strategy.__module__}.{strategy.__name__}"
    try:
        return _resolve(cls, name)
    except ValueError:
        if isinstance(cls, tuple) or not cls.__module__.startswith("torch."):
            raise
        paths = [path for path in _typehints.get_all_subclass_paths(cls) if path.rpartition(".")[2] == name]
        of_torch = [path for path in paths if path.startswith("torch.")]
        if len(of_torch) != 1:
            raise
        return of_torch[0]


def prefer_torch() -> None:
    """Makes jsonargparse use :func:`resolve`."""
    _typehints.resolve_class_path_by_name = resolve
