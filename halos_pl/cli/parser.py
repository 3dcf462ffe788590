"""The parser of every command: an error about an option is one line, with the valid alternatives."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from halos_pl.cli.errors import UsageError
from halos_pl.cli.help_page import TRAINER_COMMANDS
from halos_pl.common.messages import cause, plain
from halos_pl.common.misplaced import misplaced
from halos_pl.common.parser_errors import cause_in
from halos_pl.common.renamed import VALUES, renamed
from halos_pl.common.type_words import known_classes

# jsonargparse's wording for unknown options: of a class or file, of a command in a file, on the command line.
UNKNOWN_OPTION = r"(?:^Option '|does not accept option '|unrecognized arguments: -*)(?P<key>[\w.]+)"


#: Options for config files, which are read before the other options are parsed.
PRESET_OPTIONS = {
    "objective": "The loss: a name from halos objectives, or a YAML file. Configs and options override it.",
    "no_base": "Do not start from the settings of the shipped base.yaml.",
}


class HalosParser(ArgumentParser):
    """Suggests valid names when the name of a plug-in or an option is wrong, which jsonargparse does not."""

    def _near(self, key: str) -> str:
        """Options with names similar to ``key``, or all of them if they are few, as in a plug-in."""
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        names = {action.dest for parser in parsers for action in parser._actions} - {"help", "print_shtab"}
        names -= {*_without_name(self)}
        names |= {*PRESET_OPTIONS} if any(map(_of_trainer, parsers)) else set()
        key = re.sub(r"\.(class_path|init_args)\b", "", key)
        if new := renamed(key, names):
            values = ", ".join(f"{old} is {value}" for old, value in VALUES.get(new.rpartition(".")[2], {}).items())
            return f" Did you mean {new}{f' ({values})' if values else ''}?"
        near = sorted(names) if len(names) <= 12 else difflib.get_close_matches(key, names, cutoff=0.8)
        return f" There is: {', '.join(near)}." if near else ""

    def format_help(self, *args: Any, **options: Any) -> str:
        """The help with plug-ins first and the Trainer last; nothing else depends on this order."""
        if _of_trainer(self) and not any(action.dest == "objective" for action in self._actions):
            self.add_argument("--objective", metavar="NAME|FILE", help=PRESET_OPTIONS["objective"])
            self.add_argument("--no_base", action="store_true", help=PRESET_OPTIONS["no_base"])
        groups, usage = self._action_groups, self.usage
        ordered = [list(group._group_actions) for group in groups]
        try:
            if _of_trainer(self):
                command = self.prog.replace(" [options]", "")
                self.usage = f"{command} [--objective NAME|FILE] [--config NAME|FILE ...] [--OPTION VALUE ...]"
            for group in groups:
                group._group_actions.sort(key=lambda action: rank(action.dest))
            self.epilog = self.epilog or known_classes(self.description)
            self._action_groups = sorted(groups, key=lambda g: min((rank(a.dest) for a in g._group_actions), default=0))
            return super().format_help(*args, **options)
        finally:
            self._action_groups, self.usage = groups, usage
            for group, actions in zip(groups, ordered, strict=True):
                group._group_actions[:] = actions

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a class inside a value: the error of its option is printed
            super().error(message, ex)
        fault = cause_in(ex)
        fault = f"{fault}{hidden(fault)}" if fault else " ".join(cause(message).split())
        command = self.prog.replace(" [options]", "")
        positionals = _without_name(self)
        form = " ".join([command, *map(str.upper, positionals)])
        if inside := re.match(r"Subcommand '(\w+)'", message):  # a key of a config file
            command += f" {inside[1]}"
        if missing := re.match(r"the following arguments are required: (?:(\w+)\.)?(.*)", fault):
            command += f" {missing[1]}" if missing[1] in TRAINER_COMMANDS else ""
            how = f": {form}" if positionals else ", in a config or on the command line"
            fault = f"{missing[2]} must be given{how}"
        elif named := [name for name in positionals if re.search(rf"^unrecognized arguments: .*--{name}\b", fault)]:
            fault = f"{', '.join(f'--{name}' for name in named)} is no option; give the value without it: {form}"
        elif (word := re.match(r"unrecognized arguments: ([^-\s]\S*)", fault)) and positionals:
            takes = " and ".join(f"one {name.upper()}" for name in positionals)
            fault = f"{fault}; it takes {takes}, and options that begin with --"
        elif word:
            fault = f"{fault}; {misplaced(word[1]) or 'an option begins with --, as in --objective NAME'}"
        elif unknown := re.search(UNKNOWN_OPTION, fault):
            fault = f"{fault.rstrip('.')}.{self._near(unknown['key'])} All options: {command} --help"
        elif '"comments" for --print_config' in fault:
            fault += "; comments need ruamel.yaml: pip install 'ruamel.yaml>=0.18.15'"
        elif "for --print_config" in fault:
            fault += "; it takes comments, skip_default, skip_null"
        # Without the usage, which fills a screen and would push the error off it.
        raise UsageError(self.placed(f"{command}: error: {plain(fault)}")) from ex

    def placed(self, line: str) -> str:
        """The line of an error, with the place of the option in a config file if the parser knows it."""
        return line


def _without_name(parser: ArgumentParser) -> list[str]:
    """The arguments of a tool that are given by their place, in order."""
    return [a.dest for a in parser._actions if not a.option_strings and not isinstance(a.choices, dict)]


def _of_trainer(parser: ArgumentParser) -> bool:
    """Whether this is the parser of a Trainer command, with its hundred options."""
    return any(action.dest.startswith("trainer.") for action in parser._actions)


# The order of options in the help.
FIRST = (
    *("help", "objective", "config", "no_base", "print_config", "run_dir", "model.value_function"),
    *("model.reference_point", "model.reward", "model.feedback", "model.reflect_undesirable", "model.policy", "data"),
    *("model", "checkpoint", "ckpt_path"),
)


def rank(option: str) -> int:
    """The position of an option in the help."""
    fits = [i for i, name in enumerate(FIRST) if option == name or option.startswith(f"{name}.")]
    last = len(FIRST) + (option.partition(".")[0] == "trainer")
    return min(fits, default=last)


def hidden(message: str) -> str:
    """A clause about an installed module in a message that hides a file of the working folder; empty if none does."""
    for name in re.findall(r"[A-Za-z_]\w*(?=(?:\.\w+)+)", message):
        file = getattr(sys.modules.get(name), "__file__", None)
        for local in (Path(f"{name}.py"), Path(name, "__init__.py")):
            if file and local.is_file() and local.resolve() != Path(file).resolve():
                return f"; {name} is the installed {file}, which hides {local}: rename yours"
    return ""
