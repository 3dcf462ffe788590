"""The targets of ``halos check``, ``halos prove`` and ``halos verify``, and the limits within which their code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from halos_pl.cli.errors import UsageError

if TYPE_CHECKING:
    from halos_pl.conformance.child import Child
    from halos_pl.conformance.target import Target
    from value_functions import ValueFunction

TIMEOUT, MEMORY = 60.0, "4GB"


def loaded(target: str, init_args: str | None, command: str) -> Target:
    """The target that a command names: a shipped objective, a plug-in in the working folder, or a path.

    Args:
        target: its name.
        init_args: the arguments of the class as JSON.
        command: the command, for errors.

    Raises:
        TargetError: there is none, or its file has a key that no fit takes; the message is one line.
    """
    from halos_pl.cli.objective_file import refuse_as_fit
    from halos_pl.common.experiments import PresetError, config_file, objectives
    from halos_pl.common.own_plugins import OwnPluginError, import_own
    from halos_pl.conformance.target import TargetError, load_target
    from halos_pl.objective.build import KINDS

    path = target
    try:
        if target in objectives():
            path = str(config_file(target, objectives(), command))
        else:
            import_own(target, KINDS)
    except (PresetError, OwnPluginError) as error:
        raise TargetError(str(error)) from error
    found = load_target(path, init_args)
    refuse_as_fit(path)
    return found


def value_function_of(target: str, init_args: str | None, command: str) -> ValueFunction:
    """The value function that a command names, or that of the objective that it names.

    Raises:
        TargetError: there is none, or several; the message is one line.
    """
    from halos_pl.conformance import proofs
    from halos_pl.conformance.target import TargetError
    from value_functions import ValueFunction

    found = loaded(target, init_args, command)
    if (v := proofs.value_function_of(found)) is not None:
        return v
    terms = (getattr(term, "value_function", None) for term in found.modules())
    if names := sorted({type(term).__name__ for term in terms if isinstance(term, ValueFunction)}):
        raise TargetError(f"{target} is a sum of terms with value functions of their own: name {' or '.join(names)}")
    raise TargetError(f"{target} is no value function and has none; name one, such as Logistic")


def limited_child(work: Callable[[Any], Any], command: str, timeout: float, memory: str) -> Child:
    """The process that executes the code of a target for a command.

    Args:
        work: answers a question there.
        command: the command, for errors.
        timeout: seconds that an answer may take.
        memory: memory that the process may take, such as 4GB.

    Raises:
        UsageError: the limits are no time or size.
    """
    from halos_pl.cache import size_of
    from halos_pl.conformance.child import Child

    if not 0 < timeout < float("inf"):
        raise UsageError(f"{command}: --timeout is {timeout:g}; it must be a number of seconds above 0")
    if not (size := size_of(memory)):
        raise UsageError(f"{command}: --memory is {memory!r}; it must be a size, such as 4GB or 500MB")
    return Child(work, timeout=timeout, memory=size)
