"""Publishing weights: the learner's tensors in the object store, under the version they have.

The references ride along with every job, so a worker that restarts asks for what it lacks. The number of
remote calls does not depend on the number of parameters: a version travels in a fixed number of parts,
because one object as large as the model finds no hole to reuse in the store, which would then hold three
versions where one and a half are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PARTS", "PublishedWeights", "split"]

PARTS = 8


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A version of the policy.

    Attributes:
        version: rises by one with every applied optimizer step.
        refs: Ray references to {name: encoded array} each, together the whole model; see
            `stateset_ray.policies.weights`. Empty: the weights that the workers were built with.
        lineage: rises when the run goes back to a checkpoint: the same version may then be other weights.
    """

    version: int
    refs: tuple[Any, ...] = ()
    lineage: int = 0


def split(arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Divide arrays into `PARTS` dictionaries of about equal bytes, the largest first.

    Example:
        >>> import numpy as np
        >>> [sorted(part) for part in split({"a": np.zeros(9), "b": np.zeros(2)})][:3]
        [['a'], ['b'], []]
    """
    parts: list[dict[str, Any]] = [{} for _ in range(PARTS)]
    loads = [0] * PARTS
    for name in sorted(arrays, key=lambda n: (-arrays[n].nbytes, n)):
        lightest = loads.index(min(loads))
        parts[lightest][name] = arrays[name]
        loads[lightest] += arrays[name].nbytes
    return parts
