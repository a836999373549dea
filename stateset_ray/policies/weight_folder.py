"""Versions of the policy in a shared folder, for whoever can read files: other clusters, Ray Serve, vLLM.

    <root>/
      latest                        the version that was published last
      step-00000012/                version 12: a model in the Hugging Face layout, and manifest.json
        config.json, tokenizer files
        model-00001-of-00008.safetensors ...   model.safetensors.index.json

A version is a checkpoint folder (`stateset_ray.checkpoint`): written beside, fsynced, hashed, renamed, and
verified by every reader before it believes a byte. So a crash in the middle of a publication leaves the
version before it, and nothing half-visible. The tensors' names are those of the model in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stateset_ray import checkpoint
from stateset_ray.errors import CheckpointError
from stateset_ray.models import config_only, load_tokenizer, local_folder
from stateset_ray.policies.weights import PARTS, split

__all__ = ["StoredVersion", "description", "newest", "open_version", "publish"]

_SHARD_BYTES = 4 << 30  # at most, but for a single tensor that is larger
_THREADS = 4


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version of the policy whose every byte was compared with its manifest.

    Attributes:
        path: its folder.
        version: of the policy.
        lineage: rises when a run goes back to a checkpoint: the same version may then be other weights.
    """

    path: Path
    version: int
    lineage: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name, mapped from the files: read them, do not write them.

        They stay valid after the folder was removed.

        Raises:
            CheckpointError: a file is not safetensors, or is gone.
        """
        found: dict[str, torch.Tensor] = {}
        try:
            for file in sorted(self.path.glob("*.safetensors")):
                with safe_open(file, framework="pt", device="cpu") as opened:
                    found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own kind, and OSError
            raise CheckpointError(
                f"the weights of version {self.version} cannot be read: {error}", given=str(self.path)
            ) from error
        return found


def publish(
    root: Path,
    version: int,
    lineage: int,
    tensors: Mapping[str, torch.Tensor],
    *,
    keep: int,
    timeout: float,
    beside: Mapping[str, bytes],
) -> Path:
    """Write a version so that it appears whole or not at all, and make it the newest.

    Args:
        root: on storage that the readers share; made if missing.
        version: one that exists already is replaced, and stays readable until its successor is whole.
        lineage: see `StoredVersion`.
        tensors: by name, in main memory, tied ones once.
        keep: how many versions stay, at or below this one.
        timeout: seconds to wait for another writer of the same root.
        beside: further files by name: the model's configuration and tokenizer.

    Returns:
        The version's folder.

    Raises:
        CheckpointError: it could not be written; the versions before it are whole.
    """

    def write(folder: Path) -> None:
        for name, content in beside.items():
            (folder / name).write_bytes(content)
        _write_shards(folder, tensors)

    meta = {"lineage": lineage}
    return checkpoint.save(root, version, write, meta=meta, keep=keep, timeout=timeout)


def description(name: str) -> dict[str, bytes]:
    """What beside its weights makes a folder the model: configuration and tokenizer, by file name."""
    from transformers import GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        config_only(name).save_pretrained(folder)
        with suppress(OSError):  # a model may come without one
            GenerationConfig.from_pretrained(local_folder(name)).save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def open_version(path: Path) -> StoredVersion:
    """The version in a folder, verified.

    Raises:
        CheckpointError: it is incomplete or damaged, or not there any more.
    """
    return _stored(checkpoint.verify(path))


def newest(root: Path, known: StoredVersion | None = None) -> StoredVersion | None:
    """The newest whole version; None where there is none. For those who watch a folder.

    Args:
        root: that `publish` writes into, in this process or any other.
        known: what was found before: while nothing newer was published, it is returned as it is, without
            reading all of it again.
    """
    if known is not None and checkpoint.pointed(root) == known.path.name and _same(known):
        return known
    found = checkpoint.latest(root)
    return _stored(found) if found else None


def _same(known: StoredVersion) -> bool:
    """Whether the folder still holds that lineage: the same version may have been published again."""
    try:
        return bool(checkpoint.peek(known.path).meta["lineage"] == known.lineage)
    except CheckpointError:
        return False


def _stored(found: checkpoint.Checkpoint) -> StoredVersion:
    try:
        return StoredVersion(found.path, found.step, int(found.meta["lineage"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "this folder holds a checkpoint of a run, not a published version",
            given=str(found.path),
            mend="give the folder that publish.folder names",
        ) from error


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    shards = [shard for shard in split(tensors, max(PARTS, -(-nbytes // _SHARD_BYTES))) if shard]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    def write(name: str, shard: Mapping[str, torch.Tensor]) -> None:
        save_file(
            {key: tensor.contiguous() for key, tensor in shard.items()}, folder / name, {"format": "pt"}
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(write, names, shards))
    index = {
        "metadata": {"total_size": nbytes},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
