"""``halos check`` and ``halos prove`` refuse an objective's file with a key that no fit takes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from run_halos import ROOT

from halos_pl.cli.objective_file import refuse_as_fit
from halos_pl.cli.targets import loaded, value_function_of
from halos_pl.conformance.target import TargetError


def file_with(folder: Any, more: dict[str, Any]) -> str:
    """KTO's file with further keys, some of them below sections that it has."""
    config = yaml.safe_load((ROOT / "experiments" / "objectives" / "kto.yaml").read_text(encoding="utf-8"))
    for key, value in more.items():
        config[key] = config[key] | value if key in config else value
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"data": {"foo": 1}}, "foo"),
        ({"model": {"policy": {"dtypee": "bfloat16"}}}, "policy.dtypee"),
        ({"model": {"optimizer": {"init_args": {"learning": 1e-6}}}}, "learning"),
        ({"model": {"reference_model": {"class_path": "SyncedCopy", "init_args": {"evry": 2}}}}, "evry"),
        ({"trainer": {"max_stepz": 1}}, "max_stepz"),
        ({"trainer": {"callbacks": [{"class_path": "SampleCompletions", "init_args": {"foo": 1}}]}}, "foo"),
        ({"checkpoint.foo": 1}, "foo"),
        ({"progress": {"foo": 1}}, "foo"),
    ],
)
def test_a_key_that_no_fit_takes_is_refused(more, key, tmp_path):
    path = file_with(tmp_path, more)
    for named in (loaded, value_function_of):
        with pytest.raises(TargetError) as refused:
            named(path, None, "halos")
        assert key in str(refused.value)
        assert path in str(refused.value)
        assert "\n" not in str(refused.value)


def test_settings_of_a_run_are_no_fault(tmp_path):
    more = {
        "model": {"optimizer": {"init_args": {"lr": 1e-6}}, "policy": {"dtype": "bfloat16"}},
        "data": {"train": "rows.jsonl", "batch_size": 4},
        "trainer": {"max_steps": 3},
        "checkpoint.every_n_steps": 7,
        "seed_everything": 3,
    }
    refuse_as_fit(file_with(tmp_path, more))
