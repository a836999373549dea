"""All rollout workers: hands out groups, gathers reports, and loses nothing when a worker dies.

Groups that are collected together are a flight; several flights may be under way, each with its own books.
Who waits for whom: `wait` and `collect` wait for the workers' reports, a worker waits for its environments
and its engine. A dead worker is restarted by Ray; until it answers again the others take its groups. The
groups that were on it are suspects then: each is tried again alone on a worker, so that one task that kills
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

from stateset_ray.actors.flight import Collected, Flight, GroupHandle
from stateset_ray.actors.inference_pool import inference_engines
from stateset_ray.actors.jobs import GroupJob, GroupReport
from stateset_ray.actors.placement import Placement, import_paths
from stateset_ray.actors.remote import await_ready, cause_of, get
from stateset_ray.actors.rollout_worker import RolloutWorker
from stateset_ray.actors.weights import PublishedWeights
from stateset_ray.config import Config
from stateset_ray.errors import ClusterError, WaitTimeout
from stateset_ray.types import StopReason

__all__ = ["RolloutPool", "rollout_pool"]

_POLL = 1.0  # seconds between looks at deadlines and at the caller's wish to stop
_CALLS = 64  # of a worker at the same time, besides one for each conversation


@dataclass(eq=False)
class _Stream:
    """One call of a worker's `play`: what it plays, for which flight."""

    flight: Flight
    jobs: dict[str, GroupJob]
    suspect: bool = False


@dataclass(eq=False)
class _Worker:
    index: int
    actor: Any
    streams: dict[Any, _Stream] = field(default_factory=dict)
    ping: Any = None
    """Set while the worker is not known to be alive."""
    since: float = 0.0
    alone: bool = False
    """Whether it plays a suspect, or is kept free for one."""

    @property
    def load(self) -> int:
        """Groups that it has still to play."""
        return sum(len(stream.jobs) for stream in self.streams.values())


class RolloutPool:
    """Plays jobs on the workers that `rollout_pool` created."""

    def __init__(
        self, config: Config, workers: list[_Worker], make: Callable[[int], Any],
        engines: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self._config = config
        self._engines = engines
        self._workers = workers
        self._make = make
        self._suspects: deque[tuple[GroupJob, Flight]] = deque()
        self._held: deque[tuple[GroupJob, Flight]] = deque()
        """Groups for which there is no worker at the moment."""
        self._quiet_since = time.monotonic()
        self.weights: PublishedWeights | None = None

    @property
    def capacity(self) -> int:
        """Groups that all workers together can play at once."""
        limits = self._config.rollout
        return max(1, len(self._workers) * limits.concurrency // self._config.grpo.group_size)

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        live = [w.actor.ready.remote() for w in self._workers if w.ping is None]
        return [facts["pid"] for facts in self._ask(live)]

    @property
    def engine_pids(self) -> list[int]:
        """Process ids of the engines that sit apart from the workers; waits for those that Ray restarts."""
        # Asked again after a restart: a question has no effects.
        asked = [engine.ready.options(max_task_retries=-1).remote() for engine in self._engines]
        return [facts["pid"] for facts in self._ask(asked)]

    def stats(self) -> list[dict[str, float]]:
        """What every live worker's engine has done, or its router: `EngineStats`, `Router.stats`."""
        live = [w.actor.stats.remote() for w in self._workers if w.ping is None]
        return list(self._ask(live))

    def _ask(self, refs: list[Any]) -> list[Any]:
        limit = self._config.cluster.wait_seconds
        return list(get(refs, timeout=limit, waiting_for="the rollout workers' answers"))

    def collect(self, jobs: Sequence[GroupJob], should_stop: Callable[[], bool] = lambda: False) -> Collected:
        """Play every job once with the published weights, and wait for all of them.

        Args:
            jobs: groups to play; their ids are unique.
            should_stop: looked at about once a second.

        Raises:
            WaitTimeout: no report came for longer than a conversation may last.
            KeyboardInterrupt: `should_stop` said so; everything unfinished is abandoned.
            StatesetError: a worker raised an error that is not a conversation's (a bug, a bad environment).
        """
        flight = Flight()
        self.dispatch(flight, jobs)
        self.wait(flight, should_stop)
        return flight.collected()

    def dispatch(self, flight: Flight, jobs: Sequence[GroupJob]) -> None:
        """Send groups to the workers, to the least loaded first; does not wait for them."""
        if not self._under_way():
            self._quiet_since = time.monotonic()
        for job in jobs:
            flight.order[job.id] = len(flight.order)
            flight.unfinished.add(job.id)
        self._held.extend((job, flight) for job in jobs)
        if not self._live():
            self._await_any()
        self._tend()

    def wait(
        self, flight: Flight, should_stop: Callable[[], bool] = lambda: False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Wait until every group of a flight has ended, and take what comes for the others too.

        Args:
            meanwhile: called after everything that came.

        Raises:
            StatesetError, KeyboardInterrupt: see `collect`.
        """
        while flight.unfinished:
            if should_stop():
                self.abandon()
                raise KeyboardInterrupt
            if self.advance(_POLL):
                meanwhile()

    def advance(self, seconds: float) -> bool:
        """Wait for whatever comes next, at most so long, and take it; False if nothing came.

        Raises:
            StatesetError: see `collect`.
        """
        waits = {stream: w for w in self._workers for stream in w.streams}
        waits |= {w.ping: w for w in self._workers if w.ping is not None}
        if not waits:
            raise ClusterError("no rollout worker is left", mend="look at the workers' logs")
        # Not fetched: the first half of what a stream gives is a payload, which stays where it is.
        ready, _ = ray.wait(list(waits), num_returns=1, timeout=seconds, fetch_local=False)
        for item in ready:
            worker = waits[item]
            if worker.ping is not None:
                self._pinged(worker)
            elif item in worker.streams:
                self._report(worker, item)
        if ready:
            self._quiet_since = time.monotonic()
            self._tend()
        limit = self._config.rollout.conversation_timeout + self._config.cluster.wait_seconds
        if time.monotonic() - self._quiet_since > limit:
            raise WaitTimeout(
                f"the controller got no report from any rollout worker for {limit:.0f} s",
                given={w.index: sorted(j for s in w.streams.values() for j in s.jobs) for w in self._workers},
                mend="look at the workers' logs; something hangs without a limit of its own",
            )
        return bool(ready)

    def abandon(self) -> None:
        """Give up everything that is under way, in every flight."""
        for worker in self._workers:
            for stream in worker.streams:
                ray.cancel(stream)
            worker.streams, worker.alone = {}, False
        self._suspects.clear()
        self._held.clear()

    def _under_way(self) -> bool:
        return bool(self._held or self._suspects or any(w.streams for w in self._workers))

    def _live(self) -> list[_Worker]:
        return [w for w in self._workers if w.ping is None]

    def _tend(self) -> None:
        """Give suspects workers of their own, and all other groups the least loaded of the rest."""
        live = self._live()
        for worker in live:
            if not worker.streams and self._suspects:
                job, flight = self._suspects.popleft()
                self._play(worker, [job], flight, suspect=True)
            # What is left of others' work on a worker that a suspect waited for is no reason any more.
            waits = worker.alone and bool(self._suspects)
            worker.alone = waits or any(stream.suspect for stream in worker.streams.values())
        if self._suspects and live and not any(w.alone for w in live):
            # Nobody is idle: one is left to finish what it has, so that a suspect's turn will come.
            min(live, key=lambda w: (w.load, w.index)).alone = True
        takers = [w for w in live if not w.alone]
        if not takers:
            return
        loads = {w.index: w.load for w in takers}
        hands: dict[tuple[int, int], tuple[_Worker, Flight, list[GroupJob]]] = {}
        while self._held:
            job, flight = self._held.popleft()
            worker = min(takers, key=lambda w: (loads[w.index], w.index))
            loads[worker.index] += 1
            hands.setdefault((worker.index, id(flight)), (worker, flight, []))[2].append(job)
        for worker, flight, jobs in hands.values():
            self._play(worker, jobs, flight)

    def _play(
        self, worker: _Worker, jobs: Sequence[GroupJob], flight: Flight, *, suspect: bool = False
    ) -> None:
        weights = self.weights or PublishedWeights(0)
        flight.counts.dispatched += sum(job.size for job in jobs)
        stream = worker.actor.play.options(num_returns="streaming").remote(
            weights.version, {"refs": weights.refs, "lineage": weights.lineage}, list(jobs)
        )
        worker.streams[stream] = _Stream(flight, {job.id: job for job in jobs}, suspect)

    def _report(self, worker: _Worker, item: Any) -> None:
        """Take the next report of a worker's stream, or notice its end or its death."""
        stream = worker.streams[item]
        try:
            payload = next(item)
            # After a death the stream's last reference is what raises it: then there is no report.
            report: GroupReport = ray.get(next(item, payload), timeout=self._config.cluster.wait_seconds)
        except StopIteration:
            del worker.streams[item]
            return
        except RayActorError as death:
            self._lost(worker, death)
            return
        except RayTaskError as error:
            raise cause_of(error) from None
        flight = stream.flight
        job = stream.jobs.pop(report.job.id)
        failed = StopReason.INFRASTRUCTURE_ERROR.value in report.stop_reasons
        if failed and job.attempt < self._config.rollout.retries:
            flight.counts.aborted["infrastructure_error"] += job.size
            self._suspects.append((job.again(), flight))
            return
        flight.unfinished.discard(job.id)
        flight.groups.append(GroupHandle(report, payload))

    def _lost(self, worker: _Worker, death: RayActorError) -> None:
        """A worker died: its unfinished groups become suspects, or are given up."""
        # Only a group that was alone on the worker is known to have been there when it died.
        guilty = worker.load == 1
        next(iter(worker.streams.values())).flight.restarts += 1  # one death, booked once
        for stream in worker.streams.values():
            for job in stream.jobs.values():
                stream.flight.counts.aborted["worker_died"] += job.size
                again = job.again()
                if guilty and again.attempt > self._config.rollout.retries:
                    stream.flight.unfinished.discard(job.id)
                else:
                    self._suspects.append((again if guilty else job, stream.flight))
        worker.streams, worker.alone = {}, False
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

    def _await_any(self) -> None:
        deadline = time.monotonic() + self._config.cluster.wait_seconds
        while not self._live():
            pings = {w.ping: w for w in self._workers}
            ready, _ = ray.wait(list(pings), num_returns=1, timeout=_POLL)
            for item in ready:
                self._pinged(pings[item])
            if time.monotonic() > deadline:
                raise WaitTimeout("the controller waited for any rollout worker to come back")


@contextmanager
def rollout_pool(config: Config, placement: Placement) -> Iterator[RolloutPool]:
    """Create engines and workers, wait until they can work, and end them afterwards.

    Raises:
        StatesetError: a worker could not be built (its model, its template); the cause is passed on.
        WaitTimeout: not ready within `cluster.wait_seconds`.
    """
    with inference_engines(config, placement) as engines, _workers(config, placement, engines) as pool:
        yield pool


@contextmanager
def _workers(config: Config, placement: Placement, engines: Sequence[Any]) -> Iterator[RolloutPool]:
    cls = ray.remote(max_restarts=-1, max_task_retries=0)(RolloutWorker)
    paths = import_paths()
    count = config.rollout.workers

    def make(index: int) -> Any:
        options = placement.worker(index)
        # An async actor runs as many calls at once as it has pings and plays outstanding.
        calls = _CALLS + config.rollout.concurrency
        return cls.options(**options, max_concurrency=calls).remote(config, index, count, paths, engines)

    workers = [_Worker(i, make(i)) for i in range(count)]
    try:
        await_ready([w.actor for w in workers], "rollout workers", config.cluster.wait_seconds)
        yield RolloutPool(config, workers, make, engines)
    finally:
        for worker in workers:
            ray.kill(worker.actor)
