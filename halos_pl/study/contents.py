"""What a study's runs are made from, by content: equal on machines where the same files have other paths."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import halos_pl
import value_functions
from halos_pl.data.cache_key import content_hash
from halos_pl.data.formats import files_of
from halos_pl.data.source import Source

#: Settings that say where a run keeps files, not what it is trained from.
KEPT = ("cache_dir",)
#: Settings that may name a folder to read.
READ = ("path", "train", "validation", "test", "predict")


def is_users(file: Path) -> bool:
    """Whether a file belongs neither to an installed package nor to halos_pl, which have a version or a revision."""
    ours = {Path(halos_pl.__file__).parent, Path(value_functions.__file__).parent}
    installed = {Path(path) for path in sysconfig.get_paths().values()}
    return not (ours | installed) & {*file.parents, *file.resolve().parents}


def digest(value: Any) -> str:
    """The SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def config_by_content(node: Any, known: dict[str, str], key: str = "") -> Any:
    """A config in which the name of a file, or of a folder to read, is replaced by a digest of its content.

    Args:
        node: plain data.
        known: digests by path, which are read once; new ones are added.
        key: the key of ``node``.
    """
    if isinstance(node, dict):
        return {name: config_by_content(part, known, str(name)) for name, part in node.items() if name not in KEPT}
    if isinstance(node, list):
        return [config_by_content(part, known, key) for part in node]
    path = os.path.expanduser(os.path.expandvars(node)) if isinstance(node, str) else ""
    if not (os.path.isfile(path) or (key in READ and os.path.isdir(path))):
        return node
    if path not in known:
        known[path] = content_hash(Path(path))
    return {"content": known[path]}


def files_by_content(names: Iterable[str]) -> dict[str, str]:
    """A digest of each file that an evaluation reads, by path.

    Args:
        names: ``files`` of :func:`halos_pl.evaluation.arguments.measuring`: files, folders, patterns or names on the
            hub.
    """
    paths = {source.path for name in names for source in files_of(Source(name))}
    return {path: content_hash(Path(path)) for path in sorted(paths) if Path(path).exists()}


def _content(name: str) -> Any:
    """The digest of a file or folder, those of the files of a pattern, or a name on the hub as it is."""
    path = Path(Source(name).path)
    return content_hash(path) if path.exists() else sorted(files_by_content([name]).values()) or name


def evaluation_by_content(how: Mapping[str, Any]) -> dict[str, Any]:
    """A record of an evaluation in which digests replace the paths of its files.

    Args:
        how: as of :func:`halos_pl.evaluation.arguments.measuring`.
    """
    contents = {name: _content(name) for name in how["files"]}

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replaced(part) for key, part in node.items()}
        if isinstance(node, list | tuple):
            return [replaced(part) for part in node]
        if not isinstance(node, str) or node in contents:
            return contents.get(node, node) if isinstance(node, str) else node
        file, colon, function = node.rpartition(":")
        return [contents[file], function] if colon and file in contents else node

    named = replaced(how["evaluate"])
    plain: dict[str, Any] = json.loads(json.dumps({"evaluate": named, "files": sorted(map(str, contents.values()))}))
    return plain
