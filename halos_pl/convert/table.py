"""Tables of other libraries' settings: what each means here, and its default there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from halos_pl.common.yaml_files import read_yaml


@dataclass(frozen=True)
class Setting:
    """A setting of another library.

    Attributes:
        default: its value there if it is not given.
        note: what is written about another value, which is not used.
        refuse: why another value is an error, and what to do; with neither, code reads the setting.
        only: the trainers that have it; empty for all.
        older: whether only earlier versions have it.
    """

    default: Any
    note: str | None = None
    refuse: str | None = None
    only: tuple[str, ...] = ()
    older: bool = False


@dataclass(frozen=True)
class Table:
    """The settings of a library.

    Attributes:
        version: versions that the table was read from.
        settings: each setting by its name.
        defaults: defaults that differ by trainer.
        renamed: present names by old ones.
    """

    version: str
    settings: dict[str, Setting]
    defaults: dict[str, dict[str, Any]]
    renamed: dict[str, str]

    def default(self, key: str, trainer: str) -> Any:
        """The default of a setting for a trainer."""
        for which in (trainer, "all"):
            if key in self.defaults.get(which, {}):
                return self.defaults[which][key]
        return self.settings[key].default

    def is_default(self, key: str, value: Any, trainer: str) -> bool:
        """Whether a value is what a trainer does without the setting; a setting that is null by default is off then."""
        default = self.default(key, trainer)
        return bool(value == default) or (default is None and value is False)

    def of(self, trainer: str) -> Iterator[str]:
        """The names of the settings that a trainer has."""
        return (key for key, each in self.settings.items() if not each.only or trainer in each.only)


@cache
def table(*names: str) -> Table:
    """The table in the files of these names; later files win."""
    versions: list[str] = []
    settings: dict[str, Setting] = {}
    defaults: dict[str, dict[str, Any]] = {}
    renamed: dict[str, str] = {}
    for name in names:
        content = read_yaml(Path(__file__).with_name(f"{name}.yaml"))[0]
        versions.insert(0, content["version"])
        defaults |= content.get("defaults", {})
        renamed |= content.get("renamed", {})
        for group in content["groups"]:
            kind = {key: group.get(key) for key in ("note", "refuse")}
            only, older = tuple(group.get("only", ())), group.get("older", False)
            settings |= {key: Setting(value, **kind, only=only, older=older) for key, value in group["keys"].items()}
    return Table(", ".join(versions), settings, defaults, renamed)
