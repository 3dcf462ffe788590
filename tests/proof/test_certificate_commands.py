"""``halos prove`` and ``halos verify`` on the command line, and the hash of the code and state of v."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halos_pl.cli.prove import prove
from halos_pl.cli.verify import verify
from halos_pl.objective.build import module_of_file
from halos_pl.proof.source import source_hash
from value_functions import Mixture, Tanh, ValueFunction

HEAD = "import torch\nfrom value_functions import ValueFunction\nfrom {helper} import factor\n"
CODE = HEAD + "class {name}(ValueFunction):\n    def forward(self, u):\n        {code}\n"


def write(folder: Path, name: str, code: str, helper: str = "0.1") -> str:
    """A file with a class of that name, which uses another file; the class as a target."""
    (folder / f"beside_{name.lower()}.py").write_text(f"def factor():\n    return {helper}\n")
    file = folder / f"{name.lower()}.py"
    file.write_text(CODE.format(name=name, code=code, helper=f"beside_{name.lower()}"))
    return f"{file}:{name}"


def status_and_lines(command: Callable[[], None], capsys: Any) -> tuple[int, str, list[str]]:
    """Exit status, output, and the lines on standard error that the command itself writes."""
    status = 0
    try:
        command()
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("halos")]


def test_a_certificate_is_written_verified_and_refused_once_the_code_has_changed(tmp_path, capsys, fewer_points):
    target, file = write(tmp_path, "Kept", "return torch.tanh(factor() * u)"), tmp_path / "c.json"
    status, out, _ = status_and_lines(lambda: prove(target, certificate=file), capsys)
    assert status == 0
    assert str(file) in out
    status, out, lines = status_and_lines(lambda: verify(file), capsys)
    assert (status, lines) == (0, [])
    assert out.count("proved for the hyper-parameters as given") == 3

    helper = tmp_path / "beside_kept.py"
    helper.write_text(helper.read_text() + "# changed\n")
    status, out, lines = status_and_lines(lambda: verify(file), capsys)
    assert (status, out, len(lines)) == (1, "", 1)
    assert "has changed" in lines[0]


def test_what_differs_from_the_versions_of_a_proof_is_said(tmp_path, capsys, fewer_points):
    file = tmp_path / "c.json"
    status_and_lines(lambda: prove("Tanh", certificate=file), capsys)
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "versions": {**data["versions"], "torch": "0.1"}}))
    status, out, lines = status_and_lines(lambda: verify(file), capsys)
    assert status == 0
    assert "for every beta in (0, inf)" in out
    assert len(lines) == 1
    assert "torch 0.1" in lines[0]


DAMAGED = {
    "nothing": b"",
    "binary": b"\xff\xfe\x00",
    "a number": b"5",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep within": b'{"format": 2, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"format": NaN}',
    "long number": b'{"format": ' + b"9" * 10_000 + b"}",
    "old format": b'{"format": 1}',
    "twice": b'{"format": 2, "format": 2}',
    "too long": b" " * (2**24 + 1),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_certificate_has_one_line_and_status_2(content, tmp_path, capsys):
    file = tmp_path / "c.json"
    file.write_bytes(content)
    status, out, lines = status_and_lines(lambda: verify(file), capsys)
    assert (status, out, len(lines)) == (2, "", 1)
    assert str(file) in lines[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("target", "nowhere.py:V"), ("target", "Nothing"), ("target", "kto\u202e"), ("init_args", "[" * 90_000)],
)
def test_a_target_that_cannot_be_loaded_has_one_line_and_status_2(name, value, tmp_path, capsys):
    file = tmp_path / "c.json"
    status_and_lines(lambda: prove("Tanh", certificate=file), capsys)
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    status, out, lines = status_and_lines(lambda: verify(file), capsys)
    assert (status, out, len(lines)) == (2, "", 1)


@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import os; os._exit(0)", "torch.empty(10**12)"],
    ids=["endless", "ends the process", "memory"],
)
def test_code_that_does_not_answer_is_undecided(code, tmp_path, capsys):
    target = write(tmp_path, "Stuck", code)
    status, out, _ = status_and_lines(lambda: prove(target, timeout=1.0), capsys)
    assert status == 2
    assert "proved " not in out


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"timeout": float("nan")}, {"memory": "much"}])
def test_wrong_limits_are_refused(options, capsys):
    status, out, lines = status_and_lines(lambda: prove("Tanh", **options), capsys)
    assert (status, out, len(lines)) == (2, "", 1)


def test_a_folder_that_is_missing_is_reported_before_the_proof(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("halos_pl.cli.prove.limited_child", None)
    for place in (tmp_path / "missing" / "c.json", tmp_path):
        status, out, lines = status_and_lines(lambda place=place: prove("Tanh", certificate=place), capsys)
        assert (status, out, len(lines)) == (2, "", 1)
        assert "Error" not in lines[0]


class Stateful(ValueFunction):
    """A buffer, an attribute, a function with a closure and two parameters."""

    def __init__(self, buffer: float = 1.0, attribute: Any = 2, inner: float = 3.0, fixed: float = 4.0) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.tensor(buffer, dtype=torch.bfloat16))
        self.attribute, self.function = [{"of": attribute}], lambda u: inner * u
        self.fixed = nn.Parameter(torch.tensor(fixed), requires_grad=False)
        self.learnable = nn.Parameter(torch.rand(2))

    def forward(self, u: Tensor) -> Tensor:
        return u


def test_the_hash_depends_on_state_but_not_on_learnable_values():
    assert source_hash(Stateful()) == source_hash(Stateful())
    changed = [{"buffer": 1.5}, {"attribute": 3}, {"attribute": {4}}, {"inner": 2.0}, {"fixed": 1.0}]
    assert len({source_hash(Stateful(**each)) for each in [{}, *changed]}) == len(changed) + 1
    assert source_hash(Mixture([Tanh()], weights=[1.0])) != source_hash(Mixture([Tanh(beta=0.2)], weights=[1.0]))
    hooked = Stateful()
    hooked.register_forward_hook(lambda module, args, out: -out)
    assert source_hash(hooked) != source_hash(Stateful())


@pytest.mark.parametrize(
    "place", ["of the class", "of an import", "of an import within", "of a package", "of a function"]
)
def test_the_hash_depends_on_every_file_that_v_uses(place, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    stem = "used_" + place.replace(" ", "_")
    package = tmp_path / f"{stem}_package"
    package.mkdir()
    files = {
        "of the class": tmp_path / f"{stem}.py",
        "of an import": tmp_path / f"{stem}_a.py",
        "of an import within": tmp_path / f"{stem}_b.py",
        "of a package": package / "__init__.py",
        "of a function": package / "inner.py",
    }
    texts = [
        f"import {stem}_a\nfrom value_functions import ValueFunction\nclass V(ValueFunction):\n"
        f"    def forward(self, u):\n        from {stem}_package import inner\n        return u\n",
        f"import {stem}_b as other\n",
        "import torch\n",
        "",
        "from . import __name__\n",
    ]
    for file, text in zip(files.values(), texts, strict=True):
        file.write_text(text)
    before = source_hash(module_of_file(files["of the class"], "target").V())
    files[place].write_text(files[place].read_text() + "# changed\n")
    assert source_hash(module_of_file(files["of the class"], "target").V()) != before
    files[place].write_text(files[place].read_text().removesuffix("# changed\n"))
    (tmp_path / "unrelated.py").write_text("")
    assert source_hash(module_of_file(files["of the class"], "target").V()) == before
    sys.modules.pop(f"{stem}_a", None)
