"""The cause of jsonargparse's errors about the values of options."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Union

import yaml
from jsonargparse import Namespace
from jsonargparse._actions import _ActionHelpClassPath
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg

from halos_pl.common.messages import chain
from halos_pl.common.type_words import plain_data, shown
from halos_pl.common.wrong_value import class_named, classes_of, misfit


def cause_in(error: BaseException | None) -> str | None:
    """The fault, in one line, behind jsonargparse's error about the value of an option; None for other errors.

    Option and value are the outermost that jsonargparse was checking when it failed.
    """
    for one in chain(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            if frame.f_code is _ActionHelpClassPath.resolve_help_type.__code__:
                action, value = frame.f_locals["self"], frame.f_locals["value"]
                fault = misfit(action.dest, Union[action._help_types], value)  # noqa: UP007
                return str(fault) if fault else None
            if frame.f_code is not ActionTypeHint._check_type.__code__:
                continue
            action, value = frame.f_locals["self"], frame.f_locals.get("orig_val")
            before = frame.f_locals.get("prev_val")
            if isinstance(value, NestedArg):
                if isinstance(before, str) and not class_named(action._typehint, before):
                    return _without_settings(action, before, value)
                value = _nested(before, value.key, value.val)
            elif isinstance(value, str) and value[:1] in "[{":
                with suppress(yaml.YAMLError, ValueError):
                    value = yaml.safe_load(value)
            value = plain_data(value)
            path = before.get("class_path") if isinstance(before, Namespace | Mapping) else None
            if isinstance(value, dict) and "class_path" not in value and isinstance(path, str):
                # An earlier file names the class.
                value = {"class_path": path, "init_args": value.get("init_args", value)}
            fault = misfit(action.dest, action._typehint, value)
            return str(fault) if fault else None
    return None


def _without_settings(action: Any, before: str, nested: Any) -> str:
    """The fault of a setting of a value that names no class."""
    option = f"{action.dest}.{nested.key}"
    setting = nested.key.removeprefix("init_args.").partition(".")[0]
    fitting = [cls.__name__ for cls in classes_of(action._typehint) if setting in inspect.signature(cls).parameters]
    form = f"--{action.dest} {fitting[0] if fitting else 'CLASS'} --{option} {nested.val}"
    others = f" (or {', '.join(fitting[1:])})" if fitting[1:] else ""
    return (
        f"{option} is {shown(nested.val)}, but {action.dest} is {before!r}, which is not a class and has no settings;"
        f" name the class first: {form}{others}"
    )


def _nested(before: Any, key: str, value: Any) -> Any:
    """The value that an option such as ``--optimizer.lr`` makes out of the class named before it."""
    if isinstance(before, list):
        return _nested(before[-1] if before else {}, key, value)
    if isinstance(before, str):
        before = {"class_path": before}
    before = plain_data(before) if isinstance(before, Namespace | Mapping) else {}
    name, _, rest = key.removeprefix("init_args.").partition(".")
    if isinstance(before.get("class_path"), str) and name not in ("class_path", "init_args"):
        settings = before.get("init_args") or {}
        inner = _nested(settings.get(name), rest, value) if rest else value
        return {"class_path": before["class_path"], "init_args": {name: inner}}
    return {name: _nested(before.get(name), rest, value) if rest else value}
