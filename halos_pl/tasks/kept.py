"""Results of benchmarks, kept in the cache: a study measures the model that its runs begin with once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halos_pl.cache import ANSWERS, Use, cache_root, make_room
from halos_pl.common.files import unique_name, write
from halos_pl.common.leases import Lease
from halos_pl.data.cache_key import tokenizer_state
from halos_pl.policy.identity import model_fingerprint
from halos_pl.provenance import provenance
from halos_pl.tasks.load import Benchmark
from halos_pl.tasks.run import Prompting, Values, publish, run


def run_once(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    benchmarks: Sequence[Benchmark],
    how: Prompting,
    folder: Path,
    *,
    questions: str,
) -> Values:
    """Like :func:`halos_pl.tasks.run.run`, but from the cache if the same model has answered the same questions.

    Args:
        model, tokenizer, name, benchmarks, how, folder: As there.
        questions: The :func:`digest` of the benchmarks.

    Raises:
        DataError: As there.
    """
    path = cache_root() / ANSWERS / f"{_key(model, tokenizer, how, questions)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lease(path.with_suffix(".lock")).held():  # concurrent evaluations of a study wait for the first
        use = Use(path)
        kept = _read(path)
        use.end()
        if kept is not None:
            publish(kept["files"].items(), folder)
            print(f"halos: the benchmark answers of {name} are cached from an earlier evaluation: {path}")
            return kept["values"]  # type: ignore[no-any-return]
        values = run(model, tokenizer, name, benchmarks, how, folder)
        files = {each.name: each.read_text(encoding="utf-8") for each in sorted(folder.iterdir())}
        content: dict[str, Any] = {"values": values, "files": files}
        write(path, json.dumps({"sha256": _hash(content), **content}), writer=unique_name())
    make_room()
    return values


def digest(benchmarks: Iterable[Benchmark]) -> str:
    """A hash of prompts, questions and scoring, after the prompts were built."""
    tasks = [
        [leaf, task.dump_config(), [request.args for request in task.instances]]
        for each in benchmarks
        for leaf, task in each.leaves.items()
        if leaf in each.drawn
    ]
    questions = [row for each in benchmarks for row in each.docs()]
    return _hash([tasks, questions])


def _key(model: nn.Module, tokenizer: Any, how: Prompting, questions: str) -> str:
    """A hash of all that affects the results: weights, tokenizer, questions, settings, code and device."""
    origin, device = provenance(), next(model.parameters()).device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    code = [origin["halos_pl"], origin["versions"], version("lm_eval"), on, torch.get_num_threads()]
    settings = [tokenizer_state(tokenizer), how.options, how.batch_size, code]
    return _hash([model_fingerprint(model), questions, settings])[:32]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """Kept results; None if there are none, or if they are damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content if content.pop("sha256") == _hash(content) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
