"""The shape of ``record.json``, which people may edit and disks may damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Stands for a text, for a number, and for anything.
TEXT, NUMBER, ANY = "a text", "a number", "anything"
#: What each part contains: a tuple has alternatives, a list items of one kind, a mapping with ``*`` values of one kind
#: under any key, and another mapping its parts, any of which may be missing.
_FILES = {"*": TEXT}
_MADE = [{"*": ANY, "runs": NUMBER, "names": [TEXT]}]  # no part is missing
_SHAPE: dict[str, Any] = {
    "study": TEXT,
    "overrides": (TEXT, None),
    "out": TEXT,
    "primary": (TEXT, None),
    "starts": {"*": TEXT},
    "models": {"*": TEXT},
    "measured": ({"*": _FILES}, None),
    "made": _MADE,
    "data": {"*": [TEXT]},
    "missing": [{"*": TEXT}],
    "verdicts": {"*": TEXT},
    "tuning": {"option": TEXT, "examples": NUMBER, "chosen": {"*": ANY}},
    "by_content": {
        "arms": {"*": TEXT},
        "measured": ({"*": ANY}, None),
        "tuning": ({"*": ANY}, None),
        "files": {"*": TEXT},
    },
}
#: Parts of ``by_content`` that are read without a default.
_NEEDED = ("arms", "measured", "tuning", "files")


def misshapen(record: Mapping[str, Any]) -> str:
    """The first part of a record that has another shape than a study writes; empty if there is none."""
    if fault := fault_in(record, _SHAPE) or fault_in(record.get("made", []), _MADE, "made", whole=True):
        return fault
    lacks = [key for key in _NEEDED if key not in record["by_content"]] if "by_content" in record else []
    return f"by_content lacks {', '.join(lacks)}" if lacks else ""


def fault_in(value: Any, shape: Any, name: str = "", *, whole: bool = False) -> str:
    """The first part of a value that has another shape, written like ``_SHAPE``; empty if there is none.

    Args:
        value, shape: the value and its shape.
        name: its name.
        whole: whether no part of the shape may be missing.
    """
    if isinstance(shape, tuple):
        faults = [fault_in(value, each, name, whole=whole) for each in shape]
        return faults[0] if all(faults) else ""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name or 'it'} is {value!r:.60}, not an object"
        if whole and (lacks := [key for key in shape if key not in value and key != "*"]):
            return f"{name or 'it'} lacks {', '.join(lacks)}"
        parts = [(part, shape.get(key, shape.get("*", ANY)), f"{name}.{key}".strip(".")) for key, part in value.items()]
        return next(filter(None, (fault_in(*each, whole=whole) for each in parts)), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is {value!r:.60}, not a list"
        return next(
            filter(None, (fault_in(part, shape[0], f"{name}[{i}]", whole=whole) for i, part in enumerate(value))), ""
        )
    right = {
        TEXT: isinstance(value, str),
        NUMBER: isinstance(value, int | float) and not isinstance(value, bool),
        None: value is None,
    }
    return "" if right.get(shape, True) else f"{name} is {value!r:.60}, not {shape or 'null'}"
