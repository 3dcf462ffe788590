"""Folder checkpoints: what ranks write together, any number of ranks reads; damage is named, and a kill leaves one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kills import equal
from on_ranks import alone, on_ranks
from run_halos import full_disk
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as distributed_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from halos_pl.run_dir import LAST, PREVIOUS
from halos_pl.training.checkpoint_files import CheckpointFiles
from halos_pl.training.checkpoint_links import recover_all
from halos_pl.training.checkpoint_reading import CheckpointError, read_checkpoint
from halos_pl.training.checkpoint_search import find_checkpoint
from halos_pl.training.non_finite import NonFiniteWeightsError, check_finite
from halos_pl.training.sharded_checkpoint import ShardedCheckpoints, load_sharded, save_sharded


class Net(nn.Module):
    """With a tied weight, one that few ranks have rows of, a buffer, and beside it a plain one that is not sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.one = nn.Linear(4, 1)
        self.register_buffer("table", torch.randn(5, 2, dtype=torch.bfloat16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embedding(ids))
        return self.head(x).sum() ** 2 + self.one(x).sum() * 3


class Run:
    """A module with its optimizer, sharded over the ranks, if any; on 4 ranks 2 copies of 2 shards."""

    def __init__(self, seed: int = 1) -> None:
        self.net, self.plain, self.step = Net(), nn.Parameter(torch.tensor([2.0, 3.0])), 0
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")) if dist.get_world_size() == 4 else None
            fully_shard(self.net.layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        parameters = [*(p for p in self.net.parameters() if p.requires_grad), self.plain]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.01, foreach=False)

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.net(torch.arange(7)) + self.plain.prod()).backward()
            self.optimizer.step()
            self.step += 1
        return self

    def live(self) -> dict[str, Any]:
        state = {f"scorer.{name}": t for name, t in self.net.state_dict().items()}
        state["objective.plain"] = self.plain.detach()
        reference = {"w": self.net.state_dict()["layer.weight"]}
        return {"state_dict": state, "optimizer_states": [self.optimizer.state_dict()], "reference_model": reference}

    def save(self, path: Path, **options: Any) -> None:
        live = self.live()
        live["reference_model"] = {"w": live["reference_model"]["w"] + 1}
        live["optimizer_states"][0]["master_weights"] = [live["state_dict"]["scorer.embedding.weight"] * 2]
        rest = {
            "global_step": self.step,
            "loops": {"fit": [1, (2, "x")]},
            "lr_schedulers": [],
            "more": {"n": {3: None}},
        }
        save_sharded({**rest, **live}, path, **options)

    def load(self, path: Path) -> dict[str, Any]:
        live = {**self.live(), "parameters": [[p for g in self.optimizer.param_groups for p in g["params"]]]}
        checkpoint = load_sharded(path, live)
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        self.step = checkpoint["global_step"]
        return checkpoint


def whole(tree: Any) -> Any:
    """The tree with whole tensors."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


# -- what is written is what is read ------------------------------------------------------------------------------


def everything(folder: Path) -> Any:
    """Most of what two ranks can do with checkpoints, in one start."""
    run = Run().train(2)
    run.save(folder / "two.ckpt")
    run.train(1).save(folder / "three.ckpt")
    again = Run()
    again.load(folder / "two.ckpt")
    again.train(1)
    from_file = Run().train(1)
    file = from_file.load(folder / "file.ckpt")
    return whole(run.live()), whole(again.live()), whole(file), whole(from_file.live())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, Any]:
    """A folder with checkpoints of 2 ranks after 2 and 3 steps, and one of a single process; what each has read."""
    folder = tmp_path_factory.mktemp("saved")
    alone = Run().train(4)
    checkpoint = {"global_step": 4, "loops": {}, "lr_schedulers": [], **alone.live()}
    CheckpointFiles().save_checkpoint(checkpoint, folder / "file.ckpt")
    results = on_ranks(folder, 2, everything, folder)
    assert equal(*results) == []
    return folder, results[0]


def test_a_resumed_run_is_the_same_bit_for_bit(two_ranks):
    _, (straight, resumed, _, _) = two_ranks
    assert equal(straight, resumed) == []
    alone = Run().train(3).live()["state_dict"]
    for name, tensor in straight["state_dict"].items():
        torch.testing.assert_close(tensor, alone[name])


def test_two_ranks_read_the_file_of_one_process(two_ranks):
    folder, (_, _, checkpoint, live) = two_ranks
    alone = read_checkpoint(folder / "file.ckpt")
    assert equal(checkpoint, alone) == []
    assert equal(live["state_dict"], alone["state_dict"]) == []
    assert equal(live["optimizer_states"], alone["optimizer_states"]) == []


def test_one_process_reads_the_whole_folder(two_ranks):
    folder, (state, *_) = two_ranks
    alone = read_checkpoint(folder / "three.ckpt")
    assert equal(alone["state_dict"], state["state_dict"]) == []
    assert equal(alone["optimizer_states"][0]["state"], state["optimizer_states"][0]["state"]) == []
    assert equal(alone["reference_model"]["w"], state["state_dict"]["scorer.layer.weight"] + 1) == []
    masters = alone["optimizer_states"][0]["master_weights"]
    assert equal(masters, [state["state_dict"]["scorer.head.weight"] * 2]) == []
    assert (alone["global_step"], alone["loops"]) == (3, {"fit": [1, (2, "x")]})
    assert alone["more"] == {"n": {3: None}}
    run = Run().train(1)
    run.load(folder / "three.ckpt")
    assert equal(run.live()["state_dict"], state["state_dict"]) == []
    weights = read_checkpoint(folder / "three.ckpt", only=("state_dict",))
    assert equal(weights["state_dict"], state["state_dict"]) == []
    assert weights["reference_model"]["w"].is_meta
    seen = read_checkpoint(folder / "three.ckpt", resume=False, mmap=True)
    assert {k: v.shape for k, v in seen["state_dict"].items()} == {k: v.shape for k, v in state["state_dict"].items()}


def test_torch_reads_the_shards_as_well(two_ranks):
    folder, (state, *_) = two_ranks
    into = {f"state_dict.{name}": torch.zeros_like(tensor) for name, tensor in state["state_dict"].items()}
    del into["state_dict.scorer.head.weight"]  # tied
    distributed_load(into, storage_reader=HuggingFaceStorageReader(str(folder / "three.ckpt")), no_dist=True)
    assert all(torch.equal(tensor, state["state_dict"][name[11:]]) for name, tensor in into.items())


def data_bytes(folder: Path) -> int:
    """The size of all tensors in a folder's shards."""
    sizes = 0
    for path in folder.glob("shard*"):
        with path.open("rb") as file:
            sizes += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return sizes


def resharded(folder: Path, source: str) -> Any:
    run = Run()
    run.load(folder / source)
    run.train(1).save(folder / f"of {dist.get_world_size()}.ckpt")
    return whole(run.live())


def test_it_goes_on_with_another_number_of_ranks(two_ranks):
    """From 2 to 1 and to 4 that hold two copies, which are saved once."""
    folder, _ = two_ranks
    steps = 3
    straight = Run().train(steps + 3).live()
    for ranks, source in ((4, "three.ckpt"), (1, "of 4.ckpt"), (2, "of 1.ckpt")):
        states = on_ranks(folder, ranks, resharded, folder, source)
        assert equal(states[0], states[-1]) == []
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(states[0][part], straight[part], msg=part)
    assert len({data_bytes(folder / f"of {ranks}.ckpt") for ranks in (1, 2, 4)}) == 1
    manifest = json.loads((folder / "of 4.ckpt" / "manifest.json").read_text())["halos checkpoint"]
    assert (manifest["ranks"], manifest["replicas"], manifest["step"]) == (4, 2, 4)


class LowBit(torch.Tensor):
    """Like the state of an 8-bit optimizer."""


def test_tensors_of_other_classes_are_refused_unless_they_are_not_needed(tmp_path, monkeypatch):
    state = {"state": {0: {"exp_avg": torch.zeros(2).as_subclass(LowBit)}}}
    checkpoint = {"state_dict": {"scorer.w": torch.ones(2)}, "optimizer_states": [state]}
    with pytest.raises(ValueError, match=r"optimizer_states\.0\.state\.0\.exp_avg is a LowBit"):
        save_sharded(checkpoint, tmp_path / "a.ckpt")
    monkeypatch.setattr("halos_pl.training.sharded_checkpoint.read_checkpoint", lambda *_, **__: dict(checkpoint))
    live = {"state_dict": {"scorer.w": torch.zeros(2)}}
    load_sharded(tmp_path / "a file", live, only=("state_dict",))
    assert live["state_dict"]["scorer.w"].sum() == 2


# -- names ---------------------------------------------------------------------------------------------------------


def names(run: Path) -> dict[str, int]:
    """The steps of a run's checkpoints."""
    return {name.name: read_checkpoint(run / name)["global_step"] for name in (LAST, PREVIOUS) if (run / name).exists()}


def test_the_last_two_are_kept_also_beside_files(tmp_path):
    """A run may go on with one device, and again with several."""
    run, options = Run(), {"rotate": True, "keep": tmp_path / PREVIOUS}
    file = {"global_step": 4, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    run.train(1).save(tmp_path / LAST, rotate=True)
    assert names(tmp_path) == {"last.ckpt": 1}
    run.train(1).save(tmp_path / LAST, **options)
    run.train(1).save(tmp_path / LAST, **options)
    assert names(tmp_path) == {"last.ckpt": 3, "previous.ckpt": 2}
    CheckpointFiles().save_checkpoint({**file, **run.train(1).live()}, tmp_path / LAST, options)
    assert names(tmp_path) == {"last.ckpt": 4, "previous.ckpt": 3}
    assert sorted(path.name for path in (tmp_path / LAST).parent.iterdir()) == ["last.ckpt", "previous.ckpt", "step-3"]
    run.train(1).save(tmp_path / LAST, **options)
    assert names(tmp_path) == {"last.ckpt": 5, "previous.ckpt": 4}
    run.train(1).save(tmp_path / LAST, rotate=True)
    run.save(tmp_path / LAST, **options)  # the same step again
    assert names(tmp_path) == {"last.ckpt": 6, "previous.ckpt": 6}
    shutil.copytree(tmp_path, tmp_path / "copy")  # which resolves links
    run.train(1).save(tmp_path / "copy" / LAST, rotate=True, keep=tmp_path / "copy" / PREVIOUS)
    assert names(tmp_path / "copy") == {"last.ckpt": 7, "previous.ckpt": 6}
    files = CheckpointFiles()
    files.remove_checkpoint(tmp_path / "copy" / LAST)
    files.remove_checkpoint(tmp_path / "copy" / PREVIOUS)
    assert list((tmp_path / "copy" / LAST).parent.iterdir()) == []


def test_links_that_a_user_has_made_are_kept(tmp_path):
    run = Run().train(1)
    run.save(tmp_path / "elsewhere" / "step-1")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").symlink_to(tmp_path / "elsewhere" / "step-1")
    run.train(1).save(tmp_path / LAST, rotate=True, keep=tmp_path / PREVIOUS)
    (folder / "mine.ckpt").symlink_to(folder / "step-2")
    assert names(tmp_path) == {"last.ckpt": 2, "previous.ckpt": 1}
    run.train(1).save(tmp_path / LAST, rotate=True)
    assert names(tmp_path) == {"last.ckpt": 3, "previous.ckpt": 1}
    assert read_checkpoint(folder / "mine.ckpt")["global_step"] == 2
    with pytest.raises(ValueError, match="s3://bucket/a is a URL"):
        ShardedCheckpoints().save_checkpoint({}, "s3://bucket/a")


def test_a_name_without_links_is_replaced(tmp_path):
    run, path = Run(), tmp_path / "best.ckpt"
    CheckpointFiles().save_checkpoint(run.live(), path)  # a file
    for _ in range(2):
        run.train(1).save(path)
        assert read_checkpoint(path)["global_step"] == run.step
        assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def killed_at_each_call(folder: Path, options: dict[str, Any]) -> list[Any]:
    """Kills a process at each of the calls that change files while it saves the third checkpoint."""
    steps: list[Any] = []
    events = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "open", "shutil.rmtree")
    run = Run().train(3)
    while not steps or steps[-1] != "done":
        place = shutil.copytree(folder / "run", folder / f"run.{len(steps)}", symlinks=True)
        if not (child := os.fork()):
            calls = 0

            def hook(event: str, args: Any) -> None:
                nonlocal calls
                if event in events and str(folder) in str(args[0]):
                    calls += 1
                    if calls > len(steps):
                        os.kill(os.getpid(), 9)

            sys.addaudithook(hook)
            rotated = {"rotate": True, **({"keep": place / PREVIOUS} if options["keep"] else {})}
            run.save(place / options["name"], **(rotated if options["name"] == str(LAST) else {}))
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        found = find_checkpoint(place, str(place / options["name"]))
        steps.append("done" if ended == 0 else (names(place), read_checkpoint(found)["global_step"]))
    return steps


@pytest.mark.parametrize("keep", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_the_last_good_ones(tmp_path, keep):
    run = Run()
    run.train(1).save(tmp_path / "run" / LAST, rotate=True)
    run.train(1).save(tmp_path / "run" / LAST, rotate=True, **({"keep": tmp_path / "run" / PREVIOUS} if keep else {}))
    *steps, done = alone(killed_at_each_call, tmp_path, {"keep": keep, "name": str(LAST)})
    assert done == "done"
    assert len(steps) > 8
    left = {tuple(kept.values()) for kept, _ in steps}
    assert left == ({(2, 1), (2, 2), (3, 2)} if keep else {(2,), (3,)})
    assert {last for _, last in steps} == {2, 3}


def test_a_kill_while_a_folder_is_replaced_leaves_the_earlier_one_or_the_new_one(tmp_path):
    """As with a ModelCheckpoint whose files have one name."""
    run, name = Run(), "checkpoints/best.ckpt"
    for _ in range(2):
        run.train(1).save(tmp_path / "run" / name)
    *steps, done = alone(killed_at_each_call, tmp_path, {"keep": False, "name": name})
    assert done == "done"
    assert [step for _, step in steps] == sorted(step for _, step in steps)
    assert {step for _, step in steps} == {2, 3}
    between = [place for place in tmp_path.glob("run.*") if list(place.rglob("*.old.part"))]
    assert between
    for place in between:
        recover_all(place / "checkpoints")
        assert [path.name for path in (place / "checkpoints").iterdir()] == ["best.ckpt"]


# -- what is damaged is named --------------------------------------------------------------------------------------


class Code:
    """Pickled, it is a call that leaves a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def foreign_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"halos checkpoint": {"files": {}, "tensors": [], "version": 1}}')


def lightning_folder(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(b"\x80\x04.")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a shard": (lambda folder: flip(folder / "shard-00001.safetensors"), "shard-00001.safetensors"),
    "a bit of the rest": (lambda folder: flip(folder / "rest.pt"), "rest.pt"),
    "a bit of the manifest": (lambda folder: flip(folder / "manifest.json"), "manifest.json"),
    "a cut shard": (lambda folder: os.truncate(folder / "shard-00000.safetensors", 100), "shard-00000.safetensors"),
    "no shard": (lambda folder: (folder / "shard-00001.safetensors").unlink(), "shard-00001.safetensors"),
    "no rest": (lambda folder: (folder / "rest.pt").unlink(), "rest.pt"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "a shard too many": (lambda folder: (folder / "shard-00002.safetensors").touch(), "shard-00002.safetensors"),
    "another manifest": (foreign_manifest, "manifest.json"),
    "of another program": (lightning_folder, ".metadata"),
}


def all_damaged(run: Path) -> list[str]:
    """What 2 ranks say of each kind of damage."""
    said = []
    for kind, (damage, _) in DAMAGE.items():
        path = run / f"{kind}.ckpt"
        if dist.get_rank() == 0:
            shutil.copytree(run / PREVIOUS, path)
            damage(path)
        dist.barrier()
        try:
            Run().load(path)
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_damage_is_named_on_all_ranks(two_ranks, tmp_path):
    shutil.copytree(two_ranks[0] / "three.ckpt", tmp_path / PREVIOUS)
    said = on_ranks(tmp_path, 2, all_damaged, tmp_path)
    assert [len(lines) for lines in said] == [len(DAMAGE)] * 2
    for kind, one, other in zip(DAMAGE, *said, strict=True):
        for line in (one, other):
            assert line.startswith(f"{tmp_path}/{kind}.ckpt ")
            assert DAMAGE[kind][1] in line
            assert "\n" not in line


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_an_intact_checkpoint_beside_it(two_ranks, tmp_path, kind):
    path = tmp_path / LAST
    shutil.copytree(two_ranks[0] / "three.ckpt", path)
    shutil.copytree(two_ranks[0] / "two.ckpt", tmp_path / PREVIOUS)
    DAMAGE[kind][0](path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} ")
    assert DAMAGE[kind][1] in str(caught.value)
    assert f"--ckpt_path {tmp_path / PREVIOUS}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_code_is_run(tmp_path):
    save_sharded(
        {"global_step": 1, "state_dict": {"scorer.w": torch.zeros(2)}, "more": Code(tmp_path / "x")}, tmp_path / "a"
    )
    with pytest.raises(CheckpointError, match="could run code"):
        read_checkpoint(tmp_path / "a")
    assert not (tmp_path / "x").exists()


def test_a_file_system_without_links_is_refused_before_training(tmp_path, monkeypatch):
    def symlink_to(*args: Any, **options: Any) -> None:
        raise PermissionError("no symbolic links here")

    ShardedCheckpoints().check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    with pytest.raises(OSError, match=f"{tmp_path} is on a file system without symbolic links"):
        ShardedCheckpoints().check_folder(tmp_path)


def unwritable(folder: Path) -> str:
    run = Run().train(1)
    run.save(folder / LAST, rotate=True)
    run.train(1)
    with full_disk(600 if dist.get_rank() == 1 else 10**9), pytest.raises(OSError, match="cannot be written") as caught:
        run.save(folder / LAST, rotate=True, keep=folder / PREVIOUS)
    return str(caught.value)


def test_a_rank_that_cannot_write_ends_all_and_leaves_the_one_before(tmp_path):
    said = on_ranks(tmp_path, 2, unwritable, tmp_path)
    assert said[0] == said[1]
    assert f"{tmp_path / LAST} cannot be written" in said[0]
    assert "rank 1" in said[0]
    assert names(tmp_path) == {"last.ckpt": 1}
    assert sorted(path.name for path in (tmp_path / LAST).parent.iterdir()) == ["last.ckpt", "step-1"]


DIVERGED = {
    "a weight": (float("nan"), "scorer.layer.weight"),
    "a large weight": (1e38, "scorer.layer.weight"),
    "the optimizer": (float("inf"), "exp_avg"),
}


def diverged() -> list[str]:
    said = []
    for what, (value, _) in DIVERGED.items():
        run = Run().train(1)
        weight = run.net.layer.weight
        tensor = run.optimizer.state[weight]["exp_avg"] if what == "the optimizer" else weight
        trained = {"scorer.layer.weight", "objective.plain"}
        check_finite({"global_step": 1, **run.live()}, trained, "none")
        with torch.no_grad():
            tensor.to_local()[-1:] += value if dist.get_rank() == 1 else 0
        with pytest.raises(NonFiniteWeightsError) as caught:
            check_finite({"global_step": 1, **run.live()}, trained, "none")
        said.append(str(caught.value))
    return said


def test_weights_that_diverge_on_one_rank_are_named_on_all(tmp_path):
    one, other = on_ranks(tmp_path, 2, diverged)
    assert one == other
    assert all(name in line for line, (_, name) in zip(one, DIVERGED.values(), strict=True))
