"""Finds options of benchmarks that some or all of the named tasks do not use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from halos_pl.common.messages import plain
from halos_pl.data.example import DataError
from halos_pl.tasks.load import Benchmark, executes_code
from halos_pl.tasks.options import Benchmarks

#: Whether a loaded task uses an option that is set. lm-eval adds no examples to a task that is defined to have none.
USES: dict[str, Callable[[Any, Any], bool]] = {
    "num_fewshot": lambda task, value: task.get_config("num_fewshot") == value,
    "max_gen_toks": lambda task, _: task.get_config("output_type") == "generate_until",
    "fewshot_as_multiturn": lambda task, _: bool(task.get_config("num_fewshot")),
    "eval_data": lambda task, _: callable(task.get_config("custom_dataset")),
    "allow_code_execution": lambda task, _: executes_code(task),
}
#: Options that tasks differ in: of them, it is said which tasks do not use them.
OF_EACH = ("num_fewshot", "max_gen_toks")


def without_effect(benchmarks: Benchmarks, loaded: Sequence[Benchmark]) -> list[str]:
    """Lines for the terminal that name the tasks on which an option has no effect.

    Args:
        benchmarks: Names and options.
        loaded: The benchmarks, configured as the options say.

    Raises:
        DataError: naming an option that no task uses.
    """
    lines = []
    for option, uses in USES.items():
        value = getattr(benchmarks, option)
        if value is None or value is False:
            continue
        idle = {each.name: [name for name, task in each.leaves.items() if not uses(task, value)] for each in loaded}
        if all(len(idle[each.name]) == len(each.leaves) for each in loaded):
            raise DataError(f"{option} has no effect on {', '.join(benchmarks.tasks)}; leave it out")
        names = [
            name
            for each in loaded
            for name in ([each.name] if len(idle[each.name]) == len(each.leaves) else idle[each.name])
        ]
        if names and option in OF_EACH:
            lines.append(plain(f"halos: {option} has no effect on {', '.join(names)}"))
    return lines
