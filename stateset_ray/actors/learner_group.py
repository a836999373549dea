"""All learner ranks: they step together, save together, and end together.

Who waits for whom: the controller waits for all ranks, each rank waits for the others inside collectives.
A rank never heals alone. If one fails, all are ended at once, so that no collective waits for a dead peer;
the run stops with the error, and its last checkpoint is whole.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from stateset_ray.actors.jobs import GroupPayload, SampleSize
from stateset_ray.actors.placement import Placement
from stateset_ray.actors.remote import get
from stateset_ray.actors.weights import PARTS, PublishedWeights, split
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, LearnerError, StatesetError
from stateset_ray.learner.batch import plan
from stateset_ray.learner.learner import Learner, LossKind
from stateset_ray.models import choose_hardware

__all__ = ["LearnerGroup", "LearnerRank", "SampleRef", "learner_group"]


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample that lies in a group's payload, and the advantage it is to be scaled with."""

    payload: Any
    size: SampleSize
    advantage: float


class LearnerRank:
    """One learner rank as a Ray actor; `LearnerGroup` calls the same method on all of them."""

    def __init__(self, config: Config, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._learner: Learner | None = None

    def __repr__(self) -> str:  # names the actor in Ray's logs and dashboard
        return f"LearnerRank-{self._rank}"

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
        self, micro_batches: Sequence[Sequence[tuple[int, SampleSize, float]]], payloads: Mapping[str, Any],
        denominator: int, step: int, loss: LossKind,
    ) -> dict[str, float]:  # fmt: skip
        """One optimizer step; samples are fetched here, from wherever they lie."""
        refs = payloads["refs"]
        needed = sorted({index for micro_batch in micro_batches for index, _, _ in micro_batch})
        fetched: dict[int, GroupPayload] = dict(zip(needed, ray.get([refs[i] for i in needed]), strict=True))
        rows = [
            [
                fetched[index].samples[size.trajectory][size.row].scaled(advantage)
                for index, size, advantage in micro_batch
            ]
            for micro_batch in micro_batches
        ]
        return self._ready().update(rows, denominator, step, loss)

    def export(self) -> tuple[Any, ...]:
        """None and the encoded weights in parts, on rank 0 only; the first of these results is there so
        that success can be seen without fetching the others."""
        return None, *split(self._ready().export_weights())

    def save(self, folder: str) -> None:
        """This rank's part of a checkpoint: the model (rank 0) and the state."""
        learner = self._ready()
        learner.save_model(folder)
        state = Path(folder) / "state"
        state.mkdir(exist_ok=True)
        learner.save_state(state)

    def load(self, folder: str) -> None:
        """Continue from a checkpoint."""
        self._ready().load_state(Path(folder) / "state")

    def _ready(self) -> Learner:
        if self._learner is None:
            raise LearnerError("this learner rank was asked to work before it was set up")
        return self._learner


class LearnerGroup:
    """The ranks as one; created by `learner_group`."""

    def __init__(self, config: Config, ranks: list[Any], pids: list[int]) -> None:
        self._config = config
        self._ranks = ranks
        self.pids = pids

    def update(
        self, samples: Sequence[SampleRef], denominator: int, step: int, loss: LossKind = "policy"
    ) -> dict[str, float]:
        """One optimizer step on every rank.

        Args:
            samples: what to learn from; those without gradient are left out by the caller.
            denominator: masked tokens of the whole step, those left out included.
            step: decides the learning rate.

        Returns:
            The metrics of `Learner.update`.

        Raises:
            LearnerError: a rank failed; all ranks have been ended.
        """
        refs = list(dict.fromkeys(s.payload for s in samples))
        where = {ref: i for i, ref in enumerate(refs)}
        learner = self._config.learner
        parts = plan([s.size.tokens for s in samples], learner.ranks, learner.micro_batch_tokens)
        rows = [(where[s.payload], s.size, s.advantage) for s in samples]
        calls = [
            rank.update.remote(
                [[rows[i] for i in mb] for mb in part], {"refs": refs}, denominator, step, loss
            )
            for rank, part in zip(self._ranks, parts, strict=True)
        ]
        return dict(self._all(calls, "an update")[0])

    def publish(self, version: int) -> PublishedWeights:
        """Put the weights into the object store, under their version."""
        calls = [rank.export.options(num_returns=1 + PARTS).remote() for rank in self._ranks]
        self._all([done for done, *_ in calls], "an export of the weights")
        return PublishedWeights(version, tuple(calls[0][1:]))

    def save(self, folder: Path) -> None:
        """Write model and state of all ranks into a folder that all of them see."""
        self._all([rank.save.remote(str(folder.absolute())) for rank in self._ranks], "a checkpoint")

    def load(self, folder: Path) -> None:
        """Continue all ranks from a checkpoint."""
        self._all([rank.load.remote(str(folder.absolute())) for rank in self._ranks], "a checkpoint's state")

    def end(self) -> None:
        """End all ranks now."""
        for rank in self._ranks:
            ray.kill(rank)

    def _all(self, calls: list[Any], what: str) -> list[Any]:
        pending = list(calls)
        try:
            # One by one as they come: the first failure must end the ranks that wait for the failed one.
            while pending:
                ready, pending = ray.wait(pending, num_returns=1, timeout=self._config.learner.timeout)
                if not ready:
                    raise LearnerError(
                        f"{len(pending)} of {len(calls)} learner ranks did not finish {what} within "
                        f"learner.timeout = {self._config.learner.timeout:.0f} s",
                        mend="raise learner.timeout if the work is really that long",
                    )
                get(ready, timeout=self._config.learner.timeout, waiting_for=what)
        except Exception as error:
            self.end()
            # A ClusterError tells of what a rank did not raise on purpose: the peers of a dead one raise
            # it when their collective breaks, and may be heard before its death is.
            if isinstance(error, StatesetError) and not isinstance(error, ClusterError):
                raise
            raise LearnerError(
                f"a learner rank failed during {what}; all ranks were ended: {error}",
                mend="the last checkpoint is whole: continue with --resume (out of memory? lower "
                "learner.micro_batch_tokens)",
            ) from error
        return list(ray.get(calls))


@contextmanager
def learner_group(config: Config, placement: Placement) -> Iterator[LearnerGroup]:
    """Create the ranks, let them meet, and end them afterwards.

    Raises:
        StatesetError: a rank could not be set up; the cause is passed on.
        WaitTimeout: not ready within `cluster.wait_seconds`.
    """
    limit = config.cluster.wait_seconds
    cls = ray.remote(max_restarts=0)(LearnerRank)
    ranks = [cls.options(**placement.learner(r)).remote(config, r) for r in range(config.learner.ranks)]
    try:
        found = get(
            [r.where.remote() for r in ranks], timeout=limit, waiting_for="the learner ranks to start"
        )
        nodes = [node for node, _, _ in found]
        master = (found[0][1], found[0][2])
        pids = get(
            [rank.set_up.remote(master, nodes.count(node)) for rank, node in zip(ranks, nodes, strict=True)],
            timeout=limit, waiting_for="the learner ranks to load the model and meet",
        )  # fmt: skip
        yield LearnerGroup(config, ranks, pids)
    finally:
        for rank in ranks:
            ray.kill(rank)
