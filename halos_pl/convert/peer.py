"""The base class of libraries whose configs can be converted."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from halos_pl.common.type_words import near
from halos_pl.common.yaml_files import read_yaml, repeated_key
from halos_pl.convert.draft import Draft
from halos_pl.convert.run import ConvertError, Run
from halos_pl.convert.table import table


class Given(NamedTuple):
    """Settings as a user gave them.

    Attributes:
        values: each value by its name.
        places: file and line of each, or the option.
    """

    values: dict[str, Any]
    places: dict[str, str]


class Converted(NamedTuple):
    """A converted config.

    Attributes:
        text: YAML with comments.
        notes: what has no equal or another meaning, one a line.
    """

    text: str
    notes: list[str]


class Peer(ABC):
    """A library whose configs can be converted. A subclass in this package is found by itself."""

    #: Its word on the command line, and its name.
    word: ClassVar[str]
    title: ClassVar[str]
    #: Names of the files with its settings.
    tables: ClassVar[Sequence[str]]
    #: Its trainers, for an option that chooses one; empty if the config says which.
    trainers: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def trainer(self, given: Given, asked: str | None) -> str:
        """The name of the trainer.

        Args:
            given: the user's settings.
            asked: the trainer that an option names, one of ``trainers``.

        Raises:
            ConvertError: it cannot be told, or does not train on preferences or binary feedback.
        """

    @abstractmethod
    def fill(self, run: Run, draft: Draft) -> None:
        """Writes the settings of a run.

        Raises:
            ConvertError: a setting has no equal.
        """

    def read(self, path: Path, overrides: dict[str, Any]) -> Given:
        """The settings of a file, and those that replace them."""
        content, lines = read_yaml(path)
        places = {key: f"{path}:{lines[(key,)]}" for key in content if (key,) in lines}
        return Given(content | overrides, places | dict.fromkeys(overrides, "--overrides"))

    def convert(self, path: Path, *, overrides: str, trainer: str | None, devices: int) -> Converted:
        """Converts a file.

        Args:
            path: config of this library.
            overrides: settings that replace those of the file, such as ``learning_rate=1e-6 max_steps=10``.
            trainer: one of ``trainers``, if the config does not tell.
            devices: number of devices of the run there.

        Raises:
            ConvertError: the file cannot be converted.
            YAMLFileError: the file cannot be read.
        """
        _check_kind(path)
        read = self.read(path, words(overrides))
        renamed = table(*self.tables).renamed
        for old, new in renamed.items():
            if old in read.values and new in read.values:
                raise ConvertError(f"{read.places[old]}: {old} is the old name of {new}, which is given too; remove it")
        values = {renamed.get(key, key): value for key, value in read.values.items()}
        given = Given(values, {renamed.get(key, key): place for key, place in read.places.items()})
        if trainer is not None and trainer not in self.trainers:
            known = ", ".join(self.trainers)
            why = f"it takes {known}" if known else f"a config of {self.title} says what it trains; leave it out"
            raise ConvertError(f"--trainer {trainer}: {why}")
        name = self.trainer(given, trainer)
        run = Run(table(*self.tables), *given, trainer=name, devices=devices)
        draft = Draft()
        self.fill(run, draft)
        run.finish()
        title = f"From {path} by halos convert {self.word} ({run.table.version}). Notes:"
        return Converted(draft.text(title, run.notes), run.notes)


def words(overrides: str) -> dict[str, Any]:
    """Settings in words such as ``KEY=VALUE``, as LLaMA-Factory and Hydra (``++KEY=VALUE``) take them.

    Raises:
        ConvertError: a word is none, or a setting is given twice.
    """
    found: dict[str, Any] = {}
    try:
        split = shlex.split(overrides)
    except ValueError as error:
        raise ConvertError(f"--overrides: {error}; close the quotation") from error
    for word in split:
        key, mark, value = word.lstrip("+").partition("=")
        if not mark or not key or key.startswith("-"):
            raise ConvertError(f"--overrides: {word} is no setting; write KEY=VALUE")
        if key in found:
            raise ConvertError(f"--overrides: {key} is given twice; remove one")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConvertError(f"--overrides: {word}: the value is not YAML") from error
        if twice := repeated_key(value):
            raise ConvertError(f"--overrides: {key}: {twice} is given twice; remove one")
    return found


def _check_kind(path: Path) -> None:
    if path.suffix == ".py":
        raise ConvertError(f"{path} is a script, and code is not read; give the YAML or JSON file of its arguments")
    if path.is_dir():
        raise ConvertError(f"{path} is a folder; name a file in it")
    if not path.exists():
        raise ConvertError(f"{path}: no such file")


def peer_of(word: str, peers: dict[str, Peer]) -> Peer:
    """The library of a word of the command line.

    Raises:
        ConvertError: there is none.
    """
    if word not in peers:
        guess = near(word, peers)
        raise ConvertError(
            f"{word}: configs of {', '.join(peers)} can be converted{f'; did you mean {guess}?' if guess else ''}"
        )
    return peers[word]
