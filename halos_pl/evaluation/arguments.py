"""The arguments of ``halos evaluate``: checks, and digests of the files that they name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from halos_pl.common.local_imports import with_imports
from halos_pl.data.example import DataError
from halos_pl.data.formats import files_of
from halos_pl.data.source import Source
from halos_pl.data.sources import sources_of
from halos_pl.evaluation.metrics import CODE
from halos_pl.judge.settings import JudgeSettings
from halos_pl.policy.sampling import check_sampling
from halos_pl.tasks.options import OPTIONS, task_names
from halos_pl.tasks.raw import folder_of

#: Arguments that older versions lacked, and so did not record.
LATER = (
    *("ckpt_path", "reference", "prompt_column", "text_prompts", "chat_template", "win_rate"),
    *("tasks", "suite", "precision", *OPTIONS),
)
#: Other names of the defaults of these.
DEFAULTS = {"precision": "32-true"}
#: Arguments that matter for a win rate only.
FOR_WIN_RATES = ("against", "endpoint", "judging", "alpaca_data", "mt_bench")

#: Arguments that may name a file or a folder to read, besides held-out data and code.
READ = (
    *("prompts", "chat_template", "reference", "ckpt_path", "win_rate", "against", "alpaca_data", "mt_bench"),
    *("include_path", "eval_data"),
)
#: The default of an argument, and what uses another value: without any of these, it has no effect. Benchmarks draw with
#: the seed if they have a limit.
USERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rule": (None, ("prompts",)),
    "judge": (None, ("prompts",)),
    "prompt_column": (None, ("prompts",)),
    "reference": (None, ("held_out", "prompts", "win_rate")),
    "beta": (0.1, ("held_out",)),
    "max_length": (1024, ("held_out",)),
    "max_new_tokens": (64, ("prompts", "win_rate")),
    "temperature": (0.7, ("prompts", "win_rate")),
    "seed": (0, ("prompts", "win_rate", "limit")),
    "judging": (JudgeSettings(), ("win_rate",)),
}
#: The digest of data that are no file, such as those of the hub.
NO_FILE = "not a file here"
#: The argument that benchmarks have instead.
INSTEAD = {"max_new_tokens": "max_gen_toks"}


def measuring(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A record of an evaluation: the arguments of ``evaluate``, and a digest of each file they name or import."""
    code = [str(file) for path in map(Path, _code_files(arguments)) if path.is_file() for file in with_imports(path)]
    data = paths_of([arguments.get("prompts"), *(arguments.get("held_out") or [])])
    folders = [Path(path) for key in ("alpaca_data", "mt_bench") if (path := arguments.get(key))]
    if (raw := folder_of(arguments.get("eval_data"))) and task_names(arguments.get("tasks"), arguments.get("suite")):
        folders.append(raw)
    raw_files = {str(raw): _digest(sorted(path for path in raw.rglob("*") if path.is_file())) for raw in folders}
    added = (*LATER, *FOR_WIN_RATES)
    # By identity: num_fewshot: 0 is a setting, though it equals False.
    unset = {k for k in added if (v := arguments.get(k)) is None or v is False or v == DEFAULTS.get(k)}
    recorded = {k: v for k, v in arguments.items() if k not in unset}
    if judge := recorded.get("win_rate"):
        data += [judge] if Path(judge).is_file() else []
        recorded |= {k: asdict(v) for k, v in recorded.items() if is_dataclass(v) and not isinstance(v, type)}
    else:
        recorded = {k: v for k, v in recorded.items() if k not in FOR_WIN_RATES}
    return {"evaluate": recorded, "files": {path: digest_of(path) for path in sorted({*data, *code})} | raw_files}


def _code_files(arguments: Mapping[str, Any]) -> list[str]:
    return [str(arguments[key]).rpartition(":")[0] for key in CODE if arguments.get(key)]


def inputs_of(model: str, arguments: Mapping[str, Any]) -> list[str]:
    """The files, folders and patterns that an evaluation reads, among names of other things."""
    data = [f"{path}/*" if Path(path).is_dir() else path for path in paths_of(arguments.get("held_out") or [])]
    named = [model, *(arguments.get(key) for key in READ)]
    return [str(each) for each in (*data, *_code_files(arguments), *named) if each]


def paths_of(sources: Iterable[Any]) -> list[str]:
    """The paths of sources, which are strings or mappings."""
    return [source["path"] if isinstance(source, dict) else source for source in sources if source]


def digest_of(path: str) -> str:
    """Half of the SHA-256 of a file, or of the names and digests of the files in a folder or pattern.

    The names are those below the innermost folder of all of them, so that a copy elsewhere has the same digest.
    """
    paths = [Path(source.path) for source in files_of(Source(path))]
    return _digest(sorted(f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()))


def _digest(files: list[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    if len(files) > 1:
        folder = os.path.commonpath([file.parent for file in files])
        named = [[file.relative_to(folder).as_posix(), digest] for file, digest in zip(files, digests, strict=True)]
        digests = [hashlib.sha256(json.dumps(named).encode()).hexdigest()]
    return digests[0][:32] if digests else NO_FILE


def _name(name: str, given: Mapping[str, Any], default: Any) -> str:
    """The name of an argument as it is set; for settings, that of the first one which is not the default."""
    if not is_dataclass(default):
        return name
    return next(f"{name}.{f.name}" for f in fields(default) if getattr(given[name], f.name) != getattr(default, f.name))


def check_arguments(
    *,
    held_out: Any,
    prompts: str | None,
    rule: str | None,
    judge: str | None,
    max_length: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    beta: float,
    seed: int = 0,
    prompt_column: str | None = None,
    win_rate: str | None = None,
    tasks: str | list[str] | None = None,
    suite: str | None = None,
    **others: Any,
) -> None:
    """Refuses invalid arguments of ``evaluate``, and those without effect, before any model is loaded.

    Raises:
        DataError: naming the argument.
    """
    given = {**locals(), **others}
    if not held_out and not prompts and not win_rate and not task_names(tasks, suite):
        raise DataError("nothing to measure: name --held_out data, --prompts, --tasks, or several of these")
    for name, (default, users) in USERS.items():
        if given.get(name, default) != default and not any(given.get(user) for user in users):
            instead = f"; for benchmarks, set --{INSTEAD[name]}" if name in INSTEAD else ""
            needed = " or ".join(filter(None, (", ".join(f"--{user}" for user in users[:-1]), f"--{users[-1]}")))
            raise DataError(f"--{_name(name, given, default)} has no effect without {needed}{instead}")
    if not max_length >= 2:
        raise DataError(f"max_length is {max_length}; it must be at least 2")
    check_sampling(max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, seed=seed)
    if not 0 < beta < float("inf"):
        raise DataError(f"beta is {beta}; it must be above 0 and finite")
    try:
        sources_of("predict", held_out)
    except ValueError as error:
        raise DataError(str(error).replace("data.predict", "held_out")) from error
