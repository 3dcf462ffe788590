"""A run's trained model whose weights stay in its checkpoint until they are written to other files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from halos_pl.policy.intact import is_finite
from halos_pl.policy.loading import load_empty
from halos_pl.training.checkpoint_manifest import Manifest, read_manifest
from halos_pl.training.checkpoint_reading import CheckpointError, alternative, damage, read_checkpoint
from halos_pl.training.checkpoint_shards import Shards
from halos_pl.training.trained import check_weights, module_of_run, trained_dtype

_PREFIX = "scorer.model."


class NonFiniteError(ValueError):
    """A weight to be exported is not finite.

    Args:
        run: name of the run.
        name: name of the weight.
        weight: the weight.
    """

    def __init__(self, run: str, name: str, weight: Tensor) -> None:
        super().__init__(
            f"{run}: {name} is not finite in {str(weight.dtype).removeprefix('torch.')}: the run diverged, or its"
            " weights are too large for that dtype; nothing was written"
        )


class StoredWeights:
    """Reads single weights of a model from the shards of a folder checkpoint.

    Args:
        manifest: manifest of the folder.
        shards: its shards.
        model: the model; a weight is converted to the dtype that it has there.
        run: name of the run.
    """

    def __init__(self, manifest: Manifest, shards: Shards, model: nn.Module, run: str) -> None:
        self._entries = {e.path[1]: e for e in manifest.entries if e.path[0] == "state_dict"}
        self._shards, self._model, self._run = shards, model, run

    def __getitem__(self, name: str) -> Tensor:
        """The weight called ``name``.

        Raises:
            NonFiniteError: if it is not finite.
        """
        entry = self._entries[f"{_PREFIX}{name}"]
        weight = self._shards.whole(entry.key, entry.shape, self._model.state_dict()[name].dtype)
        if not is_finite(weight):
            raise NonFiniteError(self._run, name, weight)
        return weight


def offloaded_policy(run: Path, path: Path) -> PreTrainedModel | None:
    """The policy of a fully fine-tuned run, whose ``save_pretrained`` holds one file at a time in memory.

    Args:
        run: the run's folder.
        path: one of its checkpoints, a folder.

    Returns:
        The policy, on the meta device; None if the run has adapters, which must be merged in memory.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        ValueError: if it does not fit the run's config.
    """
    spec = module_of_run(run).models.spec
    model: Any = load_empty(spec) if spec is not None else None
    if model is None:
        return None
    if wrong := damage(path):
        raise CheckpointError(f"{path} {wrong}{alternative(path)}")
    manifest = read_manifest(path)
    assert isinstance(manifest, Manifest)  # it is intact
    names = nn.ModuleDict({"scorer": nn.ModuleDict({"model": model})})
    whole: dict[str, Tensor] = read_checkpoint(path, mmap=True)["state_dict"]
    state = {name: value for name, value in whole.items() if name.startswith(_PREFIX)}
    check_weights(names, state, run)
    dtype = trained_dtype(state)
    if dtype.itemsize < model.dtype.itemsize:
        model.to(dtype)
    # How transformers saves a model whose weights accelerate has left on the disk.
    model.hf_device_map = {"": "disk"}
    shards = Shards(manifest.folder, manifest.shards)
    model._hf_hook = SimpleNamespace(weights_map=StoredWeights(manifest, shards, model, str(run)))
    policy: PreTrainedModel = model
    return policy
