"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


class NoHomeError(OSError):
    """There is no home folder, as for a user ID without an entry in a container."""


def cache_root() -> Path:
    """``$HALOS_CACHE``, else ``~/.cache/halos_pl``: converted models and tokenised data. It may be deleted.

    Raises:
        NoHomeError: where neither is known.
    """
    place = os.environ.get("HALOS_CACHE") or "~/.cache/halos_pl"
    try:
        if place.startswith("~") and not os.environ.get("HOME", "unset"):  # it would be the root of the disk
            raise RuntimeError("HOME is empty")
        return Path(place).expanduser()
    except RuntimeError as error:
        raise NoHomeError("the user has no home folder to keep a cache in; HALOS_CACHE names another one") from error
