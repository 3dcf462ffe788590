"""What identifies the files that online training starts from, so that changed ones are noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from halos_pl.common.local_imports import code_digest
from halos_pl.evaluation.arguments import digest_of
from halos_pl.policy.adapters import chain
from halos_pl.policy.loading import stored_config
from halos_pl.policy.source import ADAPTER_CONFIG, config_place
from halos_pl.policy.spec import ModelError, ModelSpec
from halos_pl.training.checkpoint_manifest import file_digest


def of_model(spec: ModelSpec) -> str:
    """The identity of a model and of its adapters: a commit on the hub, or a digest of the files in a folder.

    Raises:
        ModelError: There is no such model.
    """
    root, adapters = chain(spec)
    parts = [_of_files(root, "config.json"), *(_of_files(each.spec, ADAPTER_CONFIG) for each in adapters)]
    return " ".join(parts)


def _of_files(spec: ModelSpec, config: str) -> str:
    path, gguf_file = config_place(spec)
    folder = Path(path)
    if not folder.is_dir():
        stored_config(spec)  # in the cache from now on
        cached = try_to_load_from_cache(path, config, revision=spec.revision)
        return Path(cached).parent.name if isinstance(cached, str) else "not in the cache"
    files = [folder / gguf_file] if gguf_file else sorted(each for each in folder.iterdir() if each.is_file())
    digests = "".join(f"{each.name} {file_digest(each)}\n" for each in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def of_labeller(name: str) -> str | None:
    """The identity of the files of a labeller, ``KIND: NAME``; None if it has none here."""
    kind, _, place = (part.strip() for part in name.partition(":"))
    if kind == "reward":
        try:
            return of_model(ModelSpec(place))
        except ModelError:  # its own check says why
            return None
    if kind == "rule":
        file = Path(place.rpartition(":")[0])
        return code_digest(file) if file.is_file() else None
    return of_file(place)


def of_file(path: str) -> str | None:
    """A digest of a file; None if there is none."""
    return digest_of(path) if Path(path).is_file() else None
