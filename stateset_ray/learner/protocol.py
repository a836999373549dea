"""What one rank of a learner can do, whichever engine does it.

An engine holds one rank's share of the policy, its gradients and its optimizer. Every method is called on
ALL ranks, in the same order: most of them are collective. Losses are divided by a denominator of the whole
step, so that what is applied is the SUM of the gradients over `backward` calls and ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import torch

from stateset_ray.learner.batch import PackedBatch
from stateset_ray.learner.layout import Layout

__all__ = ["LearnerEngine", "Scores", "StepResult"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: L2 norm of the step's whole gradient, before clipping; not finite if a gradient was not.
        applied: False if a gradient was not finite; then no weight has changed.
    """

    grad_norm: float
    applied: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """What the policy thinks of the M masked tokens of a packed batch, under softmax(logits / temperature).

    Attributes:
        logprobs: float32 [M] natural logarithm of each token's probability.
        entropies: float32 [M] entropy of the distribution it was drawn from, in nats.
    """

    logprobs: torch.Tensor
    entropies: torch.Tensor


class LearnerEngine(Protocol):
    """One rank's share of model, gradients and optimizer. Every method is called on ALL ranks."""

    @property
    def rank(self) -> int:
        """This rank, of `world`."""
        ...

    @property
    def world(self) -> int:
        """How many ranks there are."""
        ...

    @property
    def layout(self) -> Layout:
        """Of the states that it writes, and can read."""
        ...

    def score(self, packed: PackedBatch, temperature: float, *, entropy_gradient: bool = False) -> Scores:
        """Run the policy over a packed batch.

        The log-probabilities have a gradient where torch records one (`torch.is_grad_enabled`), the entropies
        only with `entropy_gradient` besides. Never more than `learner.logit_chunk` rows of logits exist at a
        time, forward or backward.
        """
        ...

    def reference_mode(self) -> AbstractContextManager[bool]:
        """Inside, `score` is that of the model before training, if this engine holds it: with adapters.

        Yields:
            Whether it is. Without adapters, False, and `score` is the policy's as ever.
        """
        ...

    def copy_into(self, model: Any) -> None:
        """Copy the policy's weights, adapters merged, into a whole model of its kind, on every rank.

        Args:
            model: from `models.load_model`, of the same architecture.
        """
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss; what `step` applies is the sum over calls and ranks."""
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Clip the summed gradient to `learner.max_grad_norm`, apply it and clear it."""
        ...

    def hyperparameters(self) -> dict[str, Any]:
        """What `step` works with, read where it acts: `lr`, `betas`, `weight_decay` and `max_grad_norm`."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, in place."""
        ...

    def export(self, *, copy: bool = True) -> dict[str, npt.NDArray[Any]]:
        """Weights by name, tied ones once (`models.state_tensors`), encoded as in `policies.weights`.

        The names are those of the Hugging Face model; adapters are merged into what they adapt.

        Args:
            copy: False for who reads them before the next update: what lies whole in main memory is then
                given as it is, and changes with the policy.

        Returns:
            Arrays in main memory on rank 0; {} on the others.
        """
        ...

    def save(self, folder: str | Path, tag: str) -> None:
        """Write what an exact continuation needs to `folder/tag`.

        `folder` must be visible to all ranks. Whoever owns the folder makes it durable and names it.

        Raises:
            CheckpointError: it cannot be written.
        """
        ...

    def load(self, folder: str | Path, tag: str) -> None:
        """Continue from what `save` wrote; only as the first thing that a new engine does.

        The number of ranks may be another one. The hyper-parameters of this engine's configuration win over
        those in the checkpoint.

        Raises:
            CheckpointError: it is missing, incomplete, unreadable, of another model or another layout, or
                this engine has been used already.
        """
        ...

    def destroy(self) -> None:
        """Free the model and leave the process group; the engine cannot be used afterwards."""
        ...
