"""A damaged file of a study's folder is named in one line, with what to do; nothing is computed from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tuned_studies import Fakes, faked, maker

from halos_pl.cli.main import main
from halos_pl.study.record_shape import misshapen

pytestmark = pytest.mark.filterwarnings("ignore")

RUN, TRIAL = (f"kto/lr=0.001/seed-{seed}" for seed in (0, 100))
#: The commands that read each file.
READ = {
    "plan.json": ("report", "ablate"),
    f"{RUN}/evaluation.json": ("report", "status", "ablate"),
    f"{TRIAL}/evaluation.json": ("report", "status", "ablate"),
    f"{RUN}/measured.json": ("report", "status", "ablate"),
    f"{RUN}/before.json": ("report", "ablate"),
    f"{RUN}/summary.json": ("status",),  # a run without a whole summary is trained again
}


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study, and its finished folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        faked(patch)
        study = maker(tiny_folder, folder)()
        main(["ablate", str(study), f"--out={folder / 'out'}"])
    return study, folder / "out"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return faked(monkeypatch)


def refused(capsys: Any, words: list[str]) -> str:
    """The only line that a command says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert said.err.startswith("halos: ")
    assert said.err.count("\n") == 1
    return str(said.err)


@pytest.mark.parametrize("text", ["{", "[]", ""])
@pytest.mark.parametrize("file", READ)
def test_a_damaged_file_is_named(
    file: str, text: str, whole: tuple[Path, Path], tmp_path: Path, fakes: Fakes, capsys: Any
) -> None:
    study, finished = whole
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / file).write_text(text)
    for command in READ[file]:
        words = ["ablate", str(study), f"--out={out}"] if command == "ablate" else ["ablate", command, str(out)]
        assert str(out / file) in refused(capsys, words)
    assert not fakes.called


@pytest.mark.parametrize("part", [{"reward_accuracy": {"a": "many"}}, {"reward_accuracy": [1]}, {"kl_held_out": 3}])
def test_figures_of_another_shape_are_damaged(
    part: dict[str, Any], whole: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    out = Path(shutil.copytree(whole[1], tmp_path / "out"))
    path = out / RUN / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | part))
    said = refused(capsys, ["ablate", "report", str(out)])
    assert str(path) in said
    assert next(iter(part)) in said


def test_runs_that_a_record_does_not_describe_are_damaged(whole: tuple[Path, Path]) -> None:
    record = json.loads((whole[1] / "record.json").read_text())
    assert misshapen(record) == ""
    for made in ([{}], [{"names": []}], [{"runs": 1}]):
        assert "made" in misshapen(record | {"made": made})
