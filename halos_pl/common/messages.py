"""Text for the terminal: without control characters, and parser errors as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

# They make a terminal change colours, links, the clipboard or the reading direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def plain(text: object) -> str:
    """The text with control characters, except line ends and tabs, shown as numbers."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def raised(error: BaseException, most: int = 200) -> str:
    """An error in one line, ``Class: message`` with at most that many characters of the message, or ``Class`` alone."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}".removesuffix(": ")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that led to it, latest first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


# jsonargparse's wording of faults in values.
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
    """A parser's message about a value of the wrong type, as ``KEY is VALUE; it takes THIS or THAT``.

    For a union, jsonargparse lists the fault under each alternative. An error raised by a class, or by its import, is
    the cause; what the other types accept is not.
    """
    if unknown := _NO_CONFIG.search(message):
        return f"{unknown['key']} is {unknown['value']}; it takes a mapping, or a YAML file with one"
    before, mark, value = message.rpartition("Given value: ")  # the last one is that of the whole union
    if not mark:
        before, mark, value = message.rpartition("Got value: ")
    if not mark or ("Expected a " not in message and "Does not validate" not in message):
        return message
    value = value.strip()
    key = _KEY.search(before)
    name = f"{before[: key.start()]}{key['key']}" if key else "it"
    faults = [line.strip().removeprefix("- ") for line in before[key.end() if key else 0 :].splitlines()]
    raised = [fault for fault in faults if fault and not _NOISE.match(fault)]
    if raised:
        return f"{name}: {' '.join(raised)}" if key else " ".join(raised)
    kinds: list[str] = []
    for match in _EXPECTED.finditer(before):
        what = match["what"]
        if what.startswith("typing.Literal"):
            kinds.append(f"one of {what.removeprefix('typing.Literal[').removesuffix(']')}")
        else:
            kinds.append(_KINDS.get(what, "a class by its name"))
    if "Not a valid subclass" in before:
        kinds.append("a class by its name")
    if not kinds:  # such as a tuple of two
        wanted = " ".join(faults).strip(" .")
        return f"{name} is {value}; {wanted[:1].lower()}{wanted[1:]}"
    kinds = sorted(dict.fromkeys(kinds), key=lambda kind: kind == "null")
    quotes = "a text" in kinds and re.fullmatch(r"[-+.\w]+", value)
    hint = "; put it in quotes if it is a name" if quotes else ""
    return f"{name} is {value}; it takes {', '.join(kinds[:-1])}{' or ' if kinds[1:] else ''}{kinds[-1]}{hint}"


def listed(counts: Mapping[str, int]) -> str:
    """``1 pair, 2 prompts skipped``, from numbers other than 0 by what they count: a plural with words after it."""
    singular = {what: re.sub(r"(?<=\w)s(?= |$)", "", what, count=1) for what in counts}
    return ", ".join(f"{number} {singular[what] if number == 1 else what}" for what, number in counts.items() if number)


def counted(number: int, what: str) -> str:
    """``1 seed`` or ``3 seeds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
