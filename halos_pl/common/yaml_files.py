"""Reads YAML files in UTF-8, and refuses values that YAML would read in an unexpected way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: The line of each key and list item, by its path.
Lines = dict[tuple[str, ...], int]

_MOST_NODES = 100_000
_MOST_LEVELS = 100
# Numbers that YAML 1.1 reads in a base other than 10: 010 is 8, and 1:30 is 90.
_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class YAMLFileError(ValueError):
    """A file that cannot be used; the message names file and line."""


class _Loader(yaml.CSafeLoader):
    """Reads dates as texts, as the command line does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
# Members of a string enumeration, as in Lightning's defaults, are written as strings.
yaml.SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in a file, and the line of each of its keys.

    Raises:
        OSError: if the file cannot be read.
        YAMLFileError: if it is not UTF-8, not YAML or not a mapping, or has a duplicate key or an ambiguous number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise YAMLFileError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines = _lines(node, path)
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, YAMLFileError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise YAMLFileError(f"{path}{line}: not YAML: {' '.join(str(problem).split())}") from error
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"contains {_kind(content)}"
        raise YAMLFileError(f"{path} {what}; it takes a mapping, lines such as KEY: VALUE")
    return content, lines


def repeated_key(text: str) -> str | None:
    """The first key that a mapping in a text has twice, of which YAML would keep the last value; None if there is none.

    A text that is not YAML has none.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        places = [place for place, _ in _places(root)] if root is not None else []
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return next((".".join(place) for i, place in enumerate(places) if place in places[:i]), None)


def _kind(content: Any) -> str:
    return "a list" if isinstance(content, list) else f"only {content!r:.60}"


def _lines(root: yaml.Node | None, path: str | Path) -> Lines:
    """The line of each key and item; refuses duplicate keys and ambiguous numbers."""
    lines: Lines = {}
    if root is not None:
        _size(root, path, {}, set())
        for place, node in _places(root):
            first, line = lines.get(place), node.start_mark.line + 1
            if first is not None:  # YAML would keep the last one
                raise YAMLFileError(f"{path}:{line}: {place[-1]!r} is already in line {first}; remove one")
            lines[place] = line
    return lines


def _size(node: yaml.Node, path: str | Path, sizes: dict[int, int], within: set[int]) -> int:
    """Number of nodes below a node, itself included, once its aliases are expanded."""
    line = node.start_mark.line + 1
    if id(node) in within:
        raise YAMLFileError(f"{path}:{line}: an anchor that contains itself")
    if len(within) > _MOST_LEVELS:
        raise YAMLFileError(f"{path}:{line}: nested more than {_MOST_LEVELS} levels deep")
    if id(node) not in sizes:
        if isinstance(node, yaml.ScalarNode):
            if not node.style and _OTHER_BASE.fullmatch(node.value) and node.tag.endswith((":int", ":float")):
                raise YAMLFileError(
                    f"{path}:{line}: YAML reads {node.value} in a base other than 10; put it in quotes if it is a"
                    " name, and leave out leading zeros if it is a number"
                )
            sizes[id(node)] = 1
        else:
            pairs = isinstance(node, yaml.MappingNode)
            parts = [part for pair in node.value for part in pair] if pairs else node.value
            sizes[id(node)] = 1 + sum(_size(part, path, sizes, within | {id(node)}) for part in parts)
        if sizes[id(node)] > _MOST_NODES:
            raise YAMLFileError(f"{path}:{line}: more than {_MOST_NODES:,} values once its aliases are expanded")
    return sizes[id(node)]


def _places(node: yaml.Node, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], yaml.Node]]:
    """The node of each key and list item of a document, by its path."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                name = key.value if isinstance(key, yaml.ScalarNode) else str(key.start_mark.index)
                yield (*at, name), key
                yield from _places(value, (*at, name))
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield (*at, str(i)), item
            yield from _places(item, (*at, str(i)))
