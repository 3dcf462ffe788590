"""Errors of commands: one line for those that a user can fix, a traceback for bugs."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halos_pl.cache import NoHomeError, cache_root
from halos_pl.cli.broken_pipe import is_unread
from halos_pl.common.messages import cause, plain
from halos_pl.common.stopping import is_first


class RunError(RuntimeError):
    """A command that the run's folder or settings do not allow."""


class UsageError(SystemExit):
    """Wrong words of a command, which ends with status 2.

    Args:
        line: The error in one line. It is printed at once, unless the ranks of a run have yet to agree on who does.
    """

    def __init__(self, line: str) -> None:
        super().__init__(2)
        self.line, self._printed = line, False
        if not (_ranks() and _ranks().watched()):
            self.print()

    def print(self) -> None:
        """Prints the line, once."""
        if not self._printed and speaks():
            print(self.line, file=sys.stderr)
        self._printed = True


def _ranks() -> Any:
    """The module that watches the ranks of a run; None if it has not been imported."""
    return sys.modules.get("halos_pl.training.rank_failure")


def speaks() -> bool:
    """Whether this process reports its error.

    Ranks that know of each other have agreed. Of others, which were started by hand with the same words, the first on
    each machine does. One that Lightning has started does, since rank 0 has got further.
    """
    return bool(_ranks() and _ranks().prefix()) or is_first() or "WORLD_SIZE" in os.environ


# Warnings that other libraries address to their own developers.
NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",
    r".*is_gradient_checkpointing",
    r".*Couldn't infer the batch indices",
    r".*does not have many workers",
    r".*Experiment logs directory",
    r".*dataloader is not resumable",  # it is: a batch is a function of seed, epoch and step
    r".*LightningCLI's args parameter",
)
# An advertisement, and Lightning's reason for stopping, wrong after early stopping: RunReport logs the right one.
UNSAID = r"litlogger|`Trainer\.fit` stopped: `max"

# Lines that torchao's import logs where it is built for another Python or device, and on its own classes. transformers
# and peft import it wherever it is installed.
IMPORTING = r"Failed to load \S+\.so: Could not load this library|is an Enum subclass and is now natively supported"

# Errors that a user can fix, beside RunError, OSError and ValueError.
_ERRORS = {
    "halos_pl.training.non_finite": ("NonFiniteLossError", "NonFiniteWeightsError"),
    "lightning.fabric.utilities.exceptions": ("MisconfigurationException",),
}


def user_errors() -> tuple[type[Exception], ...]:
    """The errors that a user can fix. One whose module is not imported cannot have been raised."""
    imported = {module: names for module, names in _ERRORS.items() if module in sys.modules}
    loaded = [getattr(sys.modules[module], name) for module, names in imported.items() for name in names]
    return (RunError, OSError, ValueError, *loaded)


def described(error: BaseException) -> tuple[str, bool]:
    """One line on an error, and whether a user can fix it."""
    if isinstance(error, UsageError):
        return error.line, True
    if isinstance(error, SystemExit):
        return f"ended with status {error.code}", True
    if isinstance(error, user_errors()):
        return f"{type(error).__name__}: {plain(cause(str(error)))}{_cure(error)}", True
    return f"{type(error).__name__}: {plain(str(error).strip().partition(chr(10))[0])}", False


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Prints errors that a user can fix in one line, and hides warnings that libraries address to their developers.

    Raises:
        SystemExit: with status 1, for an error that a user can fix.
    """
    for noise in NOISE:
        warnings.filterwarnings("ignore", noise)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_shown)
    quiet_imports()
    if warnings.formatwarning is not _warning:
        _FORMAT.append(warnings.formatwarning)
        warnings.formatwarning = _warning
    try:
        yield
    except BaseException as error:
        ranks = _ranks()
        if isinstance(error, UsageError):
            error.print()
        if ranks is not None and isinstance(error, ranks.PeerFailed):
            if error.prints:
                print(f"halos: {plain(error)}", file=sys.stderr)
            raise SystemExit(error.failure.status) from error
        if not isinstance(error, Exception) or is_unread(error):
            raise
        rank, (text, fixable) = ranks.prefix() if ranks else "", described(error)
        if fixable:
            if speaks():
                print(f"halos: {rank}{text}", file=sys.stderr)
            raise SystemExit(1) from error
        if re.search(r"Connection (closed|reset) by peer", str(error)):  # gloo's words in a collective
            print("halos: another process of this run has ended; see its output for the reason", file=sys.stderr)
            raise SystemExit(1) from error
        error.add_note(
            f"halos: {rank}this is a bug in halos_pl, or in a plug-in named in the lines above, not in your data or"
            " options; please report it with these lines"
        )
        raise


def quiet_imports() -> None:
    """Hides log lines that importing torchao always causes."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_not_of_import)


_FORMAT: list[Callable[..., str]] = []  # the formatter that was replaced


def _warning(message: Any, *args: Any, **kwargs: Any) -> str:
    """The text of a warning, without control characters from paths or column names; ours without a line of code."""
    text = str(message)
    return plain(f"{text}\n" if text.startswith("halos:") else _FORMAT[-1](message, *args, **kwargs))


def _shown(record: logging.LogRecord) -> bool:
    """Whether to show a log line; removes control characters from paths or column names."""
    record.msg, record.args = plain(record.getMessage()), ()
    return not re.search(UNSAID, record.msg)


def _not_of_import(record: logging.LogRecord) -> bool:
    """Whether to show a log line: not if importing torchao always causes it."""
    return not re.search(IMPORTING, record.getMessage())


def _cure(error: BaseException) -> str:
    """How to fix the error of a file that cannot be written."""
    if not isinstance(error, OSError):
        return ""
    cures, place = [], error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cures.append(f"free some space{'' if place else f' there or in {tempfile.gettempdir()}'}")
    with contextlib.suppress(NoHomeError):
        root = cache_root()
        named = Path(os.fsdecode(place)) if isinstance(place, (str, bytes)) else None
        if named is not None and (named.is_relative_to(root) or (root.is_relative_to(named) and not root.exists())):
            cures.append("HALOS_CACHE names another folder for the cache")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            cures.append("name a folder of another disk")
    return "".join(f"; {cure}" for cure in cures)
