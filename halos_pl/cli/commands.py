"""Commands that are plain functions, each imported when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from itertools import zip_longest

from halos_pl.cli.parser import HalosParser
from halos_pl.cli.words import split_words

#: Module and function by command; longer names come before their prefixes.
TOOLS = {
    "export": "halos_pl.cli.export:export",
    "sample": "halos_pl.sampling.sample:sample",
    "chat": "halos_pl.sampling.chat:chat",
    "label": "halos_pl.labelling.label:label",
    "evaluate": "halos_pl.evaluation.evaluate:evaluate",
    "judge agreement": "halos_pl.cli.judge:agreement",
    "compare": "halos_pl.evaluation.compare:compare",
    "rounds": "halos_pl.cli.rounds:rounds",
    "ablate status": "halos_pl.cli.ablate:status",
    "ablate report": "halos_pl.cli.ablate:report",
    "ablate": "halos_pl.cli.ablate:ablate",
    "data inspect": "halos_pl.cli.inspect:inspect_source",
    "cache info": "halos_pl.cli.cache:info",
    "cache clear": "halos_pl.cli.cache:clear",
    "cache": "halos_pl.cli.cache:info",
    "prove": "halos_pl.cli.prove:prove",
    "verify": "halos_pl.cli.verify:verify",
    "plan": "halos_pl.cli.plan:plan",
    "collect": "halos_pl.collect.command:collect",
    "convert": "halos_pl.cli.convert:convert",
    "objectives": "halos_pl.cli.objectives:objectives",
    "new": "halos_pl.cli.new:new",
}


def tool_of(words: list[str]) -> str | None:
    """The command of ``TOOLS`` at the start of the words, if any."""
    return next((name for name in TOOLS if words[: len(name.split())] == name.split()), None)


def _function(name: str) -> Callable[..., None]:
    module, _, function = TOOLS[name].partition(":")
    tool: Callable[..., None] = getattr(import_module(module), function)
    return tool


def tool_parser(name: str) -> HalosParser:
    """The parser of a command in ``TOOLS``: parameters before the ``*`` are positional, the others are options.

    An option that is true or false may be given without a value, which means true.
    """
    tool = _function(name)
    kinds = inspect.signature(tool).parameters
    options: set[str | int] = {key for key, p in kinds.items() if p.kind is p.KEYWORD_ONLY}
    parser = HalosParser(prog=f"halos {name}", description=(tool.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(tool, as_positional=True, as_group=False, skip=options)
    parser.add_function_arguments(tool, as_positional=False, as_group=False, skip=set[str | int](kinds) - options)
    for action in parser._actions:
        if action.default is False:
            action.nargs, action.const = "?", True
    return parser


def _with_values(name: str, words: list[str]) -> list[str]:
    """The words, with ``--overwrite=true`` for an option of type bool that no value follows."""
    parameters = inspect.signature(_function(name)).parameters.values()
    flags = {f"--{p.name}" for p in parameters if p.annotation in ("bool", "bool | None")}
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip_longest(words, words[1:], fillvalue="--")
    ]


def run_tool(name: str, words: list[str]) -> None:
    """Runs a command in ``TOOLS`` with the words after its name."""
    parser, words = tool_parser(name), _with_values(name, words)
    _function(name)(**parser.instantiate(parser.parse_args(words)).as_dict())


def run_plan(words: list[str]) -> None:
    """Runs ``halos plan``: words that are not its own options are configs and options of ``halos fit``."""
    function = _function("plan")
    parameters = inspect.signature(function).parameters.values()
    options, run = split_words(words, {p.name for p in parameters if p.kind is p.KEYWORD_ONLY})
    parser = tool_parser("plan")
    function(**{**parser.instantiate(parser.parse_args([*options, "[]"])).as_dict(), "run": run})
