"""What all engines have in common: they run one `PolicyModel`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from stateset_ray.learner.batch import PackedBatch
from stateset_ray.learner.policy_model import PolicyModel
from stateset_ray.learner.protocol import Scores
from stateset_ray.policies.weights import encode

__all__ = ["PolicyEngine"]


class PolicyEngine:
    """The part of `learner.engine.LearnerEngine` that needs no optimizer.

    Args:
        policy: the model; divided among the ranks or not.
        rank: of `world` ranks.
    """

    def __init__(self, policy: PolicyModel, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self._policy = policy
        self._run: Any = policy
        """What computes the policy: the model, or what an engine wraps around it."""

    def score(self, packed: PackedBatch, temperature: float, *, entropy_gradient: bool = False) -> Scores:
        """See `LearnerEngine.score`."""
        return Scores(*self._policy.score(self._run, packed, temperature, entropy_gradient))

    @contextmanager
    def reference_mode(self) -> Iterator[bool]:
        """See `LearnerEngine.reference_mode`."""
        adapters = self._policy.adapters
        with nullcontext() if adapters is None else adapters.off():
            yield adapters is not None

    def copy_into(self, model: Any) -> None:
        """See `LearnerEngine.copy_into`."""
        self._policy.copy_into(model, self._gather)

    def export(self, *, copy: bool = True) -> dict[str, npt.NDArray[Any]]:
        """See `LearnerEngine.export`."""
        exported = {}
        for name, tensor in self._policy.weights(self._gather):
            if self.rank == 0:
                # What was gathered for this moment is gone in the next.
                exported[name] = encode(tensor, copy=copy or hasattr(tensor, "ds_id"))
        return exported

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `LearnerEngine.all_reduce`."""
        torch.distributed.all_reduce(tensor)
        return tensor

    def _gather(self, parameters: list[nn.Parameter], changed: bool) -> AbstractContextManager[Any]:
        """See `policy_model.Gather`; here nothing is divided."""
        return nullcontext()
