"""What a command says when it fails: a line for what a user can fix, a traceback for what only we can."""

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
from halos_pl.common.messages import cause, plain


class RunError(RuntimeError):
    """The run's folder or settings do not allow what was asked."""


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
# An advertisement; and a reason of stopping that is not the true one after early stopping: RunReport says that.
UNSAID = r"litlogger|`Trainer\.fit` stopped: `max"

# Errors that a user can fix, beside RunError, OSError and ValueError.
_ERRORS = {
    "halos_pl.training.module": "NonFiniteLossError",
    "halos_pl.training.checkpoint": "NonFiniteWeightsError",
    "lightning.fabric.utilities.exceptions": "MisconfigurationException",
}


def user_errors() -> tuple[type[Exception], ...]:
    """The errors that a user can fix. One whose module is not imported cannot have been raised."""
    loaded = [getattr(sys.modules[module], name) for module, name in _ERRORS.items() if module in sys.modules]
    return (RunError, OSError, ValueError, *loaded)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Says in one line what a user can fix, and hides what other libraries tell their developers.

    Raises:
        SystemExit: with status 1, for what a user can fix.
    """
    for noise in NOISE:
        warnings.filterwarnings("ignore", noise)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_shown)
    if warnings.formatwarning is not _warning:
        _FORMAT.append(warnings.formatwarning)
        warnings.formatwarning = _warning
    try:
        yield
    except Exception as error:
        if isinstance(error, user_errors()):
            print(f"halos: {type(error).__name__}: {plain(cause(str(error)))}{_cure(error)}", file=sys.stderr)
            raise SystemExit(1) from error
        if re.search(r"Connection (closed|reset) by peer", str(error)):  # gloo's words in a collective
            print("halos: another process of this run has ended; its own lines say why", file=sys.stderr)
            raise SystemExit(1) from error
        error.add_note(
            "halos: this is a fault of halos_pl, or of a plug-in named in the lines above, and not of your data or"
            " options; please report it with these lines"
        )
        raise


_FORMAT: list[Callable[..., str]] = []  # how warnings were formatted before


def _warning(*args: Any, **kwargs: Any) -> str:
    """A warning as it is shown: without the control characters of a path or a column's name."""
    return plain(_FORMAT[-1](*args, **kwargs))


def _shown(record: logging.LogRecord) -> bool:
    """Shows a line of the log unless it is noise, without the control characters of a path or a column's name."""
    record.msg, record.args = plain(record.getMessage()), ()
    return not re.search(UNSAID, record.msg)


def _cure(error: BaseException) -> str:
    """What to do about a file that cannot be written."""
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
