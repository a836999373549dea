"""Weights that are not trained, saved and restored beside the optimizer's state.

A run may continue from a folder of merged weights, and DeepSpeed restores frozen weights only where the
number of ranks is the same: so they are kept apart, whole, in files that any number of ranks can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from stateset_ray.learner.policy_model import Gather, PolicyModel, buckets

__all__ = ["load_frozen", "save_frozen"]


@torch.no_grad()
def save_frozen(policy: PolicyModel, gather: Gather, target: Path, write: bool) -> None:
    """Write the frozen weights into a folder; call it on all ranks.

    Args:
        policy: the model.
        gather: makes divided parameters whole inside a context.
        target: the folder.
        write: whether this rank writes.

    Raises:
        OSError, RuntimeError: they cannot be written.
    """
    for path, bucket in _files(policy, target):
        with gather(list(bucket.values()), False):
            if write:
                torch.save({name: p.detach().cpu() for name, p in bucket.items()}, path)


@torch.no_grad()
def load_frozen(policy: PolicyModel, gather: Gather, target: Path) -> None:
    """Take over what `save_frozen` wrote; call it on all ranks.

    Raises:
        Exception: of many kinds, where it cannot be read.
    """
    for path, bucket in _files(policy, target):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        with gather(list(bucket.values()), True):
            for name, parameter in bucket.items():
                parameter.copy_(saved[name])


def _files(policy: PolicyModel, target: Path) -> Iterator[tuple[Path, dict[str, nn.Parameter]]]:
    frozen = {name: p for name, p in policy.named().items() if not p.requires_grad}
    sizes = {name: policy.nbytes(p) for name, p in frozen.items()}
    for index, names in enumerate(buckets(sizes)):
        yield target / f"frozen-{index:04d}.pt", {name: frozen[name] for name in names}
