"""What becomes of a class's settings when a later config or option names another class in its place.

jsonargparse keeps those that the new class takes as well. What the user wrote stays so, but the settings of the default
class, which nobody wrote, must not: AdamW's ``eps`` is none for Adagrad.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from halos_pl.common.wrong_value import plain_data, shown
from halos_pl.common.yaml_files import read_yaml


def _namespace(content: dict[str, Any]) -> Namespace:
    return Namespace(content)  # type: ignore[no-untyped-call]


class LateDefaults(LightningArgumentParser):
    """Fills in the settings of an option's default class last, and only where no other class was named."""

    def _default_classes(self) -> Iterator[tuple[str, Namespace]]:
        for action in self._actions:
            if isinstance(action.default, Mapping | Namespace) and isinstance(action.default.get("class_path"), str):
                yield action.dest, _namespace(plain_data(action.default))

    def _parse_defaults_and_environ(self, defaults: bool = True, *given: Any, **options: Any) -> Namespace:
        config: Namespace = super()._parse_defaults_and_environ(defaults, *given, **options)
        for key, default in self._default_classes() if defaults else ():
            config[key] = _namespace({"class_path": default.class_path})
        return config

    def _parse_common(self, cfg: Namespace, env: Any, defaults: bool, *given: Any, **options: Any) -> Namespace:
        for key, default in self._default_classes() if defaults else ():
            now = cfg.get(key)
            if isinstance(now, Namespace) and now.get("class_path") == default.class_path:
                settings = now.get("init_args")
                now["init_args"] = _namespace({**default.get("init_args", {}), **(vars(settings) if settings else {})})
        return super()._parse_common(cfg, env, defaults, *given, **options)


def swaps(given: Any, config: Any, where: str, key: str = "") -> Iterator[str]:
    """What became of settings that were given for a class in whose place the config names another one.

    Args:
        given: what a file or an option says, as mappings.
        config: the resolved config.
        where: the file or option.
        key: what leads to both.

    Yields:
        A sentence for each such class.
    """
    if not isinstance(given, dict) or not isinstance(config, dict):
        return
    before, now = given.get("class_path"), config.get("class_path")
    settings, known = given, config
    if isinstance(now, str):
        settings = given.get("init_args", {} if before else given)
        known = {**(config.get("init_args") or {}), **(config.get("dict_kwargs") or {})}
    if not isinstance(settings, dict):
        return
    swapped = isinstance(now, str) and before and _short(before) != _short(now)
    lost = [name for name in settings if name not in (*known, "class_path", "dict_kwargs")] if now else []
    kept = [f"{name} {shown(known[name])}" for name in settings if swapped and settings[name] == known.get(name)]
    if kept or lost:
        parts = [f"keeps {', '.join(kept)}"] if kept else []
        parts += [f"does not take {', '.join(lost)}"] if lost else []
        instead = f" instead of {_short(before)}" if swapped else ""
        yield f"{where}: {key} is now {_short(now)}{instead}; it {' and '.join(parts)}"
    if not swapped:
        for name, part in settings.items():
            yield from swaps(part, known.get(name), where, f"{key}.{name}" if key else name)


def _short(path: Any) -> str:
    return str(path).strip().rpartition(".")[2]


def say_swaps(words: Any, files: Iterable[str], config: Any) -> None:
    """Says what became of settings in config files and options whose class another file or option has replaced."""
    given: list[tuple[str, Any]] = [(path, read_yaml(path)[0]) for path in files if Path(path).is_file()]
    for word in words if isinstance(words, list) else ():
        if word.startswith("--"):
            tree: Any = None
            for name in reversed(word[2:].partition("=")[0].split(".")):
                tree = tree if name == "init_args" else {name: tree}
            given.append((word.partition("=")[0], tree))
    for where, content in given:
        for said in swaps(content, plain_data(config), where):
            rank_zero_info(f"halos: {said}")
