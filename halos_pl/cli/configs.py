"""Finds, orders and checks the config files of a Trainer command.

``base.yaml`` comes first, then the file of ``--objective``, then those of ``--config`` in order, then all other
options, wherever they are on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import Callback

from halos_pl.cli.errors import RunError
from halos_pl.cli.help_page import TRAINER_COMMANDS
from halos_pl.common.config_keys import GROUPS, check_groups
from halos_pl.common.experiments import BASE, config_file, is_shipped, objectives, presets
from halos_pl.common.misplaced import read_config
from halos_pl.common.own_plugins import import_own
from halos_pl.common.yaml_files import YAMLFileError
from halos_pl.data.transforms import Transform
from halos_pl.objective.build import KINDS as OF_OBJECTIVES
from halos_pl.policy.reference import ReferenceModel
from halos_pl.run_dir import CONFIG, LAST

#: Options that only the command line has. The parser ignores the first in a file.
OPTIONS = ("config", "objective", "no_base", "print_config")
#: Kinds of plug-ins that are found in the working folder by their bare names.
KINDS = (*OF_OBJECTIVES, ReferenceModel, Transform, Callback)
_RESOLVED = {*GROUPS, "seed_everything", "run_dir"}


def expanded(words: Sequence[str]) -> list[str]:
    """The words of a Trainer command, with the paths of all its configs first.

    ``base.yaml`` is implied, unless ``--no_base`` is given or a config contains every setting, as a run's
    ``config.yaml`` does.

    Raises:
        PresetError: if the name of a config matches no file, or two.
        RunError: if ``--objective`` is given twice, or has no effect.
        YAMLFileError: if a file cannot be used.
    """
    words = list(words)
    command = [words.pop(0)] if words[:1] and words[0] in TRAINER_COMMANDS else []
    names: dict[str, list[str]] = {"--objective": [], "--config": []}
    others: list[str] = []
    base = True
    while words:
        word = words.pop(0)
        flag, mark, value = word.partition("=")
        if word.startswith("-c") and not mark and len(word) > 2:  # -cFILE
            flag, mark, value = "-c", "=", word[2:]
        # The parser accepts abbreviations too, but would read such a file in the place where it is named.
        flag = "--config" if flag == "-c" or (len(flag) > 3 and "--config".startswith(flag)) else flag
        if flag == "--no_base":
            value = value if mark else words.pop(0) if words[:1] in (["true"], ["false"]) else "true"
            base = value != "true"
        elif flag in names and (mark or words):
            names[flag].append(value if mark else words.pop(0))
        else:
            others.append(word)
    chosen = [str(config_file(name, objectives(), "--objective")) for name in names["--objective"]]
    files = [str(config_file(name, presets(), "--config")) for name in names["--config"]]
    if len(chosen) > 1:
        raise RunError(f"--objective is given twice, {' and '.join(names['--objective'])}; give only one")
    contents = check_files([*chosen, *files])
    resolved = next((path for path, content in contents.items() if content.keys() >= _RESOLVED), None)
    if resolved and chosen:
        raise RunError(
            f"--objective {names['--objective'][0]} has no effect, as {resolved} contains every setting; remove one"
        )
    if base and not resolved and not any(Path(file).resolve() == BASE.resolve() for file in files):
        chosen.insert(0, str(BASE))
    users = [content for path, content in contents.items() if not is_shipped(path)]
    import_own([*users, *map(_value, others)], KINDS)
    return [*command, *(f"--config={file}" for file in (*chosen, *files)), *others]


def _value(word: str) -> Any:
    """The value in a word, parsed as YAML."""
    text = word.partition("=")[2] if word.startswith("--") else word
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def check_files(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Refuses config files that a parser would misread or could not read.

    Returns:
        Content of each file, except pipes, which can be read only once.

    Raises:
        YAMLFileError: names file and line.
    """
    contents = {}
    for path in paths:
        if Path(path).is_file():
            contents[path], lines = read_config(path)
            for key in OPTIONS:
                if contents[path].get(key) is not None:
                    raise YAMLFileError(
                        f"{path}:{lines[(key,)]}: {key} is an option of the command line, not of a config; use --{key}"
                    )
            check_groups(path, contents[path], lines)
    return contents


def config_files(words: Sequence[Any]) -> list[str]:
    """The config files among expanded words."""
    return [str(word).partition("=")[2] for word in words if str(word).startswith("--config=")]


def placed(message: str, words: Sequence[Any], folder: Path) -> str:
    """A message about an option, with file and line before the option if only one file of the user's can be at fault.

    Args:
        message: the message, which names the option after ``error:``.
        words: expanded words of the command.
        folder: working folder of the command; the parser reads each file in the file's own folder.
    """
    named = re.search(r"(?:error: |does not accept option ')(?P<key>\w+(?:\.\w+)+)", message)
    key = named["key"] if named else ""
    others = [str(word).partition("=")[0].removeprefix("--") for word in words if str(word).startswith("--")]
    shorter = re.sub(r"\.(class_path|init_args)\b", "", key)
    # The command line may be at fault, too, if it sets the option or what contains it.
    if not key or any(re.match(rf"{re.escape(other)}(\.|$)", k) for other in others for k in (key, shorter)):
        return message
    places = []
    for path in config_files(words):
        file = folder / path
        if file.is_file() and not is_shipped(file):
            line = read_config(file)[1].get(tuple(key.split(".")))
            places += [f"{path}:{line}"] if line is not None else []
    return message.replace("error: ", f"error: {places[0]}: ", 1) if len(places) == 1 else message


def refuse_moved(words: Any, run_dir: Path) -> None:
    """Refuses the config of a run whose folder was moved: the old path may belong to another run.

    Raises:
        RunError: names both folders.
    """
    if any(isinstance(word, str) and word.partition("=")[0] == "--run_dir" for word in words):
        return
    for path in config_files(words):
        folder = Path(path).parent
        if Path(path).name == CONFIG and (folder / LAST).exists() and folder.resolve() != run_dir.resolve():
            raise RunError(
                f"{path} belongs to a run, but its run_dir is {run_dir}: the folder was moved or copied; add"
                f" --run_dir {folder} to use that run"
            )
