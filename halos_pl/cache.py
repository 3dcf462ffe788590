"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$HALOS_CACHE``, else ``~/.cache/halos_pl``: converted models and tokenised data. It may be deleted."""
    return Path(os.environ.get("HALOS_CACHE") or "~/.cache/halos_pl").expanduser()
