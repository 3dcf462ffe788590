"""A config of ``halos fit`` that is being written, with a comment on the origin of each setting."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

_WIDTH = 116


class Draft:
    """A config of ``halos fit``, by dotted keys in the order in which they are set."""

    def __init__(self) -> None:
        self.content: dict[str, Any] = {}
        self._origins: dict[tuple[str, ...], str] = {}

    def set(self, key: str, value: Any, origin: str = "") -> None:
        """Sets a value.

        Args:
            key: dotted key.
            value: plain data.
            origin: the other library's name of the setting, for a comment.
        """
        *outer, last = key.split(".")
        place = self.content
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = value
        self._origins[tuple(key.split("."))] = origin

    def text(self, title: str, notes: Sequence[str]) -> str:
        """The config as YAML, after a title and notes in comments."""
        head = [f"# {line}" for line in textwrap.wrap(title, _WIDTH)]
        for note in notes:
            head += [f"# {line}" for line in textwrap.wrap(f"- {note}", _WIDTH, subsequent_indent="  ")]
        return "\n".join([*head, *self._lines(self.content, ())]) + "\n"

    def _lines(self, node: dict[str, Any], at: tuple[str, ...]) -> Iterator[str]:
        for name, value in node.items():
            place, indent = (*at, name), "  " * len(at)
            if isinstance(value, dict) and value and place not in self._origins:
                yield f"{indent}{name}:"
                yield from self._lines(value, place)
            else:
                flow = yaml.dump(value, Dumper=yaml.CSafeDumper, default_flow_style=True, width=2**30, sort_keys=False)
                origin = self._origins.get(place)
                written = flow.removesuffix("\n").removesuffix("\n...")
                yield f"{indent}{name}: {written}{f'  # {origin}' if origin else ''}"
