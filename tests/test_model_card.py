"""The model card of an export, and its upload."""

from __future__ import annotations

import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_halos import binary_data, fit, refused

from halos_pl.cli import model_card
from halos_pl.cli.main import main


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    data = binary_data(folder / "feedback.jsonl")
    main(fit(tiny_folder, "kto", data, folder / "run", "--trainer.max_steps=1", "--model.policy.lora.r=2"))
    (folder / "run" / "test.json").write_text('{"step": 1, "test/auroc": 0.625}')
    (folder / "run" / "measured.json").write_text('{"step": 1}')
    (folder / "run" / "evaluation.json").write_text('{"rule": {"a": 1.0, "b": 0.5}}')
    return folder / "run"


def test_the_card_tells_base_objective_verdict_data_and_figures(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    main(["export", str(run), str(out)])
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["halos_pl"]}  # the base is not on the hub
    assert tiny_folder.name in body
    assert str(tiny_folder.parent) not in text
    table = {row["name"]: row for row in json.loads(model_card.OBJECTIVES_TABLE.read_text())}
    assert f"`{table['kto']['formula']}`" in body
    assert f": {table['kto']['verdict']['icml']}\n" in body
    assert "rank 2" in body
    summary = json.loads((run / "summary.json").read_text())
    (digest,) = summary["digests"].values()
    assert f"| feedback.jsonl | `{digest}` |" in body
    assert f"| loss | {summary['metrics']['loss']:.4g} | last step |" in body
    assert "| test/auroc | 0.625 | halos test |" in body
    assert "| rule | 0.75 (n = 2) | halos evaluate |" in body
    assert "halos export run mine\n" in body


@pytest.mark.parametrize("measured", [{"step": 2}, {"step": 1, "model": "other"}, {}])
def test_figures_of_other_weights_are_left_out_and_said(
    run: Path, tmp_path: Path, measured: dict[str, Any], capfd: Any
) -> None:
    def figures(folder: Path, step: int) -> list[str]:
        return model_card.model_card(str(folder), "out", ["halos"], step).partition("## Figures")[2].split("\n")

    whole = figures(run, 1)
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints"))
    (other / "measured.json").write_text(json.dumps(measured))
    capfd.readouterr()
    assert figures(other, 1) == [line for line in whole if "halos evaluate" not in line]
    assert "halos evaluate" in capfd.readouterr().out
    assert "Figures" not in model_card.model_card(str(run), "out", ["halos"], 3)  # such as that of another epoch


def test_the_command_can_be_repeated_and_names_do_not_break_the_card(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "a run"
    shutil.copytree(run, other)
    summary = json.loads((run / "summary.json").read_text())
    name = "f|b `x`.jsonl"
    (other / "summary.json").write_text(json.dumps({**summary, "digests": {f"/data/{name}": "0"}}))
    out = tmp_path / "my out"
    main(["export", str(other), str(out), "--max_shard_size=1MB", "--dtype=bfloat16"])
    text = (out / "README.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("halos export"))
    assert shlex.split(command)[2:4] == ["a run", "my out"]
    assert {"--max_shard_size 1MB", "--dtype bfloat16"} <= {f"{a} {b}" for a, b in pairwise(shlex.split(command))}
    (row,) = (line for line in text.splitlines() if line.endswith("| `0` |"))
    assert row.replace("\\|", "").count("|") == 3


def test_an_adapter_has_a_card_and_keeps_that_of_another_author(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["export", str(run), str(out), "--adapter=true"])
    assert "Written by halos export" in (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    main(["export", str(run), str(out), "--adapter=true", "--overwrite=true"])
    assert (out / "README.md").read_text() == "mine"


def test_a_card_of_another_author_stays(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["export", str(run), str(out)])
    card = out / "README.md"
    first = card.read_text()
    card.write_text(first + "stale")
    main(["export", str(run), str(out), "--overwrite=true"])
    assert card.read_text() == first
    (out / "README.md").write_text("mine")
    main(["export", str(run), str(out), "--overwrite=true"])
    assert (out / "README.md").read_text() == "mine"


def test_a_model_of_the_hub_is_named_as_the_base() -> None:
    front = model_card.model_card("org/name", "out", ["halos"]).split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == "org/name"


def test_without_the_hub_nothing_is_begun(run: Path, tmp_path: Path, capfd: Any) -> None:
    for name in ("me/model", "not a name"):
        line = refused(capfd, ["export", str(run), str(tmp_path / "out"), f"--push_to_hub={name}"])
        assert name in line
        assert "\n" not in line.strip()
    assert not (tmp_path / "out").exists()


def test_the_folder_is_uploaded_to_a_private_repository(
    run: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        fails = False

        def whoami(self) -> None:
            calls.append(("whoami", None))

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            calls.append(("create", (name, private, exist_ok)))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            if Api.fails:
                raise RuntimeError("connection lost\nhalf way")
            calls.append(("upload", (repo_id, sorted(path.name for path in folder_path.iterdir()))))
            return "the place"

    monkeypatch.setattr(model_card, "HfApi", Api)
    out = tmp_path / "out"
    main(["export", str(run), str(out), "--push_to_hub=me/model"])
    assert [name for name, _ in calls] == ["whoami", "create", "upload"]
    assert calls[1][1] == ("me/model", True, True)
    name, files = calls[2][1]
    assert name == "me/model"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {*files}
    Api.fails = True
    line = refused(capfd, ["export", str(run), str(out), "--overwrite=true", "--push_to_hub=me/model"])
    assert "connection lost half way" in line
    assert (out / "config.json").exists()
