"""All rollout workers: hands out groups, gathers reports, and loses nothing when a worker dies.

Who waits for whom: `collect` waits for the workers' reports, a worker waits for its environments and its
engine. A dead worker is restarted by Ray; until it answers again the others take its groups. The groups
that were on it are suspects then: each is tried again alone on a worker, so that one task that kills
every worker it meets is found, given up after `rollout.retries`, and takes no other down with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from stateset_ray.actors.jobs import Counts, GroupJob, GroupReport
from stateset_ray.actors.placement import Placement, import_paths
from stateset_ray.actors.remote import cause_of, get
from stateset_ray.actors.rollout_worker import RolloutWorker
from stateset_ray.actors.weights import PublishedWeights
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, WaitTimeout
from stateset_ray.types import StopReason

__all__ = ["Collected", "GroupHandle", "RolloutPool", "rollout_pool"]

_POLL = 1.0  # seconds between looks at deadlines and at the caller's wish to stop


@dataclass(frozen=True)
class GroupHandle:
    """A finished group: its report here, its payload in the object store."""

    report: GroupReport
    payload: Any


@dataclass
class Collected:
    """What one `collect` brought.

    Attributes:
        groups: in the order of the jobs; groups that were given up are missing.
        counts: `dispatched` and `aborted` are final; the caller accounts for the groups.
        restarts: workers that died meanwhile.
    """

    groups: list[GroupHandle]
    counts: Counts
    restarts: int

    def add(self, more: Collected) -> None:
        """Take in what a further `collect` brought."""
        self.groups += more.groups
        self.counts.dispatched += more.counts.dispatched
        self.counts.aborted += more.counts.aborted
        self.restarts += more.restarts


@dataclass(eq=False)
class _Worker:
    index: int
    actor: Any
    stream: Any = None
    jobs: dict[str, GroupJob] = field(default_factory=dict)
    ping: Any = None
    """Set while the worker is not known to be alive."""
    since: float = 0.0


class RolloutPool:
    """Plays jobs on the workers that `rollout_pool` created."""

    def __init__(self, config: Config, workers: list[_Worker], make: Callable[[int], Any]) -> None:
        self._config = config
        self._workers = workers
        self._make = make
        self.weights: PublishedWeights | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        live = [w.actor.ready.remote() for w in self._workers if w.ping is None]
        return [facts["pid"] for facts in self._ask(live)]

    def stats(self) -> list[dict[str, float]]:
        """`EngineStats` of every live worker."""
        live = [w.actor.stats.remote() for w in self._workers if w.ping is None]
        return list(self._ask(live))

    def _ask(self, refs: list[Any]) -> list[Any]:
        limit = self._config.cluster.wait_seconds
        return list(get(refs, timeout=limit, waiting_for="the rollout workers' answers"))

    def collect(self, jobs: Sequence[GroupJob], should_stop: Callable[[], bool] = lambda: False) -> Collected:
        """Play every job once with the published weights.

        Args:
            jobs: groups to play; their ids are unique.
            should_stop: looked at about once a second.

        Raises:
            WaitTimeout: no report came for longer than a conversation may last.
            KeyboardInterrupt: `should_stop` said so; unfinished groups are abandoned.
            StatesetError: a worker raised an error that is not a conversation's (a bug, a bad environment).
        """
        state = _Collection(jobs, self._config.rollout.retries)
        live = self._live() or self._await_any()
        for worker, share in zip(live, _deal(state.fresh, len(live)), strict=True):
            self._dispatch(worker, share, state)
        state.fresh.clear()
        last = time.monotonic()
        while state.unfinished:
            if should_stop():
                self._abandon()
                raise KeyboardInterrupt
            for worker in self._live():
                if worker.stream is None and state.suspects:
                    self._dispatch(worker, [state.suspects.popleft()], state)
            if self._advance(state):
                last = time.monotonic()
            limit = self._config.rollout.conversation_timeout + self._config.cluster.wait_seconds
            if time.monotonic() - last > limit:
                raise WaitTimeout(
                    f"the controller got no report from any rollout worker for {limit:.0f} s",
                    given={w.index: sorted(w.jobs) for w in self._workers},
                    mend="look at the workers' logs; something hangs without a limit of its own",
                )
        order = {job.id: i for i, job in enumerate(jobs)}
        state.groups.sort(key=lambda handle: order[handle.report.job.id])
        return Collected(state.groups, state.counts, state.restarts)

    def _live(self) -> list[_Worker]:
        return [w for w in self._workers if w.ping is None]

    def _dispatch(self, worker: _Worker, jobs: Sequence[GroupJob], state: _Collection) -> None:
        if not jobs:
            return
        weights = self.weights or PublishedWeights(0)
        worker.jobs = {job.id: job for job in jobs}
        state.counts.dispatched += sum(job.size for job in jobs)
        worker.stream = worker.actor.play.options(num_returns="streaming").remote(
            weights.version, {"refs": weights.refs, "lineage": weights.lineage}, list(jobs)
        )

    def _advance(self, state: _Collection) -> bool:
        """Wait for whatever comes next, and take it; False if nothing came."""
        waits = {w.stream: w for w in self._workers if w.stream is not None}
        waits |= {w.ping: w for w in self._workers if w.ping is not None}
        if not waits:
            raise ClusterError("no rollout worker is left", mend="look at the workers' logs")
        # Not fetched: the first half of what a stream gives is a payload, which stays where it is.
        ready, _ = ray.wait(list(waits), num_returns=1, timeout=_POLL, fetch_local=False)
        for item in ready:
            worker = waits[item]
            if worker.ping is not None:
                self._pinged(worker)
            else:
                self._report(worker, state)
        return bool(ready)

    def _report(self, worker: _Worker, state: _Collection) -> None:
        """Take the next report of a worker's stream, or notice its end or its death."""
        try:
            payload = next(worker.stream)
            # After a death the stream's last reference is what raises it: then there is no report.
            report: GroupReport = ray.get(
                next(worker.stream, payload), timeout=self._config.cluster.wait_seconds
            )
        except StopIteration:
            worker.stream = None
            return
        except RayActorError as death:
            self._lost(worker, death, state)
            return
        except RayTaskError as error:
            raise cause_of(error) from None
        job = worker.jobs.pop(report.job.id)
        failed = StopReason.INFRASTRUCTURE_ERROR.value in report.stop_reasons
        if failed and job.attempt < self._config.rollout.retries:
            state.counts.aborted["infrastructure_error"] += job.size
            state.suspects.append(job.again())
            return
        state.unfinished.discard(job.id)
        state.groups.append(GroupHandle(report, payload))

    def _lost(self, worker: _Worker, death: RayActorError, state: _Collection) -> None:
        """A worker died: its unfinished groups become suspects, or are given up."""
        for job in worker.jobs.values():
            state.counts.aborted["worker_died"] += job.size
            # Only a group that was alone on the worker is known to have been there when it died.
            guilty = len(worker.jobs) == 1
            again = job.again()
            if guilty and again.attempt > self._config.rollout.retries:
                state.unfinished.discard(job.id)
            else:
                state.suspects.append(again if guilty else job)
        worker.jobs, worker.stream = {}, None
        state.restarts += 1
        if isinstance(death, ActorDiedError):
            worker.actor = self._make(worker.index)
        worker.ping, worker.since = worker.actor.ready.remote(), time.monotonic()

    def _pinged(self, worker: _Worker) -> None:
        """A worker answered its ping, or is still restarting, or is gone for good."""
        try:
            ray.get(worker.ping, timeout=self._config.cluster.wait_seconds)
            worker.ping = None
        except RayActorError as error:
            if time.monotonic() - worker.since > self._config.cluster.wait_seconds:
                raise ClusterError(
                    f"rollout worker {worker.index} did not come back within "
                    f"{self._config.cluster.wait_seconds:.0f} s: {error}",
                    mend="look at its log; is there memory for its model?",
                ) from error
            if isinstance(error, ActorDiedError):
                worker.actor = self._make(worker.index)
            worker.ping = worker.actor.ready.remote()

    def _await_any(self) -> list[_Worker]:
        deadline = time.monotonic() + self._config.cluster.wait_seconds
        while not self._live():
            pings = {w.ping: w for w in self._workers}
            ready, _ = ray.wait(list(pings), num_returns=1, timeout=_POLL)
            for item in ready:
                self._pinged(pings[item])
            if time.monotonic() > deadline:
                raise WaitTimeout("the controller waited for any rollout worker to come back")
        return self._live()

    def _abandon(self) -> None:
        for worker in self._workers:
            if worker.stream is not None:
                ray.cancel(worker.stream)
                worker.stream, worker.jobs = None, {}


class _Collection:
    """The books of one `collect`."""

    def __init__(self, jobs: Sequence[GroupJob], retries: int) -> None:
        self.fresh = list(jobs)
        self.suspects: deque[GroupJob] = deque()
        self.unfinished = {job.id for job in jobs}
        self.groups: list[GroupHandle] = []
        self.counts = Counts()
        self.restarts = 0


def _deal(jobs: Sequence[GroupJob], hands: int) -> list[list[GroupJob]]:
    """Deal jobs round the table; which worker plays what is the same in every run."""
    return [list(jobs[i::hands]) for i in range(hands)]


@contextmanager
def rollout_pool(config: Config, placement: Placement) -> Iterator[RolloutPool]:
    """Create the workers, wait until they can work, and end them afterwards.

    Raises:
        StatesetError: a worker could not be built (its model, its template); the cause is passed on.
        WaitTimeout: not ready within `cluster.wait_seconds`.
    """
    cls = ray.remote(max_restarts=-1, max_task_retries=0)(RolloutWorker)
    paths = import_paths()
    count = config.rollout.workers

    def make(index: int) -> Any:
        options = placement.worker(index)
        # An async actor runs as many calls at once as it has pings and plays outstanding.
        return cls.options(**options, max_concurrency=64).remote(config, index, count, paths)

    workers = [_Worker(i, make(i)) for i in range(count)]
    try:
        refs = [w.actor.ready.remote() for w in workers]
        ready, waiting = ray.wait(refs, num_returns=count, timeout=config.cluster.wait_seconds)
        get(ready, timeout=1, waiting_for="workers that said they are ready")
        if waiting:
            raise WaitTimeout(
                f"{len(waiting)} of {count} rollout workers were not ready after "
                f"{config.cluster.wait_seconds:.0f} s",
                mend="raise cluster.wait_seconds if the model is large; else look at the workers' logs",
            )
        yield RolloutPool(config, workers, make)
    finally:
        for worker in workers:
            ray.kill(worker.actor)
