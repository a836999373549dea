"""Weights by broadcast between rank 0 of the learner and engines apart: NCCL, or gloo without GPUs.

Rank 0 keeps the published version in main memory, and a thread of it answers who asks. All that ask for it
form a group with it (`publishing.group`), which stays as long as the same members ask again. So a publication
is one broadcast to all engines; one that was restarted asks alone, beside the learner's work, and gets what
the others have before it answers anything.

Who waits for whom: an engine for its seat, and all of a group for each other; each wait is bounded by
`publish.timeout`. A member that dies or is silent so long breaks the group: those that are left ask again.
The thread waits at most `_GRACE` seconds for engines that have not asked yet, then goes on without them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch

from stateset_ray.actors.publishing.base import Arrived
from stateset_ray.actors.publishing.group import Backend, BroadcastGroup, distributed
from stateset_ray.config import Config
from stateset_ray.errors import InfrastructureFault
from stateset_ray.learner.learner import Learner
from stateset_ray.policies.flat_weights import FlatWeights, places
from stateset_ray.policies.weights import decode

__all__ = ["CollectiveReceiver", "CollectiveSender", "Meeting"]

_log = logging.getLogger(__name__)

_GRACE = 5.0  # seconds that those who asked wait for engines that did not
_POLL = 0.005  # seconds between looks for somebody who asks; a look takes microseconds
_TRIES = 3  # of an engine: the group may break under it because another one died


@dataclass(frozen=True, slots=True)
class Meeting:
    """The handle of this transport: where rank 0 can be asked."""

    host: str
    port: int


class CollectiveSender:
    """Keeps the published version and broadcasts it to whoever asks; implements `Sender`.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._engines = config.rollout.engines
        self._piece = config.publish.bucket_mib << 20
        self._timeout = config.publish.timeout
        self._backend = _backend(config)
        self._store: Any = None
        self._address = ""
        self._changing = threading.Lock()
        """Held while the version is replaced, and while it is broadcast."""
        self._weights: FlatWeights | None = None
        self._version, self._lineage = 0, 0
        self._holders: set[str] = set()
        """Engines that have the version."""
        self._group: BroadcastGroup | None = None
        self._members: tuple[str, ...] = ()
        self._epoch = 0
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def send(self, learner: Learner, version: int, lineage: int, root: str) -> tuple[Any, ...]:
        """See `Sender.send`; waits for a broadcast of the version before, if one is under way."""
        arrays = learner.export_weights(copy=False)
        if learner.rank != 0:
            return (None,)
        tensors = {name: decode(array) for name, array in arrays.items()}
        with self._changing:
            if self._weights is None:
                self._weights = FlatWeights(places(tensors), pinned=self._backend == "nccl")
            self._weights.fill(tensors)
            self._version, self._lineage = version, lineage
            self._holders = set()
        if self._store is None:
            self._open(self._weights)
        return (Meeting(self._address, self._store.port),)

    def _open(self, weights: FlatWeights) -> None:
        self._address = ray.util.get_node_ip_address()
        self._store = distributed.TCPStore(
            self._address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._timeout)
        )
        self._store.set("weights", json.dumps(weights.described()))
        self._store.set("asks", "")
        self._thread = threading.Thread(target=self._serve, name="weights", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self._leave()
        self._store = None

    def _serve(self) -> None:
        """Gather those that ask and broadcast to them, until this is closed or the process ends."""
        asks: dict[str, Mapping[str, Any]] = {}
        since = 0.0
        while not self._closed.is_set():
            came = self._came()
            since = since if asks else time.monotonic()
            asks |= {ask["member"]: ask for ask in came}
            missing = self._engines - len(self._holders | asks.keys())
            if asks and (missing <= 0 or time.monotonic() - since > min(_GRACE, self._timeout)):
                with self._changing:
                    self._broadcast(asks)
                asks = {}
            elif not came:
                time.sleep(_POLL)

    def _came(self) -> list[Mapping[str, Any]]:
        """Those that have asked since the last look, taken off the store's list."""
        text = self._store.get("asks").decode()
        if not text or self._store.compare_set("asks", text, ""):
            return []  # nobody, or one more while we looked: all of them at the next look
        return [json.loads(line) for line in text.splitlines()]

    def _broadcast(self, asks: Mapping[str, Mapping[str, Any]]) -> None:
        assert self._weights is not None  # nobody knows where to ask before there is something to get
        members = tuple(sorted(asks))
        again = members == self._members and all(ask["epoch"] == self._epoch for ask in asks.values())
        if not again:
            self._leave()
            self._epoch += 1
        seat = {
            "epoch": self._epoch, "size": 1 + len(members), "backend": self._backend, "piece": self._piece,
            "version": self._version, "lineage": self._lineage,
        }  # fmt: skip
        for rank, member in enumerate(members, start=1):
            self._store.set(asks[member]["seat"], json.dumps(seat | {"rank": rank}))
        try:
            if self._group is None:
                self._group = BroadcastGroup(
                    self._store, self._epoch, 0, 1 + len(members), self._backend, self._address, self._timeout
                )
                self._members = members
            self._group.broadcast(self._weights, self._piece)
            self._holders.update(members)
        except Exception as error:  # whatever it is, the thread must go on to answer the others
            _log.warning("version %d did not reach %d engines: %s", self._version, len(members), error)
            self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._members = None, ()


class CollectiveReceiver:
    """Asks rank 0 and takes part in its broadcast; implements `Receiver`.

    Weights arrive in main memory of their own beside those that answer, and are put in their place between
    two turns.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._timeout = config.publish.timeout
        self._name = uuid.uuid4().hex
        self._meeting: Meeting | None = None
        self._store: Any = None
        self._weights: FlatWeights | None = None
        self._group: BroadcastGroup | None = None
        self._fetching: asyncio.Future[Arrived] | None = None

    async def fetch(self, version: int, lineage: int, handle: Any) -> Arrived:
        """See `Receiver.fetch`.

        Raises:
            InfrastructureFault: rank 0 or the group did not answer, several times.
        """
        if self._fetching is not None:  # of a caller who does not wait any more
            await asyncio.wait({self._fetching})
        self._fetching = asyncio.ensure_future(asyncio.to_thread(self._fetch, version, lineage, handle))
        # A broadcast cannot be left in the middle: it goes on when its caller is cancelled.
        return await asyncio.shield(self._fetching)

    def close(self) -> None:
        """Leave the group and the store."""
        self._leave()
        self._store = self._meeting = None

    def _fetch(self, version: int, lineage: int, meeting: Meeting) -> Arrived:
        problem: Exception | None = None
        for _ in range(_TRIES):
            try:
                seat = self._receive(meeting)
            except RuntimeError as error:  # what stores and groups raise
                problem = error
                self._leave()
                continue
            if seat["lineage"] == lineage and seat["version"] >= version:
                assert self._weights is not None
                return Arrived(seat["version"], self._weights.tensors)
            problem = RuntimeError(f"version {seat['version']} of lineage {seat['lineage']} came")
        raise InfrastructureFault(
            f"version {version} of the weights did not come by broadcast: {problem}",
            given=f"{meeting.host}:{meeting.port}",
            mend="did the learner die? look at its log, and whether its node is reached from this one",
        )

    def _receive(self, meeting: Meeting) -> Mapping[str, Any]:
        if self._meeting != meeting:
            self._leave()
            self._store = distributed.TCPStore(
                meeting.host, meeting.port, is_master=False, timeout=timedelta(seconds=self._timeout)
            )
            # A seat may have to wait for a group that does not meet, for its end, and for who has not asked.
            self._store.set_timeout(timedelta(seconds=3 * self._timeout))
            self._meeting, self._weights = meeting, None
        here = f"seat/{uuid.uuid4().hex}"
        ask = {"member": self._name, "epoch": self._group.epoch if self._group else 0, "seat": here}
        self._store.append("asks", json.dumps(ask) + "\n")
        seat: Mapping[str, Any] = json.loads(self._store.get(here))
        self._store.delete_key(here)
        if self._weights is None:
            described = json.loads(self._store.get("weights"))
            self._weights = FlatWeights.from_description(described, pinned=seat["backend"] == "nccl")
        if self._group is None or self._group.epoch != seat["epoch"]:
            self._leave()
            self._group = BroadcastGroup(
                self._store, seat["epoch"], seat["rank"], seat["size"], seat["backend"],
                ray.util.get_node_ip_address(), self._timeout,
            )  # fmt: skip
        self._group.broadcast(self._weights, seat["piece"])
        return seat

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None


def _backend(config: Config) -> Backend:
    """NCCL needs GPUs that are apart; a GPU that learner and engine share is reached through main memory."""
    room = config.cluster
    apart = room.learner_gpus >= 1 and room.engine_gpus >= 1
    return "nccl" if apart and config.model.device != "cpu" and torch.cuda.is_available() else "gloo"
