"""All learner ranks: they step together, save together, and end together.

Who waits for whom: the controller waits for all ranks, each rank waits for the others inside collectives.
A rank never heals alone. If one fails, all are ended at once, so that no collective waits for a dead peer.
`LearnerLost` then says that they can be built anew in the same bundles (`rebuild`) and continue from the last
checkpoint, which is whole; any other error stops the run.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from stateset_ray.actors.jobs import GroupPayload, SampleSize
from stateset_ray.actors.placement import Placement
from stateset_ray.actors.publishing.base import PublishedWeights
from stateset_ray.actors.publishing.folder import root_of, write_probe
from stateset_ray.actors.publishing.transports import results, sender
from stateset_ray.actors.remote import died_with_its_node, get
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, LearnerError, LearnerLost, StatesetError
from stateset_ray.learner.batch import Item, MiniBatch, plan
from stateset_ray.learner.learner import Learner, LossKind
from stateset_ray.models import choose_hardware
from stateset_ray.types import Sample

__all__ = ["LearnerGroup", "LearnerRank", "SampleRef", "UpdateBatch", "learner_group"]

_log = logging.getLogger(__name__)


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
class _RankBatch:
    """One rank's part of an `UpdateBatch`: by micro-batch, (index of the payload, a sample without it)."""

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
        self, parts: Sequence[_RankBatch], payloads: Mapping[str, Any], step: int, loss: LossKind,
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


class LearnerGroup:
    """The ranks as one; created by `learner_group`.

    Args:
        config: of the run.
        make: creates the actor of a rank, in the bundle that belongs to it.
    """

    def __init__(self, config: Config, make: Callable[[int], Any]) -> None:
        self._config = config
        self._make = make
        self._ranks: list[Any] = []
        self.pids: list[int] = []
        self.restarts = 0

    def start(self) -> None:
        """Create the ranks and let them meet.

        Raises:
            StatesetError: a rank could not be set up; the cause is passed on.
            WaitTimeout: not ready within `cluster.wait_seconds`.
        """
        deadline, spare = time.monotonic() + self._config.cluster.wait_seconds, True
        while True:
            try:
                return self._meet()
            except (LearnerError, ClusterError) as error:
                # Ray may not have noticed yet that the node of a bundle is dead, and have put the rank there.
                gone = died_with_its_node(error) and time.monotonic() < deadline
                # The port was free when it was chosen, and may have been taken before it was used.
                taken = spare and isinstance(error, LearnerError)
                if not gone and not taken:
                    raise
                spare = gone
                _log.warning("the learner ranks are created once more: %s", error.problem)
                self.end()

    def _meet(self) -> None:
        limit = self._config.cluster.wait_seconds
        self._ranks = [self._make(rank) for rank in range(self._config.learner.ranks)]
        found = get(
            [r.where.remote() for r in self._ranks], timeout=limit,
            waiting_for="the learner ranks to start",
        )  # fmt: skip
        nodes = [node for node, _, _ in found]
        master = (found[0][1], found[0][2])
        self.pids = get(
            [r.set_up.remote(master, nodes.count(node)) for r, node in zip(self._ranks, nodes, strict=True)],
            timeout=limit, waiting_for="the learner ranks to load the model and meet",
        )  # fmt: skip

    def rebuild(self) -> None:
        """End what is left of the ranks and build all anew, in the same bundles; they know nothing yet."""
        self.restarts += 1
        self.end()
        self.start()

    def update(
        self, updates: Sequence[UpdateBatch], step: int, loss: LossKind = "policy",
        kl_coef: float | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Optimizer steps on every rank, one for each batch.

        Args:
            updates: what to learn from, in turn.
            step: decides the learning rate.
            kl_coef: instead of `grpo.kl_coef`, where it is steered.

        Returns:
            The metrics of `Learner.update`.

        Raises:
            LearnerLost: a rank died; all ranks have been ended.
            LearnerError: the ranks cannot learn from this; all ranks have been ended.
        """
        refs = list(dict.fromkeys(s.payload for update in updates for s in update.samples))
        where = {ref: i for i, ref in enumerate(refs)}
        learner = self._config.learner
        parts: list[list[_RankBatch]] = [[] for _ in range(learner.ranks)]
        for update in updates:
            # Without its payload, which travels once, beside all of them.
            rows = [(where[s.payload], replace(s, payload=None)) for s in update.samples]
            if not learner.share_prefix:
                rows = [(index, replace(s, prefix=0)) for index, s in rows]
            items = [Item(s.size.tokens, s.group, s.prefix) for _, s in rows]
            planned = plan(items, learner.ranks, learner.micro_batch_tokens)
            for part, mine in zip(parts, planned, strict=True):
                part.append(_RankBatch([[rows[i] for i in mb] for mb in mine], update.denominator))
        calls = [
            rank.update.remote(part, {"refs": refs}, step, loss, kl_coef)
            for rank, part in zip(self._ranks, parts, strict=True)
        ]
        return dict(self._all(calls, "an update")[0])

    def secure(self, payloads: Sequence[Any]) -> list[int]:
        """Fetch groups to rank 0's node, where they outlive those that played them until the next call.

        Args:
            payloads: references to `GroupPayload`.

        Returns:
            Indices of those that are lost already.

        Raises:
            LearnerLost: the rank died.
        """
        if not payloads:
            return []
        return list(self._all([self._ranks[0].secure.remote({"refs": list(payloads)})], "fetching groups")[0])

    def publish(self, version: int, lineage: int = 0) -> PublishedWeights:
        """Make the weights ready to be fetched under their version, through the configured transport."""
        count, root = results(self._config), root_of(self._config)
        calls = [
            rank.publish.options(num_returns=count).remote(version, lineage, root) for rank in self._ranks
        ]
        what = "a publication of the weights"
        if count == 1:
            return PublishedWeights(version, self._all(calls, what)[0], lineage)
        self._all([done for done, *_ in calls], what)
        return PublishedWeights(version, tuple(calls[0][1:]), lineage)

    def write_probe(self, root: str) -> tuple[str, str]:
        """Let rank 0 leave a file in a folder; see `publishing.folder.write_probe`."""
        limit = self._config.cluster.wait_seconds
        token, node = get(
            self._ranks[0].write_probe.remote(root), timeout=limit, waiting_for="the learner to write a file"
        )
        return str(token), str(node)

    def in_force(self) -> list[dict[str, Any]]:
        """What each rank learns with; see `Learner.in_force`."""
        return self._all([rank.in_force.remote() for rank in self._ranks], "asking what is in force")

    def refresh_reference(self) -> None:
        """Make the policy as it is now the reference of the KL."""
        self._all([rank.refresh_reference.remote() for rank in self._ranks], "a new reference")

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
            raise LearnerLost(
                f"a learner rank failed during {what}; all ranks were ended: {error}",
                mend="the last checkpoint is whole: continue with --resume (out of memory? lower "
                "learner.micro_batch_tokens)",
            ) from error
        return list(get(calls, timeout=self._config.learner.timeout, waiting_for=what))


@contextmanager
def learner_group(config: Config, placement: Placement) -> Iterator[LearnerGroup]:
    """Create the ranks, let them meet, and end them afterwards.

    Raises:
        StatesetError: as in `LearnerGroup.start`.
    """
    cls = ray.remote(max_restarts=0)(LearnerRank)
    group = LearnerGroup(config, lambda rank: cls.options(**placement.learner(rank)).remote(config, rank))
    try:
        group.start()
        yield group
    finally:
        group.end()
