"""The keys at the top of a config file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halos_pl.common.yaml_files import Lines, YAMLFileError

#: Keys whose values are mappings.
GROUPS = ("data", "model", "checkpoint", "progress", "trainer")
#: All keys of a run's ``config.yaml``.
KEYS = (*GROUPS, "seed_everything", "run_dir", "ckpt_path", "weights_only")


def check_groups(path: str | Path, content: Mapping[str, Any], lines: Lines) -> None:
    """Refuses a group that is neither a mapping nor the path of a file with one.

    Raises:
        YAMLFileError: names file, line and key.
    """
    for key in GROUPS:
        if not isinstance(content.get(key, {}), (dict, str)):
            value = json.dumps(content[key], default=str)
            raise YAMLFileError(f"{path}:{lines[(key,)]}: {key} is {value}; it takes a mapping")
