"""A run of another library: the settings that its user gave, and its defaults for the others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from halos_pl.common.type_words import near, shown
from halos_pl.convert.table import Table

#: Numbers that YAML 1.1 reads as texts, and these libraries as numbers.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class ConvertError(ValueError):
    """A config that cannot be converted; the message names file, key and what to do."""


class Run:
    """The settings of a run of another library.

    Args:
        table: the library's settings.
        given: values by name, as the user gave them.
        places: for each name, the file and line where it is given, or the option.
        trainer: name of the trainer, such as ``kto``.
        devices: number of devices of the run.

    Raises:
        ConvertError: a setting is unknown, belongs to another trainer, or has a value without an equal here.
    """

    def __init__(
        self, table: Table, given: Mapping[str, Any], places: Mapping[str, str], *, trainer: str, devices: int
    ) -> None:
        self.table, self.places = table, dict(places)
        self.given = {key: _number(value) for key, value in given.items()}
        self.trainer, self.devices = trainer, devices
        self.notes: list[str] = []
        self._used: set[str] = set()
        known = list(table.of(trainer))
        for key, value in self.given.items():
            setting = table.settings.get(key)
            if setting is None:
                guess = near(key, known)
                raise self.error(key, f"there is no such setting{f'; did you mean {guess}?' if guess else ''}")
            if key not in known:
                raise self.error(key, f"{trainer} has no such setting, only {', '.join(setting.only)}; remove it")
            if table.is_default(key, value, trainer):
                continue
            if setting.refuse:
                raise self.error(key, f"it is {shown(value)}: {setting.refuse}")
            if setting.note:
                self.note(key, setting.note)

    def error(self, key: str, why: str) -> ConvertError:
        """An error about a setting, with its place."""
        return ConvertError(f"{self.places.get(key, self.trainer)}: {key}: {why}")

    def note(self, key: str, text: str) -> None:
        """Notes something that the user should know about a setting. Passwords are not shown."""
        shows = key in self.given and not key.endswith(("token", "api_key"))
        value = f" {shown(self.given[key])}" if shows else ""
        self.notes.append(f"{key}{value}: {text}")

    def value(self, key: str) -> Any:
        """The value of a setting, given or the library's default."""
        self._used.add(key)
        return self.given[key] if key in self.given else self.table.default(key, self.trainer)

    def flag(self, key: str) -> bool:
        """A value that is true or false; null is false."""
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"it is {shown(value)}; it must be true or false")
        return bool(value)

    def number(self, key: str) -> float:
        """A number."""
        value = self.value(key)
        try:
            number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(key, f"it is {shown(value)}; it must be a number")
        return number

    def whole(self, key: str) -> int:
        """A whole number."""
        number = self.number(key)
        if number != int(number):
            raise self.error(key, f"it is {number:g}; it must be a whole number")
        return int(number)

    def text(self, key: str) -> str | None:
        """A text, or None."""
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"it is {shown(value)}; it must be a text")
        return value

    def required(self, key: str) -> str:
        """A text that must be given."""
        if not (value := self.text(key)):
            raise self.error(key, "it is not given; add it to the file, or to --overrides")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of the texts that have an equal here."""
        value = self.value(key)
        value = "no" if value is False else str(value)  # YAML reads a bare no as false
        if value not in choices:
            raise self.error(key, f"{value} has no equal here; choose one of {', '.join(choices)}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; one text may list several, separated by commas."""
        value = self.value(key)
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value or []
        if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
            raise self.error(key, f"it is {shown(value)}; it must be a text, or a list of texts")
        return parts

    def finish(self) -> None:
        """Notes the settings that were given but have no effect on this run."""
        for key, value in self.given.items():
            setting = self.table.settings[key]
            is_default = self.table.is_default(key, value, self.trainer)
            if not (setting.note or setting.refuse or key in self._used or is_default):
                self.note(key, "it has no effect on this run")


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
