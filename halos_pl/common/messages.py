"""What is said on a terminal: without control characters, and with the cause of a parser's error in one line."""

from __future__ import annotations

import re

# A terminal obeys them: colours, links, the clipboard, another reading direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """The text with each control character, but for line ends and tabs, shown by its number."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


# How jsonargparse words a fault of a value.
_KEY = re.compile(r'Parser key "(?P<key>[^"]*)":')
_NO_CONFIG = re.compile(r"""Parser key "(?P<key>[^"]*)":\s+Unable to load config (?P<value>'[^'\n]*')""")
_EXPECTED = re.compile(r"Expected a (?P<what><class '[\w.]+'>|typing\.Literal\[.*?\]|dot import path)", re.DOTALL)
_NOISE = re.compile(
    r"Expected a |Not a valid subclass|Does not validate|Subclass types expect|a class path \(str\)"
    r"|a dict with|a dict without|Given value|Subtypes:|Errors:"
)
_KINDS = {
    "<class 'str'>": "a text",
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'dict'>": "a mapping",
    "<class 'list'>": "a list",
    "<class 'NoneType'>": "null",
}


def cause(message: str) -> str:
    """A parser's message about a value that has not the right type, as ``KEY is VALUE; it takes THIS or THAT``.

    Where a type may be one of several, jsonargparse lists what each of them has against the value. A fault that a class
    states itself, or a class that does not import, is the cause; what the other types would take is not.
    """
    if unknown := _NO_CONFIG.search(message):
        return f"{unknown['key']} is {unknown['value']}; it takes a mapping, or the YAML file that holds one"
    before, mark, given = message.rpartition("Given value: ")  # that of the whole union, behind those of its parts
    if not mark:
        before, mark, given = message.rpartition("Got value: ")
    if not mark or ("Expected a " not in message and "Does not validate" not in message):
        return message
    given = given.strip()
    key = _KEY.search(before)
    name = f"{before[: key.start()]}{key['key']}" if key else "it"
    faults = [line.strip().removeprefix("- ") for line in before[key.end() if key else 0 :].splitlines()]
    own = [fault for fault in faults if fault and not _NOISE.match(fault)]
    if own:
        return f"{name}: {' '.join(own)}" if key else " ".join(own)
    kinds: list[str] = []
    for found in _EXPECTED.finditer(before):
        what = found["what"]
        if what.startswith("typing.Literal"):
            kinds.append(f"one of {what.removeprefix('typing.Literal[').removesuffix(']')}")
        else:
            kinds.append(_KINDS.get(what, "a class by its name"))
    if "Not a valid subclass" in before:
        kinds.append("a class by its name")
    if not kinds:  # such as a tuple of two
        wanted = " ".join(faults).strip(" .")
        return f"{name} is {given}; {wanted[:1].lower()}{wanted[1:]}"
    kinds = sorted(dict.fromkeys(kinds), key=lambda kind: kind == "null")
    quotes = "a text" in kinds and re.fullmatch(r"[-+.\w]+", given)
    hint = "; put it in quotes if it is a name" if quotes else ""
    return f"{name} is {given}; it takes {', '.join(kinds[:-1])}{' or ' if kinds[1:] else ''}{kinds[-1]}{hint}"


def counted(number: int, what: str) -> str:
    """``1 seed`` or ``3 seeds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
