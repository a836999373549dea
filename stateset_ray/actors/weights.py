"""Publishing weights: the learner's tensors in the object store, under the version they have.

The reference rides along with every job, so a worker that restarts asks for what it lacks. The number of
remote calls does not depend on the number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["PublishedWeights"]


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A version of the policy.

    Attributes:
        version: rises by one with every applied optimizer step.
        ref: Ray reference to {name: encoded array}; see `stateset_ray.policies.weights`.
    """

    version: int
    ref: Any
