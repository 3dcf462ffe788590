"""The shape of ``record.json``, which people may edit and disks may damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Stands for a text, for a number, and for anything.
_TEXT, _NUMBER, _ANY = "a text", "a number", "anything"
#: What each part contains: a tuple has alternatives, a list items of one kind, a mapping with ``*`` values of one kind
#: under any key, and another mapping its parts, any of which may be missing.
_FILES = {"*": _TEXT}
_SHAPE: dict[str, Any] = {
    "study": _TEXT,
    "overrides": (_TEXT, None),
    "out": _TEXT,
    "primary": (_TEXT, None),
    "starts": {"*": _TEXT},
    "models": {"*": _TEXT},
    "measured": ({"*": _FILES}, None),
    "made": [{"*": _ANY, "names": [_TEXT]}],
    "data": {"*": [_TEXT]},
    "missing": [{"*": _TEXT}],
    "verdicts": {"*": _TEXT},
    "tuning": {"option": _TEXT, "examples": _NUMBER, "chosen": {"*": _ANY}},
    "by_content": {
        "arms": {"*": _TEXT},
        "measured": ({"*": _ANY}, None),
        "tuning": ({"*": _ANY}, None),
        "files": {"*": _TEXT},
    },
}
#: Parts of ``by_content`` that are read without a default.
_NEEDED = ("arms", "measured", "tuning", "files")


def misshapen(record: Mapping[str, Any]) -> str:
    """The first part of a record that has another shape than a study writes; empty if there is none."""
    if fault := _fault(record, _SHAPE, ""):
        return fault
    lacks = [key for key in _NEEDED if key not in record["by_content"]] if "by_content" in record else []
    return f"by_content lacks {', '.join(lacks)}" if lacks else ""


def _fault(value: Any, shape: Any, name: str) -> str:
    if isinstance(shape, tuple):
        faults = [_fault(value, each, name) for each in shape]
        return faults[0] if all(faults) else ""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is {value!r:.60}, not an object"
        parts = [
            (part, shape.get(key, shape.get("*", _ANY)), f"{name}.{key}".strip(".")) for key, part in value.items()
        ]
        return next(filter(None, (_fault(*each) for each in parts)), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is {value!r:.60}, not a list"
        return next(filter(None, (_fault(part, shape[0], f"{name}[{i}]") for i, part in enumerate(value))), "")
    right = {
        _TEXT: isinstance(value, str),
        _NUMBER: isinstance(value, int | float) and not isinstance(value, bool),
        None: value is None,
    }
    return "" if right.get(shape, True) else f"{name} is {value!r:.60}, not {shape or 'null'}"
