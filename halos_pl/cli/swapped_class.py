"""Settings of a class that a later config or option replaces by another class.

jsonargparse keeps those that the new class accepts too. That is right for settings that the user wrote, but not for
those of the default class: AdamW's ``eps`` does not suit Adagrad.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from halos_pl.common.type_words import plain_data, shown
from halos_pl.common.yaml_files import read_yaml


def _namespace(content: dict[str, Any]) -> Namespace:
    return Namespace(content)  # type: ignore[no-untyped-call]


class LateDefaults(LightningArgumentParser):
    """Fills in the settings of an option's default class last, and only if no other class was chosen."""

    def _default_classes(self) -> Iterator[tuple[str, Namespace]]:
        for action in self._actions:
            if isinstance(action.default, Mapping | Namespace) and isinstance(action.default.get("class_path"), str):
                yield action.dest, _namespace(plain_data(action.default))

    def _parse_defaults_and_environ(self, defaults: bool = True, *args: Any, **options: Any) -> Namespace:
        config: Namespace = super()._parse_defaults_and_environ(defaults, *args, **options)
        for key, default in self._default_classes() if defaults else ():
            config[key] = _namespace({"class_path": default.class_path})
        return config

    def _parse_common(self, cfg: Namespace, env: Any, defaults: bool, *args: Any, **options: Any) -> Namespace:
        for key, default in self._default_classes() if defaults else ():
            now = cfg.get(key)
            if isinstance(now, Namespace) and now.get("class_path") == default.class_path:
                settings = now.get("init_args")
                now["init_args"] = _namespace({**default.get("init_args", {}), **(vars(settings) if settings else {})})
        return super()._parse_common(cfg, env, defaults, *args, **options)


def swaps(part: Any, config: Any, where: str, key: str = "") -> Iterator[str]:
    """The settings kept and lost where another class has replaced a class.

    Args:
        part: content of one file or option, as mappings.
        config: the resolved config.
        where: name of the file or option.
        key: dotted key of both, so far.

    Yields:
        One sentence per replaced class.
    """
    if isinstance(part, dict) and isinstance(config, str):  # such as fsdp2, the name of a strategy
        lost = [name for name in part.get("init_args", part) if name not in ("class_path", "init_args", "dict_kwargs")]
        if lost:
            yield f"{where}: {key} is now {config}, without the settings {', '.join(lost)}"
    if not isinstance(part, dict) or not isinstance(config, dict):
        return
    before, now = part.get("class_path"), config.get("class_path")
    settings, resolved = part, config
    if isinstance(now, str):
        settings = part.get("init_args", {} if before else part)
        resolved = {**(config.get("init_args") or {}), **(config.get("dict_kwargs") or {})}
    if not isinstance(settings, dict):
        return
    swapped = isinstance(now, str) and before and _short(before) != _short(now)
    lost = [name for name in settings if name not in (*resolved, "class_path", "dict_kwargs")] if now else []
    kept = [f"{name} {shown(resolved[name])}" for name in settings if swapped and settings[name] == resolved.get(name)]
    if kept or lost:
        parts = [f"keeps {', '.join(kept)}"] if kept else []
        parts += [f"does not take {', '.join(lost)}"] if lost else []
        instead = f" instead of {_short(before)}" if swapped else ""
        yield f"{where}: {key} is now {_short(now)}{instead}; it {' and '.join(parts)}"
    if not swapped:
        for name, inner in settings.items():
            yield from swaps(inner, resolved.get(name), where, f"{key}.{name}" if key else name)


def _short(path: Any) -> str:
    return str(path).strip().rpartition(".")[2]


def say_swaps(words: Any, files: Iterable[str], config: Any) -> None:
    """Logs the settings kept and lost where a later file or option has replaced a class."""
    parts: list[tuple[str, Any]] = [(path, read_yaml(path)[0]) for path in files if Path(path).is_file()]
    for word in words if isinstance(words, list) else ():
        if word.startswith("--"):
            tree: Any = None
            for name in reversed(word[2:].partition("=")[0].split(".")):
                tree = tree if name == "init_args" else {name: tree}
            parts.append((word.partition("=")[0], tree))
    for where, content in parts:
        for sentence in swaps(content, plain_data(config), where):
            rank_zero_info(f"halos: {sentence}")
