"""The files that a user's code consists of."""

from __future__ import annotations

from pathlib import Path

import pytest

from halos_pl.common.local_imports import code_digest, with_imports

FILES = {
    "rule.py": "import json, first\nfrom package.inner import f\n\ndef g():\n    from lazy import h\n",
    "first.py": "import second\n",
    "second.py": "import first\n",  # a circle
    "lazy.py": "this does not parse",
    "package/__init__.py": "from . import sibling\n",
    "package/inner.py": "from ..beside import x\nfrom ... import outside\n",
    "package/sibling.py": "",
    "beside.py": "",
    "unused.py": "",
    "json/unrelated.py": "",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside.py").touch()
    for name, text in FILES.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "code"


def test_they_are_those_that_it_imports_from_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted({*FILES} - {"unused.py", "json/unrelated.py"})
    assert sorted(str(file.relative_to(folder)) for file in with_imports(folder / "rule.py")) == names
    digest = code_digest(folder / "rule.py")
    monkeypatch.chdir(folder)
    assert code_digest(Path("rule.py")) == digest


@pytest.mark.parametrize("name", FILES)
def test_a_change_of_any_of_them_is_noticed_and_of_others_is_not(folder: Path, name: str) -> None:
    before = code_digest(folder / "rule.py")
    with (folder / name).open("a") as file:
        file.write("\n# changed\n")
    assert (code_digest(folder / "rule.py") != before) == (name not in ("unused.py", "json/unrelated.py"))
