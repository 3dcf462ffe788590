"""The files of a user's code: a Python file and what it imports from its own folder."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path


def with_imports(path: Path) -> list[Path]:
    """A Python file and the files in or below its folder that it imports, also through each other; sorted.

    The code is read, not executed, so imports inside functions count, and names that are computed do not.

    Raises:
        OSError: a file cannot be read.
    """
    found, left = {path}, [path]
    while left:
        file = left.pop()
        new = {each for each in _imported(file, path.parent) if each.is_file()} - found
        new = {each for each in new if each.is_relative_to(path.parent)}
        found |= new
        left += new
    return sorted(found)


def code_digest(path: Path) -> str:
    """The SHA-256 of the names and contents of :func:`with_imports`.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in with_imports(path):
        digest.update(f"{file.relative_to(path.parent)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _imported(file: Path, folder: Path) -> Iterator[Path]:
    """Where the modules that a file imports would be, if they are in ``folder``."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # its import fails, which the importing file may expect
        return
    for node in ast.walk(tree):
        names, base = [], folder
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
            base = file.parents[min(node.level, len(file.parents)) - 1] if node.level else folder
        for name in names:
            place = base
            for part in name.split("."):
                place /= part
                yield place.with_name(f"{part}.py")
                yield place / "__init__.py"
