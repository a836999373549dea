"""What every transport of weights keeps to.

    controller            rank 0                          engine
    publish(version) ---> Sender.send: handle
           <------------- handle
    play(version, handle) ------------------------------> Receiver.fetch(handle): tensors

A handle is small and rides along with every job and every request, so an engine that was restarted asks for
what it lacks and heals itself before it answers. Engines fetch beside the turns that are under way, and
switch between two of them. The number of remote calls does not depend on the number of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stateset_ray.learner.learner import Learner

__all__ = ["Arrived", "PublishedWeights", "Receiver", "Sender"]


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A version of the policy.

    Attributes:
        version: rises by one with every applied optimizer step.
        handle: small data that the transport's receivers turn into the weights. None: the weights that the
            engines were built with.
        lineage: rises when the run goes back to a checkpoint: the same version may then be other weights.
    """

    version: int
    handle: Any = None
    lineage: int = 0

    @property
    def told(self) -> dict[str, Any]:
        """What travels beside the version with every job and request; see `Inference.hold`.

        A dictionary: references that lie in it are not fetched before somebody asks for them.
        """
        return {"handle": self.handle, "lineage": self.lineage}


@dataclass(frozen=True, slots=True)
class Arrived:
    """Weights that came.

    Attributes:
        version: the one that was asked for, or a newer one.
        tensors: by name; valid until the receiver's next `fetch`, and not to be written.
    """

    version: int
    tensors: Mapping[str, torch.Tensor]


class Sender(Protocol):
    """The learner's side of a transport, one on each rank."""

    def send(self, learner: Learner, version: int, lineage: int, root: str) -> tuple[Any, ...]:
        """Make the weights ready to be fetched. Called on ALL ranks: the export is collective.

        Args:
            learner: of this rank.
            version: see `PublishedWeights`; `lineage` alike.
            root: where a transport through files keeps its versions.

        Returns:
            On rank 0 one value, the handle. Where there are more (`transports.results`), the handle is the
            references to all but the first, which tells the controller of success.

        Raises:
            StatesetError: they cannot be published.
        """
        ...


class Receiver(Protocol):
    """The engine's side of a transport."""

    async def fetch(self, version: int, lineage: int, handle: Any) -> Arrived:
        """Get weights; does not hold up the event loop. One call at a time.

        Args:
            version: at least this one.
            lineage: of this one.
            handle: of `PublishedWeights`, not None.

        Raises:
            StatesetError: they did not come, or not whole.
        """
        ...
