"""Plug-ins of one's own: found by bare name in the working folder, listed in errors, written by ``halos new``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from run_halos import config, run_here

from halos_pl.cli.main import main
from halos_pl.cli.new import FOLDERS, Kind, new
from halos_pl.common.own_plugins import OwnPluginError, import_own, own_plugins
from halos_pl.common.renamed import RENAMED
from halos_pl.conformance import policy_weight
from halos_pl.conformance.target import load_target
from halos_pl.objective.build import PARTS, load_objective
from value_functions import ValueFunction

PLUGINS = {"value_function": "SoftSign", "reward": "OwnReward", "reference_point": "OwnMean", "feedback": "Thumbs"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("kind", "name"), PLUGINS.items())
def test_a_new_plug_in_is_found_by_its_bare_name(here: Path, kind: str, name: str, capfd) -> None:
    new(kind, name)  # type: ignore[arg-type]
    assert [*own_plugins(PARTS[kind])] == [name]
    assert name not in {cls.__name__ for cls in PARTS[kind].__subclasses__()}  # its file is not executed yet
    said = run_here(capfd, ["fit", "--objective=kto", f"--model.{kind}={name}x"])
    assert said.status == 2
    assert name in said
    with pytest.raises(SystemExit):
        main(["fit", "--objective=kto", f"--model.{kind}={name}", "--print_config"])
    assert f".{name}\n" in capfd.readouterr().out


def test_an_objective_file_names_own_plug_ins(here: Path) -> None:
    """All kinds of them in one loss."""
    for kind, name in PLUGINS.items():
        new(kind, name)  # type: ignore[arg-type]
    new("objective", "my_loss")
    text = (here / "my_loss.yaml").read_text()
    lines = [
        f"  {key}: {PLUGINS[key]}" if (key := line.partition(":")[0].strip()) in PLUGINS else line
        for line in text.splitlines()
    ]
    (here / "my_loss.yaml").write_text("\n".join(lines))
    parts = load_objective("my_loss")
    assert {type(getattr(parts, kind)).__name__ for kind in PLUGINS} == {*PLUGINS.values()}


def test_a_new_plug_in_passes_its_own_test_and_the_check(here: Path, capfd) -> None:
    passes(here, "feedback", capfd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["value_function", "reward", "reference_point", "objective"])
def test_every_new_skeleton_passes_its_own_test_and_the_check(here: Path, kind: Kind, capfd) -> None:
    passes(here, kind, capfd)


def passes(here: Path, kind: Kind, capfd) -> None:
    new(kind, "OwnThing")
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(here / "test_own_thing.py")]) == 0
    said = run_here(capfd, ["check", "own_thing.yaml" if kind == "objective" else "OwnThing"])
    assert said.status == 0


@pytest.mark.slow
def test_a_policy_weight_comes_with_a_loss_and_passes_with_it(here: Path, capsys) -> None:
    new("policy_weight", "OwnWeight")
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_own_weight.py"]) == 0
    with pytest.raises(SystemExit):  # it is no HALO
        main(["check", "own_weight.yaml"])
    assert policy_weight.VERDICT in capsys.readouterr().out


def test_a_policy_weight_alone_is_not_checked(here: Path, capfd) -> None:
    new("policy_weight", "OwnWeight")
    for name in ("PairProbability", "OwnWeight", "own_weight.py:OwnWeight"):
        said = run_here(capfd, ["check", name])
        assert said.status == 2
        assert "YAML" in said


def test_new_overwrites_nothing_and_refuses_names_of_nothing(here: Path) -> None:
    new("reward", "Own")
    with pytest.raises(FileExistsError, match=r"own\.py"):
        new("reward", "own")
    for name in ("1st", "a-b", "class", ""):
        with pytest.raises(ValueError, match="cannot be a name"):
            new("reward", name)
    with pytest.raises(ValueError, match="kto"):
        new("objective", "kto")
    assert all(folder.is_dir() for folder in FOLDERS.values())


def test_a_name_of_the_library_and_of_a_file_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match="Logistic is part of halos_pl"):
        new("value_function", "Logistic")
    (here / "logistic.py").write_text("class Logistic(ValueFunction):\n    pass\n")
    with pytest.raises(OwnPluginError, match=r"logistic\.Logistic or value_functions\.logistic\.Logistic"):
        import_own({"value_function": {"class_path": "Logistic"}}, PARTS.values())
    import_own({"value_function": "value_functions.Logistic"}, PARTS.values())
    assert type(load_objective("kto").value_function).__module__ == "value_functions.logistic"


def test_a_file_that_nobody_names_is_not_executed(here: Path) -> None:
    code = "class Mine(ValueFunction):\n    pass\nraise SystemExit('executed')\n"
    (here / "mine.py").write_text(code)
    assert own_plugins(ValueFunction) == {"Mine": [Path("mine.py")]}
    import_own({"value_function": "Other", "note": "Mine or not"}, PARTS.values())
    assert "mine" not in sys.modules


def test_a_file_that_does_not_import_is_named(here: Path) -> None:
    (here / "mine.py").write_text("import no_such_library\nclass DoesNotImport(ValueFunction):\n    pass\n")
    with pytest.raises(OwnPluginError, match=r"mine\.py does not import: .*no_such_library"):
        import_own("DoesNotImport", PARTS.values())


@pytest.mark.parametrize(
    ("option", "new_name"),
    [
        ("--model.packing=tree", "model.prefix_sharing"),
        ("--model.undesirable=reflect", "model.reflect_undesirable"),
        ("--model.constant=1", "model.loss_offset"),
        ("--model.reference_point=Rival", "PairedCompletion"),
        ("--model.reference_point=SortedRival", "RankMatched"),
    ],
)
def test_a_name_of_an_earlier_version_is_answered_by_the_new_one(option: str, new_name: str, capfd) -> None:
    said = run_here(capfd, ["fit", "--objective=kto", option])
    assert said.status == 2
    assert "id you mean" in said
    assert new_name in said


def test_an_objective_file_of_an_earlier_version_is_refused(here: Path) -> None:
    text = (Path(config("objectives/kto").partition("=")[2])).read_text()
    (here / "old.yaml").write_text(text.replace("reflect_undesirable: true", "undesirable: reflect"))
    with pytest.raises(ValueError, match=r"old\.yaml:7: model\.undesirable is now model\.reflect_undesirable: .*true"):
        load_objective(here / "old.yaml")


def test_the_new_names_exist() -> None:
    settings = {"reflect_undesirable", "loss_offset", "prefix_sharing", "mismatched", "pairs", "compute_loss"}
    for name in set(RENAMED.values()) - settings - {"TokenBatch", "LogProbBatch"}:
        assert load_target(name)


def test_a_class_that_extends_an_abstract_part_is_found(here: Path) -> None:
    code = "from value_functions.by_slope import BySlope\nclass OwnSlope(BySlope):\n"
    code += "    def slope(self, u):\n        return u * 0 + 1\n"
    (here / "own_slope.py").write_text(code)
    assert own_plugins(ValueFunction)["OwnSlope"] == [Path("own_slope.py")]
    import_own({"value_function": "OwnSlope"}, PARTS.values())
    assert "own_slope" in sys.modules
