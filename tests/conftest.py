"""Fixtures shared by all tests: tiny models and tokenizers made on the spot, nothing downloaded.

Libraries that take seconds to import are imported in the fixtures: the process that hands the tests to workers needs
none of them.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings
from run_halos import SHORTCUTS

if TYPE_CHECKING:
    from halos_pl.policy.loading import ModelSpec

# A busy machine is no fault of the code. Half of the usual examples: the suite is run often, each time with others.
settings.register_profile("halos", deadline=None, max_examples=50)
settings.load_profile("halos")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The suite is run in as many processes as there are cores; with tiny models threads cost more than they give.

    And runs that are compared bit for bit need the same number of threads: a sum over two may round in another way.
    """
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _shortcuts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, instead in SHORTCUTS.items():
            patch.setattr(name, instead)
        yield


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command puts folders on ``sys.path``, which the next test does without."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(autouse=True)
def _no_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Another test may have a file of the same name in its working folder, which must not be hidden by this test's."""
    before = set(sys.modules)
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit leaves its seed in the environment, where the next test's data module would take it as its own."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a fit, or what else needs a module's policy, loads a model."""

    def load_model(spec: ModelSpec, sharding: object = None) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("halos_pl.training.models.load_model", load_model)


@pytest.fixture
def conversions(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelSpec, list[int]]:
    """A folder with a GGUF file whose conversion is a copy of the tiny model, and a list of the conversions made.

    The cache is the folder ``cache`` of ``tmp_path``.
    """
    from halos_pl.policy.loading import ModelSpec

    made: list[int] = []

    def convert(folder: Path, gguf_file: str, to: Path) -> None:
        made.append(1)
        shutil.copytree(tiny_folder, to, dirs_exist_ok=True)

    monkeypatch.setattr("halos_pl.policy.source._convert", convert)
    monkeypatch.setenv("HALOS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.gguf").write_bytes(b"any content")
    return ModelSpec(str(tmp_path / "model")), made


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenised data of the tests go where the tests go."""
    before = os.environ.get("HALOS_CACHE")
    os.environ["HALOS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("HALOS_CACHE") if before is None else os.environ.update(HALOS_CACHE=before)


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> tuple[Any, Path]:
    """The tiny model with a LoRA adapter that changes it, and a folder with that adapter and the tokenizer."""
    import torch

    from halos_pl.policy.loading import LoRASpec, ModelSpec, load_model
    from halos_pl.testing import tiny_tokenizer

    policy: Any = load_model(ModelSpec(str(tiny_folder), lora=LoRASpec(r=2)))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    policy.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    return policy, tmp_path / "adapter"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer, as the hub would hold them."""
    from halos_pl.testing import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_folder`` with GPT-2: absolute positions, tied embeddings, dropout in its configuration."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from halos_pl.testing import tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny_gpt2")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=64,
        n_positions=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that lies beside a checkout; HALOS_TEST_DATA names another place."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("HALOS_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set HALOS_TEST_DATA to the folder that holds feedback/")
    return folder
