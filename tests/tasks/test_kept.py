"""What the cache takes for the same evaluation."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

from halos_pl.tasks.kept import _key
from halos_pl.tasks.run import Prompting
from halos_pl.testing import tiny_model, tiny_tokenizer


def test_another_tokenizer_or_setting_is_another_evaluation(tmp_path_factory: pytest.TempPathFactory) -> None:
    from halos_pl.policy.loading import ModelSpec, load_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(str(folder))
    model, plain, other = load_model(ModelSpec(str(folder))), tiny_tokenizer(), tiny_tokenizer()
    other.add_tokens(["two words"])
    how = Prompting(chat=False, multiturn=False, system=None, batch_size=1)
    keys = [_key(model, tokenizer, how, "questions") for tokenizer in (plain, tiny_tokenizer(), other)]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] != _key(model, plain, how, "other questions")
