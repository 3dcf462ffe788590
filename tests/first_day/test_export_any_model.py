"""``halos export`` of what is no run: a folder, and an adapter merged into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.cli.main import main
from halos_pl.policy.loading import ModelSpec, load_tokenizer


def test_an_adapter_is_merged_into_its_base(adapter: tuple[Any, Path], tiny_folder: Path, tmp_path: Path) -> None:
    policy, folder = adapter
    main(["export", str(folder), str(tmp_path / "out")])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, policy.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    own = load_tokenizer(ModelSpec(str(tiny_folder)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == own.get_vocab()


@pytest.mark.slow
def test_a_folder_keeps_its_dtype_unless_another_is_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    main(["export", str(tiny_folder), str(tmp_path / "half"), "--dtype=bfloat16"])
    main(["export", str(tmp_path / "half"), str(tmp_path / "same")])
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("half", "same")]
    for name, value in weights[0].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights[1][name])


@pytest.mark.parametrize(("words", "named"), [("--adapter=true", "--adapter"), ("--ckpt_path=best", "checkpoint best")])
def test_what_only_a_run_has_is_refused(tiny_folder: Path, tmp_path: Path, words: str, named: str, capfd: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tiny_folder), str(tmp_path / "out"), words])
    assert ended.value.code == 1
    assert named in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["export", str(tiny_folder), str(tiny_folder), "--overwrite=true"])
    assert f"{tiny_folder} is the folder" in capfd.readouterr().err
