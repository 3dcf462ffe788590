"""Names the key in the config in the error of a class that refuses its settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jsonargparse import add_instantiator

from halos_pl.common.type_words import imported, plain_data


class Refused(BaseException):
    """A constructor has failed; not an ``Exception``, or jsonargparse would try the other alternatives of the type.

    Args:
        cls: the class.
        error: the error of its constructor.
    """

    def __init__(self, cls: type, error: Exception) -> None:
        super().__init__(str(error))
        self.cls, self.error = cls, error


_NAMING: ContextVar[bool] = ContextVar("naming", default=False)


def _make(class_type: type, *args: Any, **kwargs: Any) -> Any:
    try:
        return class_type(*args, **kwargs)
    except Exception as error:
        if _NAMING.get():
            raise Refused(class_type, error) from error
        raise


add_instantiator(_make, object)


@contextmanager
def naming_keys(config: Any, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Adds the key of ``config`` that names a class to the error with which the class refuses its settings.

    Args:
        config: the config whose classes are instantiated inside the context.
        errors: errors by which classes refuse settings; any other is a bug in the class and keeps its traceback.

    Raises:
        ValueError: in one line.
    """
    token = _NAMING.set(True)
    try:
        yield
    except Refused as refused:
        if not isinstance(refused.error, errors):
            raise refused.error from None
        keys = [key for key, path in _classes(plain_data(config)) if imported(path) is refused.cls]
        name, reason = refused.cls.__name__, " ".join(str(refused.error).split())
        named = name in reason or re.match(r"\w+\.\w", reason)
        parts = [*keys[:1], *([] if named else [name]), reason]
        raise ValueError(": ".join(parts)) from refused.error
    finally:
        _NAMING.reset(token)


def _classes(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and path of each class in a config."""
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield key, value["class_path"].strip()
        for name, part in value.items():
            yield from _classes(part, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _classes(part, f"{key}[{i}]")
