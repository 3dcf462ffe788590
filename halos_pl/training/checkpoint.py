"""A run's checkpoints: how they are written, so that a kill leaves a good one, and how they are read."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from halos_pl.common.files import PART
from halos_pl.run_dir import LAST, PREVIOUS


class CheckpointError(ValueError):
    """A checkpoint is damaged, no checkpoint of a halos run, or holds code; the message names the file."""


class NonFiniteWeightsError(FloatingPointError):
    """What would be saved is not finite; the message names the first tensors and the last good checkpoint."""


# -- reading --------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _damage_of(path: Path, inode: int, size: int, changed: int) -> str | None:
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, size - 22))
        end = file.read(4)
    if not size:
        return "is empty"
    if start != b"PK\3\4":
        if start[:1] == b"\x80":
            return "is a bare pickle, which is never loaded, as it may run code"
        return f"is no checkpoint, or its beginning is damaged (it begins with {start!r})"
    if end != b"PK\5\6":
        return "is damaged: it was cut off, or something was appended to it"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                return "is damaged: it holds an entry twice"
            if min((entry.header_offset for entry in entries), default=0):
                return "is damaged: bytes were put before its beginning"
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    return f"is damaged: the size of {entry.filename} is wrong"
            wrong = archive.testzip()
            return f"is damaged: the checksum of {wrong} is wrong" if wrong else None
    except Exception as error:  # zipfile raises many kinds for a damaged directory
        return f"is damaged: {error}"


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, None if nothing is; ``torch.load`` verifies no checksum.

    Reads the whole file, about 0.5 GB a second, unless this process has read it before.
    """
    found = path.stat()
    return _damage_of(path, found.st_ino, found.st_size, found.st_mtime_ns)


def _instead_of(path: Path) -> str:
    """Another checkpoint of the same folder that is whole, as an end of a message."""
    for name in (LAST.name, PREVIOUS.name):
        other = path.with_name(name)
        if other.is_file() and not other.samefile(path) and not damage(other):
            return f"; {other} is whole: resume with --ckpt_path {other}"
    return ""


def read_checkpoint(path: Path, *, resume: bool = False, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint of a halos run, on the CPU. Its bytes are verified, and nothing in it is executed.

    Args:
        path: the file.
        resume: it must hold all that a fit needs to resume, not the weights alone.
        mmap: map the tensors instead of reading them; for a look at the file.

    Raises:
        FileNotFoundError: where there is no such file.
        CheckpointError: where it is damaged or foreign, or would run code.
    """
    if wrong := damage(path):
        raise CheckpointError(f"{path} {wrong}{_instead_of(path)}")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        name = _class_in(error)
        what = f"holds an object of {name}" if name else f"holds more than tensors and plain values ({error})"
        what = what.splitlines()[0]
        raise CheckpointError(
            f"{path} {what}: loading it could run code, so it is refused{_instead_of(path)}"
        ) from error
    except Exception as error:  # torch raises many kinds for files of other programs
        what = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not a checkpoint of a halos run: {what}{_instead_of(path)}") from error
    state = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(state, dict) or not any(str(name).startswith(("scorer.", "objective.")) for name in state):
        inside = ", ".join(list(map(str, state or found))[:3]) if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(f"{path} is not a checkpoint of a halos run; it holds {inside}{_instead_of(path)}")
    missing = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in found]
    if resume and missing:
        raise CheckpointError(
            f"{path} holds the weights alone (no {', '.join(missing)}), so a fit cannot resume from it; export it and"
            f" train the exported model{_instead_of(path)}"
        )
    if resume and (wrong := _unusable(found)):
        raise CheckpointError(f"{path} is not a checkpoint that a fit can resume from: {wrong}{_instead_of(path)}")
    checkpoint: dict[str, Any] = found
    return checkpoint


def _class_in(error: pickle.UnpicklingError) -> str | None:
    """The class or function that ``torch.load(weights_only=True)`` has refused to load, where it names one."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1] if name else None


def _unusable(found: Mapping[str, Any]) -> str:
    """The entry that a fit cannot resume from, as no halos run writes it in this form; empty where all are sound."""
    loops = found["loops"].get("fit_loop") if isinstance(found["loops"], Mapping) else None
    counts = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    if not isinstance(loops, Mapping) or not all(isinstance(loops.get(name), Mapping) for name in counts):
        return "loops"
    for name in ("optimizer_states", "lr_schedulers"):
        if not isinstance(found[name], list) or not all(isinstance(state, Mapping) for state in found[name]):
            return name
    return "" if found["optimizer_states"] else "optimizer_states"


def find_checkpoint(run: Path, name: str | None = None) -> Path:
    """The file of a run's checkpoint.

    Args:
        run: the run's folder.
        name: ``last`` (or None), ``best``, or a path. The best one is that of the run's ``ModelCheckpoint``.

    Raises:
        FileNotFoundError: where there is none.
        CheckpointError: where the run does not tell which one is best, or the file cannot be used.
    """
    last, previous = run / LAST, run / PREVIOUS
    if name in (None, "last"):
        if last.exists() or not previous.is_file():
            return _existing(last, f"{run} is not the folder of a run that has reached a checkpoint")
        rank_zero_info(f"halos: {last} does not exist; using {previous}")
        return previous
    if name != "best":
        return _existing(Path(str(name)), "a checkpoint is last, best, or a file")
    return _best(run)


def _best(run: Path) -> Path:
    """The file that a run's ModelCheckpoint has found best by what it monitors.

    Which one that is, is read off ``last.ckpt``. Where the file is gone, since a running or killed fit has found a
    better one meanwhile, it is read off the newest other checkpoint.
    """
    last = find_checkpoint(run)
    others = sorted({*last.parent.rglob("*.ckpt")} - {last}, key=lambda path: -path.stat().st_mtime)
    gone = ""
    for number, path in enumerate((last, *others)):
        try:
            states = read_checkpoint(path, mmap=True).get("callbacks", {}).values()
        except CheckpointError:
            if not number:
                raise
            continue
        kept = [state for state in states if isinstance(state, Mapping) and "best_model_path" in state]
        found = {state["best_model_path"]: state for state in kept if state.get("monitor")}
        found.pop("", None)
        if len(found) != 1:
            if number:
                continue
            raise CheckpointError(f"no checkpoint is the best one: {_why_none_is_best(run, kept, found)}")
        name, state = found.popitem()
        parts = Path(name).parts[Path(name).is_absolute() :]
        # The run's folder may have another name by now, and another run may be where it was.
        inside = (run.joinpath(*parts[first:]) for first in range(len(parts)))
        for best in (*inside, Path(name)):
            if best.is_file():
                score = state.get("best_model_score")
                of = f" ({float(score):.6g})" if score is not None else ""
                rank_zero_info(f"halos: {best} is the best checkpoint of {run} by {state['monitor']}{of}")
                return best
        gone = gone or name
    raise FileNotFoundError(f"{gone} does not exist; it was the best checkpoint of {run}")


def _why_none_is_best(run: Path, kept: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> str:
    if found:
        each = ", ".join(f"{path} (by {state['monitor']})" for path, state in sorted(found.items()))
        return f"the ModelCheckpoints of {run} have found several: {each}; name one of these files"
    if any(state.get("monitor") for state in kept):
        return f"the ModelCheckpoint of {run} has not kept any yet"
    if kept:
        return f"the ModelCheckpoint of {run} monitors nothing, so none is best; name a file, or give it a monitor"
    return f"{run} was trained without a ModelCheckpoint, so none is best; say last, or name a file"


def _existing(path: Path, why: str) -> Path:
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a regular file{_instead_of(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {why}")
    return path


def entry_kind(value: Any) -> Any:
    """What an entry of a state dict must have in common with the one that it replaces: shape and kind of number."""
    return (value.shape, value.is_floating_point()) if isinstance(value, Tensor) else None


def load_trained(run: Path, name: str | None = None) -> dict[str, Tensor]:
    """The state dict of a run's checkpoint, its last one unless ``name`` says otherwise (see :func:`find_checkpoint`).

    Raises:
        FileNotFoundError: where the run has none.
        CheckpointError: where it cannot be used.
    """
    state: dict[str, Tensor] = read_checkpoint(find_checkpoint(run, name))["state_dict"]
    return state


# -- writing --------------------------------------------------------------------------------------------


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep(path: Path, aside: Path) -> None:
    """Gives a file a second name; ``path`` is there all the time where the file system has hard links."""
    beside = aside.with_name(f"{aside.name}{PART}")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
        os.replace(beside, aside)
    except OSError:
        os.replace(path, aside)


class CheckpointFiles(TorchCheckpointIO):
    """Writes each checkpoint beside its place, onto the disk, and moves it there; verifies it before it is loaded.

    A kill at any moment leaves the old file or the new one. ``storage_options={"keep": path}`` keeps the old one, too.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes ``checkpoint`` to ``path``.

        Raises:
            OSError: naming the file, where it cannot be written; an older one there is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path)
            return
        path = Path(path)
        beside = path.with_name(f"{path.name}{PART}")
        keep = (storage_options or {}).get("keep")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, beside)
            _sync(beside)
            if keep is not None and path.is_file():
                _keep(path, Path(keep))
            os.replace(beside, path)
            _sync(path.parent)
        except (OSError, RuntimeError) as error:
            less = "; --checkpoint.keep 1 takes a third less" if keep is not None else ""
            raise OSError(f"{path} cannot be written: {_reason(error, path.parent)}{less}") from error
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint at ``path``, on the CPU.

        Raises:
            CheckpointError: see :func:`read_checkpoint`.
        """
        refuse_code(weights_only)
        return read_checkpoint(Path(path))


def _reason(error: Exception, folder: Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "unexpected pos" not in str(error):
        return str(error).splitlines()[0]
    with suppress(OSError):  # torch's words for a write that was cut short
        return f"only a part of it was taken, with {shutil.disk_usage(folder).free / 1e6:.0f} MB left on the disk"
    return "only a part of it was taken"


def refuse_code(weights_only: bool | None) -> None:
    """Refuses ``weights_only=False``.

    Raises:
        CheckpointError: then.
    """
    if weights_only is False:
        raise CheckpointError(
            "weights_only is false, but a checkpoint is never loaded in a way that could run its code; remove"
            " --weights_only"
        )


def check_callbacks(trainer: Trainer) -> None:
    """Refuses a callback whose state could be saved, but not loaded again without running code.

    Raises:
        CheckpointError: naming the callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        file = io.BytesIO()
        torch.save(callback.state_dict(), file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"trainer.callbacks: the state of {type(callback).__name__} holds {_class_in(error) or 'an object'},"
                " which no checkpoint can hold: let its state_dict return tensors, numbers, strings, lists and dicts"
            ) from error


def check_finite(checkpoint: Mapping[str, Any], trained: set[str], good: str) -> None:
    """Refuses to save what has diverged. Reads each tensor once and copies one number from each device.

    Args:
        checkpoint: what is about to be written.
        trained: names in its ``state_dict`` that are trained. The others, such as masks, may hold infinities.
        good: the end of the message, which names the last good checkpoint.

    Raises:
        NonFiniteWeightsError: naming the first tensors that are not finite.
    """
    state = [(name, t) for name, t in checkpoint["state_dict"].items() if isinstance(t, Tensor)]
    fixed = [(name, torch.where(t.isinf(), 0, t)) for name, t in state if name not in trained and t.is_floating_point()]
    checked = [(name, t) for name, t in state if name in trained]
    checked += fixed + list(_tensors(checkpoint.get("reference_model", {}), "reference_model"))
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        checked += _tensors(optimizer.get("state", {}), f"optimizer_states.{number}")
    checked = [(name, t) for name, t in checked if t.is_floating_point() and t.numel()]
    if not checked or torch.nn.utils.get_total_norm([t for _, t in checked]).isfinite():
        return
    names, what = [name for name, tensor in checked if not tensor.isfinite().all()], "are not finite"
    if not names:  # no policy can be computed with weights whose squares overflow
        names = [n for n, t in state if n in trained and t.numel() and not t.float().norm().isfinite()]
        what = "are so large that their squares are not finite"
    if not names:
        return
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise NonFiniteWeightsError(
        f"after optimizer step {checkpoint['global_step']} these {what}: {', '.join(names[:3])}{more}; nothing"
        f" was saved. Lower the learning rate (model.optimizer.init_args.lr).\n{good}"
    )


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{name}.{key}")


def _after(loop: Any, then: Callable[[], None]) -> None:
    """Calls ``then`` whenever one of Lightning's loops has finished a step or an epoch, where Lightning has no hook."""
    finish = loop.on_advance_end

    def on_advance_end(*args: Any) -> None:
        finish(*args)
        then()

    loop.on_advance_end = on_advance_end


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run's folder, and the one before as ``checkpoints/previous.ckpt``.

    It is written every few steps and at the end of the fit, once the step is complete: its line is in the log, and a
    validation that was due has run. Its weights are all finite. A kill at any moment leaves a whole file. Add
    Lightning's ``ModelCheckpoint`` to keep the best one by some metric.

    Args:
        every_n_steps: optimizer steps from one checkpoint to the next.
        keep: how many checkpoints are kept, 1 or 2.

    Raises:
        ValueError: for a number outside its range.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 2) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        if keep not in (1, 2):
            raise ValueError(f"checkpoint.keep is {keep}; it must be 1 (last.ckpt) or 2 (previous.ckpt as well)")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.last_model_path = ""
        self._saved_step = self._first_step = -1
        self._previous: tuple[str, int] | None = None
        self._batch: Any = None
        self._own = False  # last.ckpt belongs to this run, and was verified when it was loaded or written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has :class:`CheckpointFiles` read and write all checkpoints, and checks that the folder can be written to.

        Raises:
            ValueError: where the Trainer was given another checkpoint plug-in.
            OSError: where the folder cannot be written to.
        """
        given: CheckpointIO = trainer.strategy.checkpoint_io
        if type(given) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        elif not isinstance(given, CheckpointFiles):
            raise ValueError(
                f"trainer.plugins: {type(given).__name__} is not supported: a run writes and verifies its checkpoints"
                " in its own way"
            )
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / LAST.parent
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{PART}"):  # by a run that was killed while it wrote
                left.unlink()
            mismatched = folder / f"mismatched row{PART}"
            mismatched.touch()
            mismatched.unlink()
        loop = trainer.fit_loop
        _after(loop.epoch_loop, lambda: None if self._epoch_ends(trainer) else self._save_if_due(trainer))
        _after(loop, lambda: self._save_if_due(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
            vars(loop).pop("on_advance_end", None)

    @staticmethod
    def _epoch_ends(trainer: Trainer) -> bool:
        """With this step: then what callbacks do at the end of an epoch belongs to it."""
        loop = trainer.fit_loop
        return loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early)

    def _save_if_due(self, trainer: Trainer) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step > self._first_step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes ``last.ckpt``, on all ranks together, unless this step has been saved already.

        Raises:
            NonFiniteWeightsError: where the policy has diverged; what was saved before is left alone.
            OSError: where the file cannot be written.
        """
        if self._saved_step == trainer.global_step:
            return
        folder = Path(trainer.default_root_dir)
        keep = self.keep == 2 and self._own
        options = {"keep": folder / PREVIOUS} if keep else None
        trainer.save_checkpoint(folder / LAST, weights_only=False, storage_options=options)
        if keep:
            self._previous = (str(folder / PREVIOUS), self._saved_step)
        elif trainer.is_global_zero and not (self._previous and self.keep == 2):
            (folder / PREVIOUS).unlink(missing_ok=True)  # left by the run before it resumed from elsewhere
        self.last_model_path, self._saved_step, self._own = str(folder / LAST), trainer.global_step, True

    def good(self, diverged: int | None = None) -> str:
        """A line that names the last good checkpoint, and the one before it.

        Args:
            diverged: the step whose checkpoint is not counted, because its weights have diverged.
        """
        named = [(self.last_model_path, self._saved_step)] if self.last_model_path else []
        named += [self._previous] if self._previous else []
        good = [f"{path} (optimizer step {step})" if step >= 0 else path for path, step in named if step != diverged]
        if not good:
            return f"last good checkpoint: none{'' if named else ' was written yet'}"
        return f"last good checkpoint: {'; before it: '.join(good)}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the checkpoint that the run resumes from.

        Raises:
            CheckpointError: where a callback's state could not be loaded again.
        """
        self._first_step = trainer.global_step
        check_callbacks(trainer)
        if not trainer.ckpt_path:
            return
        folder, loaded = Path(trainer.default_root_dir), Path(trainer.ckpt_path)
        self.last_model_path = str(loaded)
        last, previous = folder / LAST, folder / PREVIOUS
        if last.is_file() and last.samefile(loaded):
            self._saved_step, self._own = trainer.global_step, True
            if self.keep == 1 and trainer.is_global_zero:
                previous.unlink(missing_ok=True)
        elif previous.is_file() and previous.samefile(loaded):
            self._previous = (str(previous), trainer.global_step)  # it stays: last.ckpt may be damaged

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the policy of the last step still gives finite log-probs, and saves it.

        A trial of a config (fast_dev_run) leaves the run in the folder alone.
        """
        batch, self._batch = self._batch, None
        check: Any = getattr(pl_module, "check_policy", None)
        if batch is not None and check is not None:
            check(batch)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)
