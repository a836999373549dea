"""One learner rank: an actor that fetches the samples of a step from wherever they lie, and learns from them.

Who waits for whom: a rank waits for the samples, and inside collectives for the other ranks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from stateset_ray.actors.jobs import GroupPayload, SampleSize
from stateset_ray.actors.publishing.folder import write_probe
from stateset_ray.actors.publishing.transports import sender
from stateset_ray.actors.remote import get
from stateset_ray.config import Config
from stateset_ray.errors import LearnerError
from stateset_ray.learner.batch import MiniBatch
from stateset_ray.learner.learner import Learner, LossKind
from stateset_ray.models import choose_hardware
from stateset_ray.types import Sample

__all__ = ["LearnerRank", "RankBatch", "SampleRef", "UpdateBatch"]


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample that lies in a group's payload, and its credit.

    Attributes:
        payload: reference to a `GroupPayload`.
        size: where the sample lies in it.
        advantages: one per turn of its trajectory.
        weight: of each of its tokens in the loss.
        group: samples of one group begin alike with their first `prefix` tokens.
    """

    payload: Any
    size: SampleSize
    advantages: tuple[float, ...]
    weight: float = 1.0
    group: int = -1
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class UpdateBatch:
    """The samples of one optimizer step, those without gradient left out, and its denominator."""

    samples: list[SampleRef]
    denominator: float


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One rank's part of an `UpdateBatch`.

    Attributes:
        micro_batches: by micro-batch, (index of the payload, a sample without it).
    """

    micro_batches: list[list[tuple[int, SampleRef]]]
    denominator: float


class LearnerRank:
    """One learner rank as a Ray actor; `LearnerGroup` calls the same method on all of them."""

    def __init__(self, config: Config, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._learner: Learner | None = None
        self._secured: list[GroupPayload] = []
        self._sender = sender(config)

    def __repr__(self) -> str:  # names the actor in Ray's logs and dashboard
        return f"{self._config.run.name}/learner-{self._rank}"

    def where(self) -> tuple[str, str, int]:
        """(node id, address, a free port) of this rank: rank 0's become the meeting point."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        return ray.get_runtime_context().get_node_id(), address, port

    def set_up(self, master: tuple[str, int], peers: int) -> int:
        """Load the model and meet the other ranks; returns this process's id."""
        hardware = choose_hardware(self._config.model, len(ray.get_gpu_ids()), peers)
        self._learner = Learner(self._config, self._rank, self._config.learner.ranks, master, hardware)
        return os.getpid()

    def update(
        self, parts: Sequence[RankBatch], payloads: Mapping[str, Any], step: int, loss: LossKind,
        kl_coef: float | None,
    ) -> dict[str, float]:  # fmt: skip
        """An optimizer step for each part; samples are fetched here, from wherever they lie."""
        refs = payloads["refs"]
        needed = sorted({index for part in parts for mb in part.micro_batches for index, _ in mb})
        payloads_here = get(
            [refs[i] for i in needed], timeout=self._config.learner.timeout,
            waiting_for="the samples of this step",
        )  # fmt: skip
        fetched: dict[int, GroupPayload] = dict(zip(needed, payloads_here, strict=True))

        def sample(index: int, ref: SampleRef) -> Sample:
            row = fetched[index].samples[ref.size.trajectory][ref.size.row]
            return row.credited(ref.advantages, ref.weight)

        minibatches = [
            MiniBatch(
                [[sample(index, ref) for index, ref in mb] for mb in part.micro_batches],
                [[_shares(ref, place) for place, (_, ref) in enumerate(mb)] for mb in part.micro_batches],
                part.denominator,
            )
            for part in parts
        ]
        return self._ready().update(minibatches, step, loss, kl_coef)

    def secure(self, payloads: Mapping[str, Any]) -> list[int]:
        """Fetch groups to this rank's node, and hold them there until the next call.

        Returns:
            Indices of those that are gone with the node that played them.
        """
        limit = self._config.learner.timeout
        refs, lost = payloads["refs"], []
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=limit)  # all at the same time
        self._secured = []
        for index, ref in enumerate(refs):
            try:
                self._secured.append(get(ref, timeout=limit, waiting_for="the groups of this step"))
            except ObjectLostError:
                lost.append(index)
        return lost

    def in_force(self) -> dict[str, Any]:
        """See `Learner.in_force`."""
        return self._ready().in_force()

    def refresh_reference(self) -> None:
        """Make the policy as it is now the reference."""
        self._ready().refresh_reference()

    def publish(self, version: int, lineage: int, root: str) -> Any:
        """Make the weights ready to be fetched; see `Sender.send`."""
        sent = self._sender.send(self._ready(), version, lineage, root)
        return sent if len(sent) > 1 else sent[0]

    def write_probe(self, root: str) -> tuple[str, str]:
        """See `publishing.folder.write_probe`."""
        return write_probe(root)

    def save(self, folder: str) -> None:
        """This rank's part of a checkpoint: the model (rank 0) and the state."""
        learner = self._ready()
        learner.save_model(folder)
        state = Path(folder) / "state"
        state.mkdir(exist_ok=True)
        learner.save_state(state)

    def check(self, folder: str) -> None:
        """See `Learner.check_state`."""
        self._ready().check_state(Path(folder) / "state")

    def load(self, folder: str) -> None:
        """Continue from a checkpoint."""
        self._ready().load_state(Path(folder) / "state")

    def _ready(self) -> Learner:
        if self._learner is None:
            raise LearnerError("this learner rank was asked to work before it was set up")
        return self._learner


def _shares(ref: SampleRef, place: int) -> Any:
    """What a sample shares its first tokens with: its group, or where there is no prefix, nothing."""
    return ref.group if ref.prefix else ("alone", place)
