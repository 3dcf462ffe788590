"""Loads benchmarks by name, from local files or the hub, and draws their questions."""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from halos_pl.data.example import DataError
from halos_pl.tasks import raw
from halos_pl.tasks.humaneval import pass_at_1
from halos_pl.tasks.ifeval import not_scored, process_results
from halos_pl.tasks.names import LOCAL, USUAL, YAMLS, folders, home, no_such_task
from halos_pl.tasks.options import PAPER, PAPER_EACH, Benchmarks, Limit


@dataclass(frozen=True)
class Benchmark:
    """A named task or group.

    Attributes:
        name: Its name as the user wrote it.
        item: lm-eval's task or group.
        leaves: Its tasks by name.
        drawn: Sorted indices of the drawn questions by task; None for all of a task.
    """

    name: str
    item: Any
    leaves: Mapping[str, Any]
    drawn: Mapping[str, list[int] | None]

    @property
    def total(self) -> int:
        """Number of questions before drawing."""
        return sum(len(task.eval_docs) for task in self.leaves.values())

    @property
    def count(self) -> int:
        """Number of drawn questions."""
        return sum(len(self.indices(name)) for name in self.drawn)

    def indices(self, leaf: str) -> list[int]:
        """Indices of a task's drawn questions."""
        drawn = self.drawn[leaf]
        return list(range(len(self.leaves[leaf].eval_docs))) if drawn is None else drawn

    def all_docs(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Task, index and row of each question, drawn or not."""
        for leaf, task in self.leaves.items():
            for index, row in enumerate(task.eval_docs):
                yield leaf, index, row

    def docs(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Task, index and row of each drawn question."""
        for leaf in self.drawn:
            rows = self.leaves[leaf].eval_docs
            for index in self.indices(leaf):
                yield leaf, index, rows[index]


def load(benchmarks: Benchmarks, seed: int) -> list[Benchmark]:
    """The benchmarks, with their questions drawn.

    Args:
        benchmarks: Names and options.
        seed: Seed of the draw. A larger limit draws the questions of a smaller one and more.

    Raises:
        DataError: naming a task that does not exist, cannot be loaded, or executes code outside the sandbox.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    index = _Index(benchmarks)
    loaded = []
    for name in benchmarks.tasks:
        index.check(name)
        item, leaves = index.load(name)
        for leaf in leaves.values():
            _configure(leaf, benchmarks)
        sizes = {leaf: len(task.eval_docs) for leaf, task in leaves.items()}
        drawn = draw(name, sizes, benchmarks.limit, seed)
        loaded.append(Benchmark(name, _without(item, set(sizes) - set(drawn)), leaves, drawn))
    _check_names(loaded, benchmarks.limit)
    if benchmarks.include_path and not any(map(index.is_included, benchmarks.tasks)):
        raise DataError(f"include_path {benchmarks.include_path} defines none of {', '.join(benchmarks.tasks)}")
    return loaded


def _configure(task: Any, benchmarks: Benchmarks) -> None:
    """Sets the number of examples and of new tokens, as lm-eval's command line does."""
    if benchmarks.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", benchmarks.num_fewshot)
    if benchmarks.max_gen_toks is not None and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", {"max_gen_toks": benchmarks.max_gen_toks}, update=True)


def draw(name: str, sizes: Mapping[str, int], limit: Limit, seed: int) -> dict[str, list[int] | None]:
    """Draws questions of a task or group at random; a group's tasks share the limit.

    Args:
        name: Name of the task or group.
        sizes: Number of questions by task.
        limit: See :class:`halos_pl.tasks.options.Benchmarks`.
        seed: Seed of the draw.

    Returns:
        Sorted indices by task, without the tasks that no question was drawn from; None for all questions of a task.
    """
    number: int | None
    if limit == "paper":
        number, each = PAPER.get(name), PAPER_EACH.get(name)
    elif isinstance(limit, dict):
        number, each = limit.get(name), None
    else:
        assert limit is None or isinstance(limit, int)
        number, each = limit, None
    if each is not None:
        return {leaf: draw(leaf, {leaf: size}, each, seed)[leaf] for leaf, size in sizes.items()}
    total = sum(sizes.values())
    if number is None or number >= total:
        return dict.fromkeys(sizes)
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(total)
    chosen, start, drawn = np.sort(order[:number]), 0, {}
    for leaf, size in sizes.items():
        inside = chosen[(chosen >= start) & (chosen < start + size)] - start
        if len(inside):
            drawn[leaf] = inside.tolist()
        start += size
    return drawn


def _without(item: Any, names: set[str]) -> Any:
    """A group without some of its tasks, and without groups that are then empty."""
    from lm_eval.api.group import Group

    for child in list(item) if isinstance(item, Group) else []:
        _without(child, names)
        if isinstance(child, Group) and not len(child):
            item.pop(child.name)
        elif not isinstance(child, Group) and child.task_name in names:
            item.pop(child.task_name)
    return item


def _check_names(loaded: Iterable[Benchmark], limit: Limit) -> None:
    """Refuses a task that is listed twice, and limits of tasks that are not."""
    owner: dict[str, str] = {}
    for benchmark in loaded:
        for leaf in benchmark.leaves:
            if leaf in owner:
                raise DataError(f"tasks lists {leaf} twice, in {owner[leaf]} and in {benchmark.name}; name it once")
            owner[leaf] = benchmark.name
    names = set(owner.values())
    if isinstance(limit, dict) and (unknown := [name for name in limit if name not in names]):
        raise DataError(f"limit names {unknown[0]}, which is not among the tasks {', '.join(sorted(names))}")


class _Index:
    """The tasks that exist: those of this package, of lm-eval and of ``include_path``."""

    def __init__(self, benchmarks: Benchmarks) -> None:
        self.benchmarks = benchmarks
        self.local = raw.folder_of(benchmarks.eval_data)
        self.manager = self._manager(USUAL)
        self.names = [name for name in self.manager.all_tasks if not name.endswith(LOCAL)]
        others = [name for name in benchmarks.tasks if self._entry(name) is None]
        if others:
            places = folders()
            self.names = sorted({*self.names, *places})
            if all(name in places for name in others):
                self.manager = self._manager((*USUAL, *(places[name] for name in others)))
                kinds = [entry.kind.name for name in others if (entry := self._entry(name))]
                if len(kinds) < len(others) or {*kinds} - {"TASK", "PY_TASK"}:  # a group may refer to other folders
                    self.manager = self._manager(None)

    def _manager(self, some: tuple[str, ...] | None) -> Any:
        """lm-eval's index of some of its folders, or of all, with this package's."""
        import lm_eval.tasks

        paths = [home() / name for name in dict.fromkeys(some or ())]
        paths += [YAMLS, *([Path(self.benchmarks.include_path)] if self.benchmarks.include_path else [])]
        metadata = {"eval_data": str(self.local)} if self.local else {}
        return lm_eval.tasks.TaskManager(include_path=paths, include_defaults=some is None, metadata=metadata)

    def _entry(self, name: str) -> Any:
        return None if name.endswith(LOCAL) else self.manager.task_index.get(name)

    def check(self, name: str) -> None:
        """Refuses a task that does not exist, or that executes code outside the sandbox.

        Raises:
            DataError: naming similar tasks, or the way out.
        """
        if self._entry(name) is None:
            raise no_such_task(name, self.names)
        for leaf in self._leaves(name):  # before data are loaded; what overrides these files is checked later
            entry = self.manager.task_index.get(leaf)
            if entry is not None and (entry.cfg or {}).get("unsafe_code"):
                self._permit(name, YAMLS in Path(entry.yaml_path).parents)

    def _permit(self, name: str, in_sandbox: bool) -> None:
        """Refuses a task that executes code outside the sandbox, or without permission."""
        if not in_sandbox:
            raise DataError(
                f"task {name} executes code of the model outside the sandbox of halos; humaneval and humaneval_instruct"
                " run in it"
            )
        if not self.benchmarks.allow_code_execution:
            rest = ",".join(each for each in self.benchmarks.tasks if each != name)
            raise DataError(
                f"task {name} executes programs that the model writes, in a sandbox: set allow_code_execution to"
                f" true{f', or name only --tasks {rest}' if rest else ''}"
            )

    def is_included(self, name: str) -> bool:
        """Whether the files of ``include_path`` define a name or one below it."""
        folder = Path(self.benchmarks.include_path or "no")
        entries = (self.manager.task_index.get(each) for each, _ in self._below(name))
        return any(entry.yaml_path and folder in Path(entry.yaml_path).parents for entry in entries if entry)

    def _leaves(self, name: str) -> list[str]:
        """Names of the tasks below a task, group or tag; those that a group itself defines are not in the index."""
        return [each for each, is_task in self._below(name) if is_task]

    def _below(self, name: str) -> Iterator[tuple[str, bool]]:
        """A name and those below it, and whether each is a task's."""
        entry = self.manager.task_index.get(name)
        if entry is None or entry.kind.name in ("TASK", "PY_TASK"):
            yield name, True
            return
        yield name, False
        members: Iterable[Any] = entry.tags if entry.yaml_path is None else (entry.cfg or {}).get("task") or []
        for each in [members] if isinstance(members, str) else members:
            yield from self._below(each if isinstance(each, str) else each.get("group") or each.get("task"))

    def _source(self, name: str) -> str:
        """What lm-eval is to load: the name, or a group that gives its tasks the reader of local files, if any has."""
        index, wanted = self.manager.task_index, set(self._leaves(name))
        local = (key for key in index if key.endswith(LOCAL) and wanted <= set(self._leaves(key)))
        found = next(local, None) if self.local and wanted else None
        if found is None:
            return name
        reader = getattr(raw, index[found].cfg["custom_dataset"].rpartition(".")[2])
        group = f"{name} from local files"
        config = {"group": group, "task": [name], "custom_dataset": reader}
        index[group] = replace(index[found], name=group, yaml_path=None, cfg=config)
        return group

    def load(self, name: str) -> tuple[Any, dict[str, Any]]:
        """lm-eval's object for a name, and its tasks by name.

        Raises:
            DataError: if its data or its code cannot be loaded, or if it executes code that is not permitted.
        """
        from lm_eval.api.group import Group

        try:
            loaded = self.manager.load([self._source(name)])
        except DataError:
            raise
        except Exception as error:  # of the hub, of a data set's builder, or of the task's own code
            why = " ".join(str(error).split())[:200]
            raise DataError(
                f"task {name} cannot be loaded ({type(error).__name__}: {why}); if it needs the hub, go online or set"
                " eval_data to a folder with the published files"
            ) from error
        item = loaded["groups"].get(name) or loaded["tasks"].get(name)
        if item is None:  # a tag
            item = Group(name)
            for task in loaded["tasks"].values():
                item.add(task)
        tasks = item.get_all_tasks() if isinstance(item, Group) else [item]
        for task in tasks:
            if executes_code(task):
                self._permit(name, _scores(task) == {pass_at_1} and task.get_config("process_results") is None)
        return item, {task.task_name: task for task in tasks}


def executes_code(task: Any) -> bool:
    """Whether a loaded task executes what the model writes."""
    return getattr(task, "UNSAFE_CODE", False) or pass_at_1 in _scores(task)


def _scores(task: Any) -> set[Any]:
    """Names or functions of a task's metrics."""
    return {each["metric"] for each in task.get_config("metric_list") or ()}


def unscored(benchmark: Benchmark) -> dict[str, int]:
    """Number of instructions of IFEval that are not scored, by kind; empty for other benchmarks."""
    checked = {leaf for leaf, task in benchmark.leaves.items() if task.get_config("process_results") is process_results}
    docs = (doc for leaf, _, doc in benchmark.docs() if leaf in checked) if checked else ()
    return dict(Counter(kind for doc in docs for kind in not_scored(doc)))
