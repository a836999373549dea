"""Which transport carries the weights: `publish.transport`."""

from __future__ import annotations

from stateset_ray.actors.publishing.base import Receiver, Sender
from stateset_ray.actors.publishing.collective import CollectiveReceiver, CollectiveSender
from stateset_ray.actors.publishing.folder import FolderReceiver, FolderSender
from stateset_ray.actors.publishing.object_store import ObjectStoreReceiver, ObjectStoreSender
from stateset_ray.config import Config

__all__ = ["receiver", "results", "sender"]


def results(config: Config) -> int:
    """How many values a rank's `Sender.send` returns."""
    return ObjectStoreSender.results if config.publish.transport == "object_store" else 1


def sender(config: Config) -> Sender:
    """One learner rank's side."""
    match config.publish.transport:
        case "folder":
            return FolderSender(config)
        case "collective":
            return CollectiveSender(config)
    return ObjectStoreSender()


def receiver(config: Config) -> Receiver:
    """One engine's side."""
    match config.publish.transport:
        case "folder":
            return FolderReceiver()
        case "collective":
            return CollectiveReceiver(config)
    return ObjectStoreReceiver()
