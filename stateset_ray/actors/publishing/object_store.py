"""Weights through Ray's object store: written once a node, mapped by every engine on it."""

from __future__ import annotations

import asyncio
from typing import Any

from stateset_ray.actors.publishing.base import Arrived
from stateset_ray.learner.learner import Learner
from stateset_ray.policies.weights import PARTS, decode, split

__all__ = ["ObjectStoreReceiver", "ObjectStoreSender"]


class ObjectStoreSender:
    """Returns the weights in parts, which so become objects of the controller's; implements `Sender`.

    They outlive the rank that made them, and go when the controller forgets the handle: a tuple of
    references to {name: encoded array} each.
    """

    results = 1 + PARTS

    def send(self, learner: Learner, version: int, lineage: int, root: str) -> tuple[Any, ...]:
        """See `Sender.send`."""
        # No copies: Ray writes what is returned into the object store before this rank's next call.
        return None, *split(learner.export_weights(copy=False))


class ObjectStoreReceiver:
    """Maps the parts into this process; implements `Receiver`."""

    async def fetch(self, version: int, lineage: int, handle: Any) -> Arrived:
        """See `Receiver.fetch`."""
        parts = await asyncio.gather(*handle)
        return Arrived(version, {name: decode(array) for part in parts for name, array in part.items()})
