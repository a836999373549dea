"""The rollout workers themselves: who is there, who is awaited, and who has fallen silent.

Who waits for whom: the pool waits for what `waits` names, and hands what came to `answered`; only `await_any`
waits here, for the first worker that comes back. A worker that holds groups has to answer a heartbeat within
`rollout.heartbeat_timeout`; one that does not (its event loop is blocked, its process stopped) is killed, and
restarted by Ray like one that crashed.

Workers beyond `rollout.workers`, up to `rollout.max_workers`, are guests: they join when the cluster has room
for them, also in the middle of a run, and that they leave with their node is no error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from stateset_ray.actors.heartbeat import Heartbeat
from stateset_ray.actors.jobs import GroupJob
from stateset_ray.actors.placement import Placement, import_paths
from stateset_ray.actors.remote import await_ready, cause_of, there
from stateset_ray.actors.rollout_worker import RolloutWorker
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, WaitTimeout

__all__ = ["Roster", "Stream", "Worker", "calls_at_once", "rollout_workers"]

_log = logging.getLogger(__name__)
_POLL = 1.0  # seconds between looks at workers that are to come back
_CALLS = 64  # of a worker at the same time, besides one for each conversation


@dataclass(eq=False)
class Stream:
    """One call of a worker's `play`: what it has still to play.

    Attributes:
        payload: of a group, where it has come and the report that belongs to it has not.
    """

    jobs: dict[str, GroupJob]
    suspect: bool = False
    payload: Any = None


@dataclass(eq=False)
class Worker:
    """One rollout worker, as the controller knows it.

    Attributes:
        guest: whether the run goes on without it.
        streams: its calls that have not ended.
        ping: set while the worker is not known to be alive.
        since: when it was lost, by the monotonic clock.
        heartbeat: asked for while it holds groups.
        alone: whether it plays a suspect, or is kept free for one.
    """

    index: int
    actor: Any
    guest: bool = False
    streams: dict[Any, Stream] = field(default_factory=dict)
    ping: Any = None
    since: float = 0.0
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    alone: bool = False

    @property
    def load(self) -> int:
        """Groups that it has still to play."""
        return sum(len(stream.jobs) for stream in self.streams.values())

    @property
    def playing(self) -> list[str]:
        """Ids of these groups."""
        return sorted(name for stream in self.streams.values() for name in stream.jobs)

    def clear(self) -> list[GroupJob]:
        """Forget what it plays; the groups that it had still to play."""
        jobs = [job for stream in self.streams.values() for job in stream.jobs.values()]
        self.streams, self.heartbeat, self.alone = {}, Heartbeat(), False
        return jobs


class Roster:
    """All workers of a run.

    Args:
        config: of the run.
        workers: those that are there.
        make: creates the actor of an index (again, when Ray has given it up).
        guests: how many more may join.
    """

    def __init__(
        self, config: Config, workers: Sequence[Worker], make: Callable[[int], Any], guests: int = 0
    ) -> None:
        self._limits = config.rollout
        self._wait_seconds = config.cluster.wait_seconds
        self._make = make
        self.workers = list(workers)
        for index in range(len(workers), len(workers) + guests):
            worker = Worker(index, make(index), guest=True)
            self._ping(worker)
            self.workers.append(worker)

    @property
    def live(self) -> list[Worker]:
        """Workers that can be given groups."""
        return [worker for worker in self.workers if worker.ping is None]

    def waits(self) -> dict[Any, Worker]:
        """References that something new will come with, and whose it is."""
        waits = {stream: worker for worker in self.workers for stream in worker.streams}
        return waits | {worker.ping: worker for worker in self.workers if worker.ping is not None}

    def answered(self, worker: Worker, item: Any) -> bool:
        """Take an answer that is not a stream's; whether it made a worker available.

        Raises:
            StatesetError: a worker that the run needs cannot be built any more.
        """
        return item == worker.ping and self._pinged(worker)

    def dismiss(self, worker: Worker, cause: Exception) -> list[GroupJob]:
        """A guest cannot work here: the run goes on without it; the groups that it had still to play."""
        _log.warning("rollout worker %d is dismissed: %s", worker.index, cause)
        ray.kill(worker.actor)
        self.workers.remove(worker)
        return worker.clear()

    def lost(self, worker: Worker, death: Exception) -> list[GroupJob]:
        """A worker died: ask for it again; the groups that it had still to play."""
        jobs = worker.clear()
        if isinstance(death, ActorDiedError):
            worker.actor = self._make(worker.index)
        worker.since = time.monotonic()
        self._ping(worker)
        return jobs

    def beat(self, *, idle: bool = False) -> None:
        """Ask workers that hold groups whether they are alive, and kill those that did not answer in time.

        Args:
            idle: ask those that hold none, too.

        Raises:
            ClusterError: a worker that the run needs has not come back within `cluster.wait_seconds`.
        """
        now, limit = time.monotonic(), self._limits.heartbeat_timeout
        for worker in self.workers:
            if worker.ping is not None:
                late = not worker.guest and now - worker.since > self._wait_seconds
                if late and not there(worker.ping):
                    raise ClusterError(
                        f"rollout worker {worker.index} did not come back within {self._wait_seconds:.0f} s",
                        mend="look at its log: is there room for it, and memory for its model?",
                    )
            elif (worker.load or idle) and worker.heartbeat.missed(worker.actor, limit):
                _log.warning(
                    "rollout worker %d has not answered for %.0f s (rollout.heartbeat_timeout) and is "
                    "restarted; it was playing %s", worker.index, limit, worker.playing,
                )  # fmt: skip
                ray.kill(worker.actor, no_restart=False)  # its streams will tell of its death

    def await_any(self) -> None:
        """Wait until a worker can be given groups.

        Raises:
            WaitTimeout: none could within `cluster.wait_seconds`.
            StatesetError: see `answered`.
        """
        deadline = time.monotonic() + self._wait_seconds
        while not self.live:
            pings = {worker.ping: worker for worker in self.workers}
            ready, _ = ray.wait(list(pings), num_returns=1, timeout=_POLL)
            for item in ready:
                self._pinged(pings[item])
            if time.monotonic() > deadline:
                raise WaitTimeout("the controller waited for any rollout worker to come back")

    def _ping(self, worker: Worker) -> None:
        # Asked again after each restart, until there is room for it: a question has no effects.
        worker.ping = worker.actor.ready.options(max_task_retries=-1).remote()

    def _pinged(self, worker: Worker) -> bool:
        """A worker answered its ping, or is still restarting, or is gone for good."""
        try:
            ray.get(worker.ping, timeout=self._wait_seconds)
        except RayTaskError as error:
            if not worker.guest:
                raise cause_of(error) from None
            self.dismiss(worker, cause_of(error))
            return False
        except RayActorError as error:
            if isinstance(error, ActorDiedError):
                worker.actor = self._make(worker.index)
            self._ping(worker)
            return False
        worker.ping = None
        return True


@contextmanager
def rollout_workers(config: Config, placement: Placement, engines: Sequence[Any]) -> Iterator[Roster]:
    """Create `rollout.workers` actors, wait until they can play, and end them and all guests afterwards.

    Args:
        engines: actors that answer them; without any, each worker has an engine of its own.

    Raises:
        StatesetError: a worker could not be built (its model, its template); the cause is passed on.
        WaitTimeout: not ready within `cluster.wait_seconds`.
    """
    cls = ray.remote(max_restarts=-1, max_task_retries=0)(RolloutWorker)
    paths = import_paths()
    most = max(config.rollout.workers, config.rollout.max_workers)
    calls = calls_at_once(config)

    def make(index: int) -> Any:
        options = placement.worker(index)
        return cls.options(**options, max_concurrency=calls).remote(config, index, most, paths, engines)

    workers = [Worker(i, make(i)) for i in range(config.rollout.workers)]
    roster = None
    try:
        await_ready([w.actor for w in workers], "rollout workers", config.cluster.wait_seconds)
        roster = Roster(config, workers, make, most - config.rollout.workers)
        yield roster
    finally:
        for worker in roster.workers if roster else workers:
            ray.kill(worker.actor)


def calls_at_once(config: Config) -> int:
    """Calls that a worker must be able to take at the same time.

    An async actor runs so many at once; behind plays that fill all of them no heartbeat would be answered.
    """
    train = config.train
    plays = train.tasks_per_step * (1 + train.max_staleness) + train.oversample
    return _CALLS + max(config.rollout.concurrency, plays)
